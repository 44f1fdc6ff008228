"""TODO parity/references/transformer_bridge."""

from collections.abc import Mapping
from importlib.metadata import version

from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.parity.references.base import (
    LOGITS,
    POSITIONS,
    TOKENS,
    Reference,
    ReferenceUnavailable,
    _import,
    _major_version,
)
from clean_transformer.parity.references.huggingface import (
    _gpt2_lm_head_model,
    _masked_with_infinity,
)
from clean_transformer.weights.table import State

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
