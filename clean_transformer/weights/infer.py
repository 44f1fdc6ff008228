"""Infers the architecture of a state dict from the shapes of its tensors."""

import re
import warnings

from clean_transformer.config import PUBLISHED, Config
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.rows import Row
from clean_transformer.weights.shapes import parameter_axes
from clean_transformer.weights.table import Format, State


def infer_config(known: Format, state: State) -> Config:
    """Return the architecture of `state`, a state dict in the format `known`.

    A state dict does not contain eps (the small number in the LayerNorms), so the result has
    GPT-2's eps of 1e-5. Most formats merge the axes `head` and `d_head` into one axis, so the
    shapes do not show the number of heads. For such a format, this function assumes the number of
    heads of the published GPT-2 that has the same d_model. It warns about what it assumed.

    Raises `WeightsError` if the number of heads is unknown because no published GPT-2 has this
    d_model, or if the state dict lacks a tensor whose shape is necessary.
    """
    n_layers = _count_layers(known, state)
    rows = [row for row in known.all_rows(n_layers) if row.theirs in state]
    folded = not any(".ln1." in row.ours for row in rows)
    lengths = _axis_lengths(rows, n_layers, state)
    assumed = "does not show eps; assuming GPT-2's eps of 1e-5"
    if "head" not in lengths:
        lengths |= _published_heads(known, lengths.get("d_model", 0))
        assumed = (
            f"shows neither the number of heads nor eps; assuming {lengths['head']} heads, as in "
            f"the published GPT-2 with d_model {lengths['d_model']}, and eps 1e-5"
        )
    warnings.warn(
        f"a {known.name} state dict {assumed}. For a model with others, call "
        "from_state_dict(state, cfg=Config(...)).",
        stacklevel=5,  # the warning shows the line that calls from_state_dict
    )
    missing = {"d_vocab", "n_ctx", "d_model", "d_mlp"} - set(lengths)
    if missing:
        raise WeightsError(
            f"this {known.name} state dict lacks the tensors whose shapes show {sorted(missing)}"
        )
    return Config(
        n_layers=n_layers,
        n_heads=lengths.pop("head"),
        **lengths,
        normalization_type="LNPre" if folded else "LN",
        tied_unembed=known.is_tied(state) and not folded,
    )


def _count_layers(known: Format, state: State) -> int:
    block = re.escape(known.block_prefix).replace(r"\{layer\}", r"(\d+)")
    layers = {match[1] for key in state if (match := re.match(block, key))}
    if not layers:
        raise WeightsError(f"this {known.name} state dict has no blocks")
    return len(layers)


def _axis_lengths(rows: list[Row], n_layers: int, state: State) -> dict[str, int]:
    """Return the length of each axis by name, except for axes that the format merges into one."""
    axes = parameter_axes(Config.gpt2("small", n_layers=n_layers, tied_unembed=False))
    lengths: dict[str, int] = {}
    for row in rows:
        lengths |= zip(row.their_axes(axes[row.ours]), state[str(row.theirs)].shape, strict=False)
    return {axis: length for axis, length in lengths.items() if axis.isidentifier()}


def _published_heads(known: Format, d_model: int) -> dict[str, int]:
    for _, n_heads, width in PUBLISHED.values():
        if width == d_model:
            return {"head": n_heads, "d_head": d_model // n_heads}
    raise WeightsError(
        f"the shapes of a {known.name} state dict do not show the number of heads, and no "
        f"published GPT-2 has d_model {d_model}; pass cfg=Config(...) to from_state_dict"
    )
