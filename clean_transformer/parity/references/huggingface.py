"""Runs `GPT2LMHeadModel`, of Hugging Face's transformers, with our weights."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.parity.references.base import (
    LOGITS,
    TOKENS,
    Implementation,
    Reference,
    ReferenceUnavailable,
    everything,
    import_package,
)
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_to_json
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.table import State

# A function that gets a module's first input and the module's output. The function returns a dict
# from our names of activations to the activations that it finds in the input and the output.
Shows = Callable[[Any, Any], dict[str, Tensor]]


def is_installed() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None


def huggingface(cfg: Config, state: State) -> Reference:
    """Return a `Reference` that runs a `GPT2LMHeadModel` with the parameters of `state`."""
    import_package("transformers", "bridge")
    return watched_model(gpt2_lm_head_model(cfg, state))


def read(folder: Path) -> Reference:
    """Return a `Reference` that runs a `GPT2LMHeadModel` with the weights in `folder`.

    transformers reads the files.
    """
    import_package("transformers", "bridge")
    return watched_model(read_gpt2_lm_head_model(folder))


def watched_model(model: Any) -> Reference:
    """Return a `Reference` that runs `model`, a `GPT2LMHeadModel` with eager attention."""

    def heads(merged: Tensor) -> Tensor:
        return rearrange(merged, "... (head d_head) -> ... head d_head", head=model.config.n_head)

    outer: dict[str, Shows] = {
        "transformer.wte": lambda tokens, embed: {TOKENS: tokens, "hook_embed": embed},
        "transformer.wpe": lambda _, pos_embed: {"hook_pos_embed": pos_embed},
        "transformer.ln_f": lambda _, normalized: {"ln_final": normalized},
        "lm_head": lambda _, logits: {LOGITS: logits},
    }
    block: dict[str, Shows] = {
        "": lambda x, resid_post: {"hook_resid_pre": x, "hook_resid_post": resid_post},
        "ln_1": lambda _, normalized: {"ln1": normalized},
        "attn": lambda _, out: {"attn.hook_pattern": out[1]},
        "attn.c_attn": lambda _, qkv: {
            f"attn.hook_{name}": heads(x) for name, x in zip("qkv", qkv.chunk(3, -1), strict=True)
        },
        "attn.c_proj": lambda z, out: {"attn.hook_z": heads(z), "hook_attn_out": out},
        "ln_2": lambda resid_mid, normalized: {"hook_resid_mid": resid_mid, "ln2": normalized},
        "mlp.c_fc": lambda _, pre: {"mlp.hook_pre": pre},
        "mlp.c_proj": lambda post, out: {"mlp.hook_post": post, "hook_mlp_out": out},
    }
    watched = [(path, "", shows) for path, shows in outer.items()]
    for layer in range(model.config.n_layer):
        for path, shows in block.items():
            place = f"transformer.h.{layer}.{path}".rstrip(".")
            watched.append((place, f"blocks.{layer}.", shows))

    def run(
        tokens: Int[Tensor, "batch pos"], keep: Callable[[str], bool] = everything
    ) -> Mapping[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def watch(prefix: str, shows: Shows, _: nn.Module, inputs: Any, output: Any) -> None:
            shown = shows(inputs[0] if inputs else None, output)
            seen.update(
                {prefix + name: value for name, value in shown.items() if keep(prefix + name)}
            )

        handles = [
            model.get_submodule(path).register_forward_hook(partial(watch, prefix, shows))
            for path, prefix, shows in watched
        ]
        try:
            model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        # GPT2LMHeadModel's position embeddings are [1 pos d_model]; ours are [batch pos d_model].
        if "hook_pos_embed" in seen:
            position = seen["hook_pos_embed"]
            seen["hook_pos_embed"] = position.expand(len(tokens), *position.shape[1:])
        return seen

    return Reference(f"GPT2LMHeadModel {version('transformers')}", run)


def plain_model(cfg: Config, state: State, device: torch.device) -> nn.Module:
    """Return a `GPT2LMHeadModel` on `device` with fused attention, transformers' default."""
    import_package("transformers", "bridge")
    return gpt2_lm_head_model(cfg, state, attention="sdpa").to(device)


def gpt2_lm_head_model(cfg: Config, state: State, *, attention: str = "eager") -> Any:
    """Return a `GPT2LMHeadModel` on the CPU with the parameters and the dtype of `state`.

    If `attention` is "eager", separate operations compute attention. If it is "sdpa", one fused
    kernel of PyTorch does. Raises `ReferenceUnavailable` if `GPT2LMHeadModel` does not support the
    configuration `cfg`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        fields, theirs = config_to_json(cfg), HUGGINGFACE.write(cfg, state)
    except WeightsError as error:
        raise ReferenceUnavailable(f"GPT2LMHeadModel cannot hold this model: {error}") from None
    dtype = state["embed.W_E"].dtype
    end_of_text = cfg.d_vocab - 1
    with torch.device("meta"):
        model = GPT2LMHeadModel(
            GPT2Config(
                **fields,
                attn_implementation=attention,
                bos_token_id=end_of_text,
                eos_token_id=end_of_text,
            )
        )
    model = model.to(dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    model.load_state_dict(
        theirs | {"lm_head.weight": theirs.get("lm_head.weight", theirs["transformer.wte.weight"])}
    )
    return model


def read_gpt2_lm_head_model(folder: Path) -> Any:
    """Return the `GPT2LMHeadModel` that transformers reads from `folder`, in float64 on the CPU.

    The weights are rounded to float32 first, as in our loader. Raises `ReferenceUnavailable` if
    transformers cannot read the files, or finds no value for a parameter.
    """
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = GPT2LMHeadModel.from_pretrained(
            folder, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and pickle raise many classes
        first = str(error).strip().partition("\n")[0]
        message = f"transformers cannot read {folder} ({type(error).__name__}: {first})"
        raise ReferenceUnavailable(message) from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise ReferenceUnavailable(f"transformers finds no {missing[0]} in {folder}")
    return model.eval().float().double()


IMPLEMENTATION = Implementation(
    "huggingface", huggingface, plain_model, is_installed, rank=2, read=read
)
