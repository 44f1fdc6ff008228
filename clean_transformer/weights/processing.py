"""Rewrites of the weights that make a model easier to interpret and keep its log-probabilities.

Each function takes a configuration and a complete state dict and returns both anew. It never
changes the tensors it was given; those that it leaves as they are, the new state shares.

The results equal TransformerLens's bit for bit. That is why a product with a weight is multiplied
and then summed, where a matrix product would round differently. A sum rounds differently in
another memory layout too, so equal bits need equal strides; `untie` gives the unembedding those
that TransformerLens gives it when it converts the published GPT-2. One exception: where d_model
equals d_mlp or d_vocab, TransformerLens (3.9.0 and 4.3.0) takes the wrong axis for d_model and its
`fold_ln` changes the model.

Sources: TransformerLens's `further_comments.md`, and Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits".
"""

import dataclasses
from itertools import compress

from einops import reduce
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.table import State


def untie(cfg: Config, state: State) -> tuple[Config, State]:
    """Give the unembedding its own copy of the transposed embedding, [d_model d_vocab].

    W_U = W_Eᵀ, as the tied model computes already, so the logits are unchanged. A model that is
    not tied is returned as it is.
    """
    if not cfg.tied_unembed:
        return cfg, state
    W_U = state["embed.W_E"].T.clone()
    return dataclasses.replace(cfg, tied_unembed=False), {**state, "unembed.W_U": W_U}


def fold_ln(cfg: Config, state: State) -> tuple[Config, State]:
    """Fold every LayerNorm's gain w and bias b into the weights W and biases c that read it.

    LN(x) = w·x̂ + b, where x̂ is x centered and scaled, so

        LN(x) W + c = x̂ (w[:, None] · W) + (b W + c).

    Moreover x̂ has mean zero over d_model, so each column of the new W may lose its own mean. The
    logits are unchanged.

    W is W_Q, W_K, W_V [head d_model d_head], W_in [d_model d_mlp] or W_U [d_model d_vocab], which
    a tied model gets first (see `untie`). The result has `normalization_type="LNPre"` and no
    LayerNorm parameters. A model that is folded already is returned as it is, which is also what
    TransformerLens does on loading one. Raises `KeyError` for a missing parameter.
    """
    if cfg.normalization_type == "LNPre":
        return cfg, state
    cfg, state = untie(cfg, state)
    folded = dict(state)
    for ln, weights in _readers(cfg).items():
        gain, shift = folded.pop(f"{ln}.w"), folded.pop(f"{ln}.b")
        for weight in weights:
            bias = weight.replace("W_", "b_")
            W, c = state[weight], state[bias]
            folded[weight] = _centered(W * gain[:, None], axis=-2)
            folded[bias] = c + (W * shift[:, None]).sum(-2)
    return dataclasses.replace(cfg, normalization_type="LNPre"), folded


def center_writing_weights(cfg: Config, state: State) -> tuple[Config, State]:
    """Subtract its mean over d_model from everything that is added to the residual stream.

    W ← W − mean(W, d_model), for W_E [d_vocab d_model], W_pos [n_ctx d_model],
    W_O [head d_head d_model], W_out [d_mlp d_model], and b_O, b_out [d_model].

    The stream then has mean zero over d_model. Only LayerNorms read it, and they subtract that
    mean anyway, so the logits are unchanged. A tied model is untied first, for its unembedding
    must keep the means (see `untie`). Raises `KeyError` for a missing parameter.
    """
    cfg, state = untie(cfg, state)
    return cfg, _with_centered(state, _writers(cfg))


def center_unembed(cfg: Config, state: State) -> tuple[Config, State]:
    """Subtract from W_U [d_model d_vocab] and b_U [d_vocab] their means over the vocabulary.

    W_U ← W_U − mean(W_U, d_vocab) and b_U ← b_U − mean(b_U), so that at each position all logits
    shift by one number, which makes their mean zero. The log-probabilities are unchanged; the
    logits are not. A tied model is untied first, for its embedding must keep the mean (see
    `untie`). Raises `KeyError` for a missing parameter.
    """
    cfg, state = untie(cfg, state)
    return cfg, _with_centered(state, ["unembed.W_U", "unembed.b_U"])


def fold_value_biases(cfg: Config, state: State) -> tuple[Config, State]:
    """Move the value biases b_V [head d_head] into the output bias b_O [d_model].

    b_O ← b_O + Σ_head b_V[head] W_O[head] and b_V ← 0.

    Every row of an attention pattern sums to one, so a value bias reaches the output whole
    wherever its head attends, and the logits are unchanged. Raises `KeyError` for a missing
    parameter.
    """
    folded = dict(state)
    for attn in (f"blocks.{layer}.attn" for layer in range(cfg.n_layers)):
        b_V, W_O, b_O = (state[f"{attn}.{name}"] for name in ("b_V", "W_O", "b_O"))
        written = b_V[:, :, None] * W_O
        folded[f"{attn}.b_O"] = b_O + reduce(written, "head d_head d_model -> d_model", "sum")
        folded[f"{attn}.b_V"] = b_V.new_zeros(b_V.shape)
    return cfg, folded


# In TransformerLens's order. `process_weights` cannot say these names: they are its flags' too.
_STEPS = (fold_ln, center_writing_weights, center_unembed, fold_value_biases)


def process_weights(
    cfg: Config,
    state: State,
    *,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
) -> tuple[Config, State]:
    """The weights that TransformerLens's `HookedTransformer` loads with these flags.

    Applies the functions of those names, in that order, to an untied copy (see `untie`); the
    log-probabilities are unchanged but for rounding. Like TransformerLens it computes in float32
    and returns each parameter in its own dtype: float64 weights come out rounded to float32,
    whatever the flags. To process float64 weights in full precision, apply the functions
    themselves.

    Raises `KeyError` for a missing parameter.
    """
    cfg, original = untie(cfg, state)
    processed: State = {name: tensor.float() for name, tensor in original.items()}
    flags = (fold_ln, center_writing_weights, center_unembed, fold_value_biases)
    for step in compress(_STEPS, flags):
        cfg, processed = step(cfg, processed)
    if center_writing_weights and fold_value_biases:
        # The folded value biases were centered by W_O but for rounding; TransformerLens repeats it.
        names = [f"blocks.{layer}.attn.b_O" for layer in range(cfg.n_layers)]
        processed = _with_centered(processed, names)
    return cfg, {name: tensor.to(original[name].dtype) for name, tensor in processed.items()}


def _readers(cfg: Config) -> dict[str, list[str]]:
    """The weights that each LayerNorm's output is multiplied with."""
    block = {"ln1": ["attn.W_Q", "attn.W_K", "attn.W_V"], "ln2": ["mlp.W_in"]}
    blocks = {
        f"blocks.{layer}.{ln}": [f"blocks.{layer}.{weight}" for weight in weights]
        for layer in range(cfg.n_layers)
        for ln, weights in block.items()
    }
    return blocks | {"ln_final": ["unembed.W_U"]}


def _writers(cfg: Config) -> list[str]:
    """The parameters that are added to the residual stream."""
    block = ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
    blocks = [f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in block]
    return ["embed.W_E", "pos_embed.W_pos", *blocks]


def _with_centered(state: State, names: list[str]) -> State:
    """A state dict in which the named tensors have mean zero over their last axis."""
    return {**state, **{name: _centered(state[name], axis=-1) for name in names}}


def _centered(tensor: Tensor, *, axis: int) -> Tensor:
    return tensor - tensor.mean(axis, keepdim=True)
