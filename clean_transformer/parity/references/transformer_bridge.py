"""Runs `TransformerBridge`, of transformer_lens 4, with our weights.

`TransformerBridge` wraps Hugging Face's GPT-2.
"""

import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.parity.references.base import (
    LOGITS,
    POSITIONS,
    TOKENS,
    Implementation,
    Reference,
    ReferenceUnavailable,
    everything,
    import_package,
    major_version,
)
from clean_transformer.parity.references.huggingface import (
    gpt2_lm_head_model,
    read_gpt2_lm_head_model,
)
from clean_transformer.weights.table import State

# Maps the bridge's name of an activation to our name, where the two names differ. `{}` stands for
# the path of each block, such as `blocks.0`, and `{last}` for the path of the last block.
BRIDGE_ALIASES = {
    "embed.hook_in": TOKENS,
    "embed.hook_out": "hook_embed",
    "pos_embed.hook_in": POSITIONS,
    "pos_embed.hook_out": "hook_pos_embed",
    "{}.hook_in": "{}.hook_resid_pre",
    "{}.ln1.hook_in": "{}.hook_resid_pre",
    "{}.ln1.hook_out": "{}.ln1",
    "{}.attn.hook_in": "{}.ln1",
    "{}.attn.q.hook_in": "{}.ln1",
    "{}.attn.k.hook_in": "{}.ln1",
    "{}.attn.v.hook_in": "{}.ln1",
    "{}.attn.q.hook_out": "{}.attn.hook_q",
    "{}.attn.k.hook_out": "{}.attn.hook_k",
    "{}.attn.v.hook_out": "{}.attn.hook_v",
    "{}.attn.o.hook_in": "{}.attn.hook_z",
    "{}.attn.o.hook_out": "{}.hook_attn_out",
    "{}.attn.hook_hidden_states": "{}.hook_attn_out",
    "{}.attn.hook_out": "{}.hook_attn_out",
    "{}.ln2.hook_in": "{}.hook_resid_mid",
    "{}.ln2.hook_out": "{}.ln2",
    "{}.mlp.hook_in": "{}.ln2",
    "{}.mlp.in.hook_in": "{}.ln2",
    "{}.mlp.in.hook_out": "{}.mlp.hook_pre",
    "{}.mlp.out.hook_in": "{}.mlp.hook_post",
    "{}.mlp.out.hook_out": "{}.hook_mlp_out",
    "{}.mlp.hook_out": "{}.hook_mlp_out",
    "{}.hook_out": "{}.hook_resid_post",
    "ln_final.hook_in": "{last}.hook_resid_post",
    "ln_final.hook_out": "ln_final",
    "hook_unembed": LOGITS,
}


def is_installed() -> bool:
    """Whether a version of transformer_lens with `TransformerBridge` is installed."""
    return (major_version("transformer_lens") or 0) >= 4


def transformer_bridge(cfg: Config, state: State) -> Reference:
    """Return a `Reference` that runs a `TransformerBridge` with the parameters of `state`."""
    require_bridge()
    return watched_bridge(gpt2_lm_head_model(cfg, state))


def read(folder: Path) -> Reference:
    """Return a `Reference` that runs a `TransformerBridge` with the weights in `folder`.

    transformers reads the files as a `GPT2LMHeadModel`, which the bridge wraps.
    """
    require_bridge()
    return watched_bridge(read_gpt2_lm_head_model(folder))


def require_bridge() -> None:
    """Raise `ReferenceUnavailable` if the installed packages have no `TransformerBridge`."""
    import_package("transformer_lens", "bridge")
    if not is_installed():
        raise ReferenceUnavailable(
            f"transformer_lens {version('transformer_lens')} is not the TransformerBridge of 4.x; "
            "install the extra 'bridge'"
        )


def watched_bridge(hf_model: Any) -> Reference:
    """Return a `Reference` that runs a `TransformerBridge` around the given `GPT2LMHeadModel`."""
    bridge = bridge_around(hf_model, "cpu", hf_model.dtype)

    def run(
        tokens: Int[Tensor, "batch pos"], keep: Callable[[str], bool] = everything
    ) -> Mapping[str, Tensor]:
        with warnings.catch_warnings():
            # The bridge warns about optional activations that it does not compute by default.
            warnings.filterwarnings("ignore", "run_with_cache: skipped", UserWarning)
            logits, cache = bridge.run_with_cache(tokens, names_filter=keep)
        return {
            key: masked_with_infinity(value) if key.endswith("hook_attn_scores") else value
            for key, value in {**cache, LOGITS: logits}.items()
        }

    n_layers = hf_model.config.n_layer

    aliases = {
        key.format(block): ours.format(block, last=f"blocks.{n_layers - 1}")
        for key, ours in BRIDGE_ALIASES.items()
        for block in (f"blocks.{layer}" for layer in range(n_layers))
    }
    return Reference(f"TransformerBridge {version('transformer_lens')}", run, aliases)


def plain_model(cfg: Config, state: State, device: torch.device) -> Any:
    """Return a `TransformerBridge` on `device` that wraps a `GPT2LMHeadModel`."""
    require_bridge()
    hf_model = gpt2_lm_head_model(cfg, state).to(device)
    return bridge_around(hf_model, str(device), hf_model.dtype)


def bridge_around(hf_model: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a `TransformerBridge` on `device` in `dtype` around a `GPT2LMHeadModel`."""
    import tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    # The bridge requires a tokenizer, although our runs pass token ids and no text.
    vocabulary = tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>")
    return TransformerBridge.boot_transformers(
        "openai-community/gpt2",
        hf_model=hf_model,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(vocabulary), eos_token="<|endoftext|>"
        ),
        dtype=dtype,
        device=device,
    )


def masked_with_infinity(scores: Tensor) -> Tensor:
    """Return the scores with −∞ where the bridge has the dtype's lowest finite number."""
    return scores.masked_fill(scores == torch.finfo(scores.dtype).min, -torch.inf)


IMPLEMENTATION = Implementation(
    "bridge", transformer_bridge, plain_model, is_installed, rank=1, read=read
)
