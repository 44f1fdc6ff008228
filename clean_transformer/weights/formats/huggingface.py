"""Hugging Face's GPT-2: its rows, its config.json, and its folders, read and written."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.support.files import atomic_folder
from clean_transformer.weights.table import (
    Format,
    Row,
    State,
    WeightsError,
    head_width,
    refuse_architecture,
)

# Conv1D keeps its weight as [in, out], the queries, keys and values side by side.
QKV_WEIGHT = "d_model (qkv head d_head) -> qkv head d_model d_head"


QKV_BIAS = "(qkv head d_head) -> qkv head d_head"


HUGGINGFACE = Format(
    name="Hugging Face GPT-2",
    marker="transformer.wte.weight",
    outer=(
        Row("embed.W_E", "transformer.wte.weight"),
        Row("pos_embed.W_pos", "transformer.wpe.weight"),
        Row("ln_final.w", "transformer.ln_f.weight"),
        Row("ln_final.b", "transformer.ln_f.bias"),
        Row("unembed.W_U", "lm_head.weight", "d_vocab d_model -> d_model d_vocab"),
        Row("unembed.b_U", None),
    ),
    block=(
        Row("ln1.w", "ln_1.weight"),
        Row("ln1.b", "ln_1.bias"),
        Row("attn.W_Q", "attn.c_attn.weight", QKV_WEIGHT, part=0),
        Row("attn.W_K", "attn.c_attn.weight", QKV_WEIGHT, part=1),
        Row("attn.W_V", "attn.c_attn.weight", QKV_WEIGHT, part=2),
        Row("attn.b_Q", "attn.c_attn.bias", QKV_BIAS, part=0),
        Row("attn.b_K", "attn.c_attn.bias", QKV_BIAS, part=1),
        Row("attn.b_V", "attn.c_attn.bias", QKV_BIAS, part=2),
        Row("attn.W_O", "attn.c_proj.weight", "(head d_head) d_model -> head d_head d_model"),
        Row("attn.b_O", "attn.c_proj.bias"),
        Row("ln2.w", "ln_2.weight"),
        Row("ln2.b", "ln_2.bias"),
        Row("mlp.W_in", "mlp.c_fc.weight"),
        Row("mlp.b_in", "mlp.c_fc.bias"),
        Row("mlp.W_out", "mlp.c_proj.weight"),
        Row("mlp.b_out", "mlp.c_proj.bias"),
    ),
    block_prefix="transformer.h.{layer}.",
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)


# What config.json may say besides sizes, and the values that mean the GPT-2 implemented here.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def with_prefix(state: State) -> dict[str, Tensor]:
    """The names of `GPT2LMHeadModel`; the hub's checkpoint has those of the bare `GPT2Model`."""
    if "wte.weight" not in state:
        return dict(state)
    return {
        key if key.startswith("lm_head.") else f"transformer.{key}": tensor
        for key, tensor in state.items()
    }


def config_from_json(fields: Mapping[str, Any]) -> Config:
    """The architecture that a config.json describes.

    Raises `WeightsError` for a model that is not a plain GPT-2, naming the field.
    """
    for field, values in SUPPORTED.items():
        value = fields.get(field, values[0])
        if value not in values:
            raise WeightsError(f"config.json says {field}={value!r}; supported: {list(values)}")
    try:
        d_model, n_heads = fields["n_embd"], fields["n_head"]
        return Config(
            n_layers=fields["n_layer"],
            n_heads=n_heads,
            d_model=d_model,
            d_head=head_width("config.json", d_model, n_heads),
            d_mlp=fields.get("n_inner") or 4 * d_model,
            d_vocab=fields["vocab_size"],
            n_ctx=fields.get("n_positions") or fields["n_ctx"],
            eps=fields.get("layer_norm_epsilon", 1e-5),
            initializer_range=fields.get("initializer_range", 0.02),
            tied_unembed=fields.get("tie_word_embeddings", True),
        )
    except KeyError as missing:
        raise WeightsError(f"config.json has no {missing}") from None


def config_to_json(cfg: Config) -> dict[str, Any]:
    """The fields of a config.json. Raises `WeightsError` for what Hugging Face cannot hold."""
    refuse_architecture("Hugging Face", cfg)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_embd": cfg.d_model,
        "n_inner": cfg.d_mlp,
        "vocab_size": cfg.d_vocab,
        "n_positions": cfg.n_ctx,
        "layer_norm_epsilon": cfg.eps,
        "initializer_range": cfg.initializer_range,
        "tie_word_embeddings": cfg.tied_unembed,
    }


def read_folder(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and the weights under Hugging Face's names, memory-mapped.

    Reads model.safetensors, the shards named by model.safetensors.index.json, or
    pytorch_model.bin, whichever comes first. Raises `WeightsError` for a damaged file and
    `FileNotFoundError` for a missing one.
    """
    cfg = config_from_json(read_json(folder / "config.json"))
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        state |= read_tensors(file)
    return cfg, with_prefix(state)


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a JSON object. Raises `WeightsError` for a damaged file."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON ({error}); copy or download it again") from None
    if not isinstance(fields, dict):
        raise WeightsError(f"{file} is not a JSON object; copy or download it again")
    return fields


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = read_json(index).get("weight_map", {}).values()
        shards = [folder / name for name in dict.fromkeys(names)]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks the shards {missing} that its index names")
        return shards
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def read_tensors(file: Path) -> dict[str, Any]:
    """What is in a .safetensors file, or in a dictionary that `torch.save` wrote; memory-mapped.

    Raises `WeightsError` for a damaged file, and for objects that only running code restores.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{file} is damaged ({reason}); copy or download it again") from None
    if not isinstance(saved, dict):
        raise WeightsError(f"{file} holds a {type(saved).__name__}, not a state dict")
    return saved


def write_folder(folder: Path, cfg: Config, state: State) -> None:
    """Write config.json and model.safetensors, each appearing whole or not at all."""
    from safetensors.torch import save_file

    config, tensors = config_to_json(cfg), HUGGINGFACE.write(cfg, state)
    with atomic_folder(folder) as unfinished:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
