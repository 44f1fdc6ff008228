"""The reference "huggingface": `GPT2LMHeadModel` of Hugging Face's transformers."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
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
    import_package,
)
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_to_json
from clean_transformer.weights.table import State, WeightsError

# A function that gets a module's first input and the module's output. The function returns a dict
# from our names of activations to the activations that it finds in the input and the output.
Shows = Callable[[Any, Any], dict[str, Tensor]]


def is_installed() -> bool:
    """Whether transformers is installed."""
    return find_spec("transformers") is not None


def huggingface(cfg: Config, state: State) -> Reference:
    """Build the reference around a `GPT2LMHeadModel` with eager attention.

    Forward hooks on the model's modules collect the activations.
    """
    import_package("transformers", "bridge")
    model = gpt2_lm_head_model(cfg, state, attention="eager")

    def heads(merged: Tensor) -> Tensor:
        return rearrange(merged, "... (head d_head) -> ... head d_head", head=cfg.n_heads)

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
    for layer in range(cfg.n_layers):
        for path, shows in block.items():
            place = f"transformer.h.{layer}.{path}".rstrip(".")
            watched.append((place, f"blocks.{layer}.", shows))

    def run(tokens: Int[Tensor, "batch pos"]) -> Mapping[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def watch(prefix: str, shows: Shows, _: nn.Module, inputs: Any, output: Any) -> None:
            shown = shows(inputs[0] if inputs else None, output)
            seen.update({prefix + name: value for name, value in shown.items()})

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
        seen["hook_pos_embed"] = seen["hook_pos_embed"].expand_as(seen["hook_embed"])
        return seen

    return Reference(f"GPT2LMHeadModel {version('transformers')}", run)


def plain_model(cfg: Config, state: State, device: torch.device) -> nn.Module:
    """Return a `GPT2LMHeadModel` on `device`, with fused attention, as transformers loads it."""
    import_package("transformers", "bridge")
    return gpt2_lm_head_model(cfg, state, attention="sdpa").to(device)


def gpt2_lm_head_model(cfg: Config, state: State, *, attention: str) -> Any:
    """Return a `GPT2LMHeadModel` on the CPU with the parameters and the dtype of `state`.

    `attention` is "eager", which computes attention in small steps, or "sdpa", the fused attention.
    Raises `ReferenceUnavailable` if `GPT2LMHeadModel` does not support this configuration.
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


IMPLEMENTATION = Implementation("huggingface", huggingface, plain_model, is_installed, rank=2)
