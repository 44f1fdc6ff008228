"""Reads and writes GPT-2 in Hugging Face's format: the tensors, config.json, and whole folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.support.files import atomic_folder
from clean_transformer.weights.files import read_json, read_tensors, state_dict_in
from clean_transformer.weights.refusals import WeightsError, head_width, refuse_architecture
from clean_transformer.weights.rows import Row
from clean_transformer.weights.table import Folder, Format, State, plain_names

# Hugging Face's linear layer is `Conv1D`, whose weight is [in, out]. The weight
# `attn.c_attn.weight` is the concatenation of W_Q, W_K and W_V along its output axis.
QKV_WEIGHT = "d_model (qkv head d_head) -> qkv head d_model d_head"


QKV_BIAS = "(qkv head d_head) -> qkv head d_head"


OUTER = (
    Row("embed.W_E", "transformer.wte.weight"),
    Row("pos_embed.W_pos", "transformer.wpe.weight"),
    Row("ln_final.w", "transformer.ln_f.weight"),
    Row("ln_final.b", "transformer.ln_f.bias"),
    Row("unembed.W_U", "lm_head.weight", "d_vocab d_model -> d_model d_vocab"),
    Row("unembed.b_U", None),
)


BLOCK = (
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
)


# The fields of config.json that change the function that the model computes, and for each field the
# values that we support. If config.json lacks a field, we assume the first of these values. The
# four activation functions are the same formula.
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


# The variants of this package that compute another activation function.
ACTIVATIONS = {"gelu": "ExactGeluMLP", "gelu_python": "ExactGeluMLP", "relu": "ReluMLP"}


def _advice(field: str, value: object) -> str:
    """Return how to build a model for which the `field` of config.json has this value, or ""."""
    named = ACTIVATIONS.get(str(value))
    variant = f"variants.{named}" if named else "a class of yours"
    advice = {
        "activation_function": f"replace the MLPs: swap(model, 'blocks.*.mlp', {variant})",
        "scale_attn_weights": "multiply W_Q and b_Q of each block by the square root of d_head",
        "scale_attn_by_inverse_layer_idx": "divide W_Q and b_Q of each block i by i + 1",
    }.get(field)
    load = "; load the weights with from_state_dict(state, Config(...)), and then "
    return load + advice if advice else ""


def has_linear_layout(state: State) -> bool:
    """Return whether the weights are [out, in], as in `nn.Linear`, not [in, out], as in `Conv1D`.

    `state` has Hugging Face's names, which nanoGPT also uses.
    """
    # The output axis of the weight for queries, keys and values is three times as long as its input
    # axis.
    weight = state.get("transformer.h.0.attn.c_attn.weight")
    return weight is not None and weight.ndim == 2 and weight.shape[0] > weight.shape[1]


def config_from_json(fields: Mapping[str, Any]) -> Config:
    """Return the architecture that the `fields` of a config.json describe.

    Raises `WeightsError` if a field is missing, or if the value of a field does not describe a
    plain GPT-2. The error names the field.
    """
    for field, values in SUPPORTED.items():
        value = fields.get(field, values[0])
        if value not in values:
            raise WeightsError(
                f"config.json says {field}={shorten(value)}; supported: {list(values)}"
                + _advice(field, value)
            )
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
    """Return the fields of a config.json that describes the architecture `cfg`.

    Raises `WeightsError` for an architecture that Hugging Face's GPT-2 cannot have.
    """
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
    """Return the architecture, and the memory-mapped tensors under Hugging Face's names.

    The tensors are read from the first of these files that exists: model.safetensors,
    model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json. An index file
    lists several files (shards) that together contain the tensors. Raises `WeightsError` for a
    damaged file and `FileNotFoundError` for a missing file.
    """
    cfg = config_from_json(read_json(folder / "config.json"))
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors = state_dict_in(file, read_tensors(file))
        if repeated := next((key for key in tensors if key in state), None):
            raise WeightsError(f"{file} has {repeated}, which another shard has, too")
        state |= tensors
    return cfg, HUGGINGFACE.full_names(plain_names(state))


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _shards(index: Path) -> list[Path]:
    """Return the files that the JSON file `index` lists.

    Raises `WeightsError` if `index` lists a file in another folder.
    """
    places = read_json(index).get("weight_map")
    names = [*places.values()] if isinstance(places, dict) else []
    outside = [
        name for name in names if not isinstance(name, str) or not name or Path(name).name != name
    ]
    if outside or not names:
        problem = f"lists {shorten(outside[0])}" if outside else "lists no files"
        raise WeightsError(f"{index} {problem}; it must list files in its own folder")
    shards = [index.parent / name for name in dict.fromkeys(names)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks the shards {missing} that its index lists")
    return shards


def write_folder(
    folder: Path, cfg: Config, state: State, others: Mapping[str, str] | None = None
) -> None:
    """Write config.json and model.safetensors into `folder`.

    `state` has the parameters under this package's names. `others` has the contents of other files
    to write, by name. If an error occurs, no incomplete file
    remains. Raises `WeightsError`, and writes nothing, for a model that the format cannot store.
    """
    from safetensors.torch import save_file

    config, tensors = config_to_json(cfg), HUGGINGFACE.write(cfg, state)
    with atomic_folder(folder) as unfinished:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        texts = {"config.json": json.dumps(config, indent=2) + "\n", **(others or {})}
        for name, content in texts.items():
            (unfinished / name).write_text(content, "utf-8")


HUGGINGFACE = Format(
    name="Hugging Face GPT-2",
    marker="transformer.wte.weight",
    outer=OUTER,
    block=BLOCK,
    block_prefix="transformer.h.{layer}.",
    # The names in `GPT2LMHeadModel` have this prefix. The names in `GPT2Model` do not.
    optional_prefix="transformer.",
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    layout=lambda state: not has_linear_layout(state),
    folder=Folder(
        file_sets=(
            ("config.json", "model.safetensors"),
            ("config.json", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
            ("config.json", "pytorch_model.bin"),
            ("config.json", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
        ),
        read=read_folder,
        priority=1,
    ),
)
