"""Runs `HookedTransformer`, of transformer_lens 3 and earlier, with our weights."""

import re
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
    Implementation,
    Reference,
    ReferenceUnavailable,
    everything,
    import_package,
    major_version,
)
from clean_transformer.parity.references.huggingface import read_gpt2_lm_head_model
from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER
from clean_transformer.weights.table import State

# Options of `HookedTransformer`, with which the model also computes its optional activations.
OPTIONAL = {
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_attn_in": True,
    "use_hook_mlp_in": True,
}


def is_installed() -> bool:
    """Whether a version of transformer_lens with `HookedTransformer` is installed."""
    return (major_version("transformer_lens") or 4) < 4


def hooked_transformer(cfg: Config, state: State) -> Reference:
    """Return a `Reference` that runs a `HookedTransformer` with the parameters of `state`.

    The model also caches activations that are off by default, such as `hook_result`.
    """
    require_hooked()
    return watched_model(hooked_model(cfg, state, **OPTIONAL))


def read(folder: Path) -> Reference:
    """Return a `Reference` that runs a `HookedTransformer` with the weights in `folder`.

    transformers reads the files as a `GPT2LMHeadModel`, and TransformerLens converts its weights,
    as `HookedTransformer.from_pretrained` does for published models.
    """
    require_hooked()
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf_model = read_gpt2_lm_head_model(folder)
    fields = hf_model.config
    model = empty_model(
        torch.float64,
        n_layers=fields.n_layer,
        n_heads=fields.n_head,
        d_model=fields.n_embd,
        d_head=fields.n_embd // fields.n_head,
        d_mlp=fields.n_inner or 4 * fields.n_embd,
        d_vocab=fields.vocab_size,
        n_ctx=fields.n_positions,
        eps=fields.layer_norm_epsilon,
        act_fn=fields.activation_function,
        **OPTIONAL,
    )
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf_model, model.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return watched_model(model)


def require_hooked() -> None:
    """Raise `ReferenceUnavailable` if the installed packages have no `HookedTransformer`."""
    import_package("transformer_lens", "hooked")
    if not is_installed():
        raise ReferenceUnavailable(
            f"transformer_lens {version('transformer_lens')} has no HookedTransformer; "
            "install the extra 'hooked' (transformer_lens 3.9.0) in an environment of its own"
        )


def watched_model(model: Any) -> Reference:
    """Return a `Reference` that runs `model`, a `HookedTransformer`."""

    def run(
        tokens: Int[Tensor, "batch pos"], keep: Callable[[str], bool] = everything
    ) -> Mapping[str, Tensor]:
        logits, cache = model.run_with_cache(tokens, names_filter=keep)
        return {**cache, LOGITS: logits}

    return Reference(f"HookedTransformer {version('transformer_lens')}", run)


def plain_model(cfg: Config, state: State, device: torch.device) -> Any:
    """Return a `HookedTransformer` on `device` with the weights `state` and default settings."""
    require_hooked()
    return hooked_model(cfg, state).to(device, print_details=False)


def hooked_model(cfg: Config, state: State, **options: bool) -> Any:
    """Return a `HookedTransformer` on the CPU with the parameters and the dtype of `state`.

    `options` are passed to `HookedTransformerConfig`.
    """
    model = empty_model(
        state["embed.W_E"].dtype,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        eps=cfg.eps,
        act_fn="gelu_new",
        normalization_type=cfg.normalization_type,
        **options,
    )
    untied = {"unembed.W_U": state["embed.W_E"].T} | dict(state)
    buffers = {
        key: buffer
        for key, buffer in model.state_dict().items()
        if re.fullmatch(HOOKED_TRANSFORMER.buffers, key)
    }
    model.load_state_dict(untied | buffers)
    return model


def empty_model(dtype: torch.dtype, **fields: Any) -> Any:
    """Return a `HookedTransformer` on the CPU without weights.

    `fields` are passed to `HookedTransformerConfig`.
    """
    import transformer_lens

    fields = {"normalization_type": "LN", **fields}
    cfg = transformer_lens.HookedTransformerConfig(
        dtype=dtype, device="cpu", init_weights=False, **fields
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # version 3.8 deprecates the class
        return transformer_lens.HookedTransformer(cfg)


IMPLEMENTATION = Implementation(
    "hooked", hooked_transformer, plain_model, is_installed, rank=1, read=read
)
