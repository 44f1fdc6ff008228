"""The reference "hooked": the class `HookedTransformer` of transformer_lens 3 and earlier."""

import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
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
    import_package,
    major_version,
)
from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER
from clean_transformer.weights.table import State


def is_installed() -> bool:
    """Whether a version of transformer_lens with `HookedTransformer` is installed."""
    return (major_version("transformer_lens") or 4) < 4


def hooked_transformer(cfg: Config, state: State) -> Reference:
    """Build the reference around a `HookedTransformer` that caches all optional activations."""
    require_installed()
    model = hooked_model(
        cfg,
        state,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_attn_in=True,
        use_hook_mlp_in=True,
    )

    def run(tokens: Int[Tensor, "batch pos"]) -> Mapping[str, Tensor]:
        logits, cache = model.run_with_cache(tokens)
        return {**cache, LOGITS: logits}

    return Reference(f"HookedTransformer {version('transformer_lens')}", run)


def require_installed() -> None:
    """Raise `ReferenceUnavailable` if no version with `HookedTransformer` is installed."""
    import_package("transformer_lens", "hooked")
    if not is_installed():
        raise ReferenceUnavailable(
            f"transformer_lens {version('transformer_lens')} has no HookedTransformer; "
            "install the extra 'hooked' (transformer_lens 3.9.0) in an environment of its own"
        )


def plain_model(cfg: Config, state: State, device: torch.device) -> Any:
    """Return a `HookedTransformer` on `device` with the default settings."""
    require_installed()
    return hooked_model(cfg, state).to(device, print_details=False)


def hooked_model(cfg: Config, state: State, **options: bool) -> Any:
    """Return a `HookedTransformer` on the CPU with the parameters and the dtype of `state`.

    `options` are passed to `HookedTransformerConfig`.
    """
    import transformer_lens

    theirs = transformer_lens.HookedTransformerConfig(
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
        dtype=state["embed.W_E"].dtype,
        device="cpu",
        init_weights=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # version 3.8 deprecates the class
        model = transformer_lens.HookedTransformer(theirs)
    untied = {"unembed.W_U": state["embed.W_E"].T} | dict(state)
    buffers = {
        key: buffer
        for key, buffer in model.state_dict().items()
        if re.fullmatch(HOOKED_TRANSFORMER.buffers, key)
    }
    model.load_state_dict(untied | buffers)
    return model


IMPLEMENTATION = Implementation("hooked", hooked_transformer, plain_model, is_installed, rank=1)
