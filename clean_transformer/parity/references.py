"""Other implementations of GPT-2, given our weights, with their activations under our names.

The only module that imports `transformer_lens` or `transformers`.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.weights.hooked_transformer import HOOKED_TRANSFORMER
from clean_transformer.weights.huggingface import HUGGINGFACE, config_to_json
from clean_transformer.weights.table import State, WeightsError

# What is compared besides hook points and the outputs of submodules.
TOKENS, POSITIONS, LOGITS = "tokens", "positions", "logits"

Shows = Callable[[Any, Any], dict[str, Tensor]]

# What `TransformerBridge` calls the same place, besides TransformerLens's names; `{}` is
# each block's path, `{last}` the last one's.
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


class ReferenceUnavailable(RuntimeError):
    """The reference is not installed, or cannot hold this model."""


@dataclass(frozen=True)
class Reference:
    """Another implementation of the same function.

    `run` gives every activation that it caches, by its own key. A key is one of our own names (a
    hook point, a submodule for its output, "tokens", "positions", "logits") or, in `aliases`, it
    says which of them it is.
    """

    title: str
    run: Callable[[Int[Tensor, "batch pos"]], Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)


def hooked_transformer(cfg: Config, state: State) -> Reference:
    """`HookedTransformer` of transformer_lens before 4, with every optional activation."""
    _import("transformer_lens", "the extra 'hooked'")
    if _major_version() >= 4:
        raise ReferenceUnavailable(
            f"transformer_lens {version('transformer_lens')} has no HookedTransformer; "
            "install the extra 'hooked' (transformer_lens 3.9.0) in an environment of its own"
        )
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


def hooked_model(cfg: Config, state: State, **options: bool) -> Any:
    """A `HookedTransformer` with our parameters, in their dtype, on the CPU."""
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
        warnings.simplefilter("ignore", DeprecationWarning)  # of the whole class, since 3.8
        model = transformer_lens.HookedTransformer(theirs)
    untied = {"unembed.W_U": state["embed.W_E"].T} | dict(state)
    buffers = {
        key: buffer
        for key, buffer in model.state_dict().items()
        if re.fullmatch(HOOKED_TRANSFORMER.buffers, key)
    }
    model.load_state_dict(untied | buffers)
    return model


def transformer_bridge(cfg: Config, state: State) -> Reference:
    """`TransformerBridge` of transformer_lens 4, around Hugging Face's model."""
    _import("transformer_lens", "the extra 'bridge'")
    if _major_version() < 4:
        raise ReferenceUnavailable(
            f"transformer_lens {version('transformer_lens')} is not the TransformerBridge of 4.x; "
            "install the extra 'bridge'"
        )
    import tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    hf_model = _gpt2_lm_head_model(cfg, state)
    # The bridge insists on a tokenizer; it never reads a text here.
    vocabulary = tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>")
    bridge = TransformerBridge.boot_transformers(
        "openai-community/gpt2",
        hf_model=hf_model,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(vocabulary), eos_token="<|endoftext|>"
        ),
        dtype=state["embed.W_E"].dtype,
        device="cpu",
    )

    def run(tokens: Int[Tensor, "batch pos"]) -> Mapping[str, Tensor]:
        logits, cache = bridge.run_with_cache(tokens)
        return {
            # It masks the scores with the lowest finite number.
            key: _masked_with_infinity(value) if key.endswith("hook_attn_scores") else value
            for key, value in {**cache, LOGITS: logits}.items()
        }

    aliases = {
        key.format(block): ours.format(block, last=f"blocks.{cfg.n_layers - 1}")
        for key, ours in BRIDGE_ALIASES.items()
        for block in (f"blocks.{layer}" for layer in range(cfg.n_layers))
    }
    return Reference(f"TransformerBridge {version('transformer_lens')}", run, aliases)


def huggingface(cfg: Config, state: State) -> Reference:
    """`GPT2LMHeadModel` of transformers, with the eager attention, watched from outside."""
    _import("transformers", "the extra 'bridge'")
    model = _gpt2_lm_head_model(cfg, state)

    def heads(merged: Tensor) -> Tensor:
        return rearrange(merged, "... (head d_head) -> ... head d_head", head=cfg.n_heads)

    # What a call of each module, given its first input and its output, shows under our names.
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
        # It adds one row of positions to every input of the batch.
        seen["hook_pos_embed"] = seen["hook_pos_embed"].expand_as(seen["hook_embed"])
        return seen

    return Reference(f"GPT2LMHeadModel {version('transformers')}", run)


REFERENCES = {
    "bridge": transformer_bridge,
    "hooked": hooked_transformer,
    "huggingface": huggingface,
}


def choose_reference(name: str) -> tuple[str | None, str]:
    """The reference of that name, or None with the reason; "auto" takes the one installed.

    Raises `ValueError` for a name that is no reference.
    """
    if name == "none":
        return None, "no reference was asked for"
    if name != "auto":
        if name not in REFERENCES:
            raise ValueError(f"no reference {name!r}; choose from auto, none, {[*REFERENCES]}")
        return name, ""
    try:
        return ("bridge" if _major_version() >= 4 else "hooked"), ""
    except PackageNotFoundError:
        pass
    if find_spec("transformers"):
        return "huggingface", ""
    return None, "no reference is installed; install the extra 'bridge'"


def _major_version() -> int:
    return int(version("transformer_lens").split(".")[0])


def _gpt2_lm_head_model(cfg: Config, state: State) -> Any:
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
                attn_implementation="eager",
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


def _masked_with_infinity(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores == torch.finfo(scores.dtype).min, -torch.inf)


def _import(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is installed, and something that it needs is not
            raise
        raise ReferenceUnavailable(f"{package} is not installed; install {extra}") from None
