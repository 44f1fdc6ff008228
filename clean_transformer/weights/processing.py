"""Changes the weights so that a model is easier to interpret. Its log-probabilities stay the same.

Each function takes an architecture and a complete state dict, and returns a new architecture and a
new state dict. No function changes the tensors that it gets. The old and the new state dict share
the tensors that did not change.

The new weights equal the weights that TransformerLens computes, bit for bit. To get equal bits, the
code multiplies elementwise and then sums, as TransformerLens does, because a matrix product would
round differently. There is one exception: if d_model equals d_mlp or d_vocab, TransformerLens
(3.9.0 and 4.3.0) takes the wrong axis for d_model, and its `fold_ln` changes the function that the
model computes.

Sources: TransformerLens's `further_comments.md`, and Elhage et al. 2021, "A Mathematical Framework
for Transformer Circuits".
"""

import dataclasses
from itertools import compress

from einops import reduce
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.shapes import READERS, WRITERS
from clean_transformer.weights.table import State


def untie(cfg: Config, state: State) -> tuple[Config, State]:
    """Return the architecture and the state dict of the untied model.

    A tied model uses W_Eᵀ [d_model d_vocab] as its unembedding. The new architecture has
    `tied_unembed=False`, and the new state dict has the parameter W_U, a copy of W_Eᵀ. The logits
    are unchanged. If the model is not tied, this function returns `cfg` and `state` unchanged.
    """
    if not cfg.tied_unembed:
        return cfg, state
    # The rounding of a sum depends on the memory layout. `clone` keeps the strides of W_Eᵀ, which
    # TransformerLens also gives W_U when it loads the published GPT-2.
    W_U = state["embed.W_E"].T.clone()
    return dataclasses.replace(cfg, tied_unembed=False), {**state, "unembed.W_U": W_U}


def fold_ln(cfg: Config, state: State) -> tuple[Config, State]:
    """Fold the gain w and the bias b of each LayerNorm into the weights W and biases c after it.

    LN(x) = w·x̂ + b, where x̂ is x after centering and scaling. Therefore

        LN(x) W + c = x̂ (w[:, None] · W) + (b W + c).

    x̂ has mean zero over d_model. Therefore x̂ W does not change if we add the same number to all
    entries of a column of W. This function subtracts from each column of the new W the column's
    mean over d_model. The logits are unchanged.

    W is W_Q, W_K or W_V [head d_model d_head], W_in [d_model d_mlp] or W_U [d_model d_vocab]. If
    the model is tied, this function first unties the model (see `untie`). The result has
    `normalization_type="LNPre"` and no LayerNorm parameters. If the LayerNorms are already folded,
    the function returns `cfg` and `state` unchanged, as TransformerLens does. Raises `KeyError` for
    a missing parameter.
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
    """Subtract the mean over d_model from every parameter that writes to the residual stream.

    W ← W − mean(W, d_model), for W_E [d_vocab d_model], W_pos [n_ctx d_model],
    W_O [head d_head d_model], W_out [d_mlp d_model], and b_O, b_out [d_model].

    The residual stream then has mean zero over d_model. Only LayerNorms read the residual stream,
    and each LayerNorm subtracts the mean over d_model anyway, so the logits are unchanged. If the
    model is tied, this function first unties the model (see `untie`), because W_U must not change.
    Raises `KeyError` for a missing parameter.
    """
    cfg, state = untie(cfg, state)
    return cfg, _with_centered(state, _writers(cfg))


def center_unembed(cfg: Config, state: State) -> tuple[Config, State]:
    """Subtract the mean over the vocabulary from W_U [d_model d_vocab] and b_U [d_vocab].

    W_U ← W_U − mean(W_U, d_vocab) and b_U ← b_U − mean(b_U). At each position, all logits are then
    smaller by the same number, their old mean, so their new mean is zero. The logits change, but
    the log-probabilities do not. If the model is tied, this function first unties the model (see
    `untie`), because W_E must not change. Raises `KeyError` for a missing parameter.
    """
    cfg, state = untie(cfg, state)
    return cfg, _with_centered(state, ["unembed.W_U", "unembed.b_U"])


def fold_value_biases(cfg: Config, state: State) -> tuple[Config, State]:
    """Move the value biases b_V [head d_head] into the output bias b_O [d_model].

    b_O ← b_O + Σ_head b_V[head] W_O[head] and b_V ← 0.

    The attention weights of each query sum to one. Therefore the value bias of a head adds the same
    vector to the attention output at every position, just as b_O does. The logits are unchanged.
    Raises `KeyError` for a missing parameter.
    """
    folded = dict(state)
    for attn in (f"blocks.{layer}.attn" for layer in range(cfg.n_layers)):
        b_V, W_O, b_O = (state[f"{attn}.{name}"] for name in ("b_V", "W_O", "b_O"))
        written = b_V[:, :, None] * W_O
        folded[f"{attn}.b_O"] = b_O + reduce(written, "head d_head d_model -> d_model", "sum")
        folded[f"{attn}.b_V"] = b_V.new_zeros(b_V.shape)
    return cfg, folded


# The processing functions, in the order in which TransformerLens applies them. `process_weights`
# takes the functions from this tuple, because inside `process_weights` the names of the functions
# are the names of its arguments.
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
    """Return the weights that TransformerLens's `HookedTransformer` loads with the same flags.

    This function unties the model (see `untie`). Then it calls, in the order of the flags, each
    function whose flag is True. The log-probabilities are unchanged, except for rounding. Like
    TransformerLens, this function computes in float32, and then converts each parameter back to its
    original dtype. So float64 weights lose precision, even if all flags are False. To keep their
    precision, call the four functions one by one.

    Raises `KeyError` for a missing parameter.
    """
    cfg, original = untie(cfg, state)
    processed: State = {name: tensor.float() for name, tensor in original.items()}
    flags = (fold_ln, center_writing_weights, center_unembed, fold_value_biases)
    for step in compress(_STEPS, flags):
        cfg, processed = step(cfg, processed)
    if center_writing_weights and fold_value_biases:
        # Both b_O and W_O were centered before the value biases were added to b_O. So the new b_O
        # has mean zero except for rounding. TransformerLens centers b_O again here, and we do the
        # same, to get equal bits.
        names = [f"blocks.{layer}.attn.b_O" for layer in range(cfg.n_layers)]
        processed = _with_centered(processed, names)
    return cfg, {name: tensor.to(original[name].dtype) for name, tensor in processed.items()}


def _readers(cfg: Config) -> dict[str, list[str]]:
    """Map each LayerNorm's name to the names of the weights that multiply its output."""
    blocks = {
        f"blocks.{layer}.{ln}": [f"blocks.{layer}.{weight}" for weight in weights]
        for layer in range(cfg.n_layers)
        for ln, weights in READERS.items()
    }
    return blocks | {"ln_final": ["unembed.W_U"]}


def _writers(cfg: Config) -> list[str]:
    """Return the names of the parameters that write to the residual stream."""
    blocks = [f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in WRITERS]
    return ["embed.W_E", "pos_embed.W_pos", *blocks]


def _with_centered(state: State, names: list[str]) -> State:
    """Return a copy of `state` in which the tensors `names` have mean 0 over their last axis."""
    return {**state, **{name: _centered(state[name], axis=-1) for name in names}}


def _centered(tensor: Tensor, *, axis: int) -> Tensor:
    return tensor - tensor.mean(axis, keepdim=True)
