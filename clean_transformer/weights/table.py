"""Translating state dicts: a format is a table of rows, and this applies the rows both ways."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from clean_transformer.config import PUBLISHED, Config
from clean_transformer.weights.shapes import parameter_axes, parameter_shapes

State = Mapping[str, Tensor]


AXIS = r"[a-z]\w*"  # the name of one in an einops pattern, whose 1 is an axis without a name


class WeightsError(ValueError):
    """A state dict or checkpoint that cannot be read, or a model that a format cannot hold."""


@dataclass(frozen=True)
class Row:
    """One of our parameters and where the other format keeps it.

    `pattern` is the einops pattern from their tensor to ours (none: the same axes); where their
    tensor holds several of ours, `part` is the index along the pattern's first axis. `theirs` is
    None for a parameter that the format does not have, which is then zero.
    """

    ours: str
    theirs: str | None
    pattern: str | None = None
    part: int | None = None


@dataclass(frozen=True)
class Format:
    """How a family of checkpoints names and lays out GPT-2's parameters.

    `block` rows are for one layer; their names follow `blocks.{layer}.` and `block_prefix`.
    `marker` is a key that every such checkpoint has; where another format has it too, `layout`
    tells them apart. Keys that match `buffers` are not weights, and are passed over.
    """

    name: str
    marker: str
    outer: tuple[Row, ...]
    block: tuple[Row, ...]
    block_prefix: str
    buffers: str = r"(?!)"
    layout: Callable[[State], bool] = lambda state: True

    def rows(self, cfg: Config) -> list[Row]:
        """A row for each parameter of the architecture.

        Raises `WeightsError` for one that the format has no place for.
        """
        rows = {row.ours: row for row in self._all_rows(cfg.n_layers)}
        names = parameter_axes(cfg)
        if missing := [name for name in names if name not in rows]:
            raise WeightsError(f"the {self.name} format has no place for {', '.join(missing)}")
        return [row for name, row in rows.items() if name in names]

    def _all_rows(self, n_layers: int) -> list[Row]:
        blocks = [
            replace(
                row,
                ours=f"blocks.{layer}.{row.ours}",
                theirs=row.theirs and self.block_prefix.format(layer=layer) + row.theirs,
            )
            for layer in range(n_layers)
            for row in self.block
        ]
        return [*self.outer, *blocks]

    def read(self, cfg: Config, state: State) -> dict[str, Tensor]:
        """Our parameters, as views of theirs.

        Raises `WeightsError` with every missing, unused and misshapen key.
        """
        rows, shapes = self.rows(cfg), parameter_shapes(cfg)
        wanted = {row.theirs: _their_shape(row, cfg, shapes) for row in rows if row.theirs}
        # A tied unembedding may stand in the checkpoint as well as the embedding.
        known = {row.theirs for row in self._all_rows(cfg.n_layers) if row.ours == "unembed.W_U"}
        refuse_differences(
            f"this is not a complete {self.name} state dict",
            wanted,
            {
                key: tuple(tensor.shape)
                for key, tensor in state.items()
                if key in wanted or not (key in known or re.fullmatch(self.buffers, key))
            },
        )
        if cfg.tied_unembed and not self.is_tied(state):
            raise WeightsError(
                f"this {self.name} state dict has an unembedding of its own, but the architecture "
                "ties it to the embedding; set tied_unembed (tie_word_embeddings) to false"
            )
        like = next(iter(state.values()))
        return {
            row.ours: _ours(row, state[row.theirs], cfg)
            if row.theirs is not None
            else like.new_zeros(shapes[row.ours])
            for row in rows
        }

    def write(self, cfg: Config, state: State) -> dict[str, Tensor]:
        """Their tensors, contiguous. Raises `WeightsError` for what the format has no place for."""
        parts: dict[str, list[tuple[Row, Tensor]]] = {}
        for row in self.rows(cfg):
            if row.theirs is not None:
                parts.setdefault(row.theirs, []).append((row, state[row.ours]))
            elif state[row.ours].count_nonzero():
                raise WeightsError(
                    f"the {self.name} format has no place for {row.ours}, which is not zero"
                )
        return {theirs: _theirs(rows, cfg) for theirs, rows in parts.items()}

    def infer_config(self, state: State) -> Config:
        """The architecture that the shapes tell of.

        Raises `WeightsError` where they cannot: a format that merges the heads does not say how
        many there are, unless the width is a published one.
        """
        block = re.escape(self.block_prefix).replace(r"\{layer\}", r"(\d+)")
        layers = {match[1] for key in state if (match := re.match(block, key))}
        if not layers:
            raise WeightsError(f"this {self.name} state dict has no blocks")
        rows = {row.ours: row for row in self._all_rows(len(layers))}
        folded = not any(row.theirs in state for row in rows.values() if ".ln1." in row.ours)
        any_heads = Config.gpt2("small", n_layers=len(layers), tied_unembed=False)
        axes = parameter_axes(any_heads)
        lengths: dict[str, int] = {}
        for name, row in rows.items():
            if row.theirs is not None and row.theirs in state:
                their_axes = _their_axes(row, axes[name])
                lengths |= zip(their_axes, state[row.theirs].shape, strict=False)
        lengths = {axis: length for axis, length in lengths.items() if axis.isidentifier()}
        if "head" not in lengths:
            heads = {width: n_heads for _, n_heads, width in PUBLISHED.values()}
            width = lengths.get("d_model", 0)
            if width not in heads:
                raise WeightsError(
                    f"a {self.name} state dict does not say how many heads it has, and d_model "
                    f"{width} is not a published width; pass cfg=Config(...) to from_state_dict"
                )
            lengths |= {"head": heads[width], "d_head": width // heads[width]}
        missing = {"d_vocab", "n_ctx", "d_model", "d_mlp"} - set(lengths)
        if missing:
            raise WeightsError(
                f"this {self.name} state dict lacks the tensors that tell {sorted(missing)}"
            )
        return Config(
            n_layers=len(layers),
            n_heads=lengths.pop("head"),
            **lengths,
            normalization_type="LNPre" if folded else "LN",
            tied_unembed=self.is_tied(state) and not folded,
        )

    def is_tied(self, state: State) -> bool:
        """Whether the state dict has no unembedding of its own."""
        rows = {row.ours: row for row in self.outer}
        embed, unembed = rows["embed.W_E"], rows.get("unembed.W_U")
        if unembed is None or unembed.theirs not in state:
            return True
        # HookedTransformer's own W_U is a parameter of its own, whatever it was loaded from; in the
        # checkpoint's axes, an unembedding that repeats the embedding is the tied one.
        repeats = torch.equal(state[str(embed.theirs)], state[str(unembed.theirs)])
        return unembed.pattern is not None and repeats


def refuse_differences(
    problem: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `WeightsError` with every key that is missing, unused or misshapen, if any is."""
    misshapen = [
        f"{key} {given[key]} instead of {shape}"
        for key, shape in wanted.items()
        if key in given and given[key] != shape
    ]
    differences = {
        "missing": [key for key in wanted if key not in given],
        "unused": [key for key in given if key not in wanted],
        "misshapen": misshapen,
    }
    if any(differences.values()):
        lists = (f"{kind}: {', '.join(keys)}" for kind, keys in differences.items() if keys)
        raise WeightsError(f"{problem}; {'; '.join(lists)}")


def refuse_architecture(name: str, cfg: Config) -> None:
    """Raise `WeightsError` for an architecture that files of plain GPT-2 cannot describe."""
    if cfg.normalization_type != "LN":
        raise WeightsError(f"the {name} format has no place for folded LayerNorms")
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        raise WeightsError(
            f"the {name} format needs n_heads × d_head = d_model, "
            f"not {cfg.n_heads} × {cfg.d_head} = {cfg.d_model}"
        )


def head_width(file: str, d_model: int, n_heads: int) -> int:
    """The d_head of a file of plain GPT-2. Raises `WeightsError` for heads that do not fit."""
    if not n_heads or d_model % n_heads:
        raise WeightsError(f"{file}: n_embd {d_model} is not a multiple of {n_heads} heads")
    return d_model // n_heads


def detect(formats: Iterable[Format], state: State) -> Format:
    """The first format whose marker is among the keys, if the layout is its own too.

    Raises `WeightsError` for a foreign checkpoint.
    """
    for known in formats:
        if known.marker in state and known.layout(state):
            return known
    names = ", ".join(known.name for known in formats)
    raise WeightsError(
        f"not a GPT-2 state dict that is known here ({names}); its keys begin {[*state][:3]}"
    )


def _lengths(pattern: str, cfg: Config) -> dict[str, int]:
    axes = cfg.axes() | {"qkv": 3}
    return {axis: axes[axis] for axis in re.findall(AXIS, pattern.split("->")[0])}


def _their_axes(row: Row, our_axes: str) -> list[str]:
    """Their tensor's axes by name, and in brackets those that they merge into one."""
    return re.findall(r"\([^)]*\)|\w+", (row.pattern or our_axes).split("->")[0])


def _their_shape(row: Row, cfg: Config, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if row.pattern is None:
        return shapes[row.ours]
    lengths = _lengths(row.pattern, cfg)
    return tuple(
        math.prod(lengths[axis] for axis in re.findall(AXIS, group))
        for group in _their_axes(row, "")
    )


def _ours(row: Row, tensor: Tensor, cfg: Config) -> Tensor:
    if row.pattern is None:
        return tensor
    ours = rearrange(tensor, row.pattern, **_lengths(row.pattern, cfg))
    return ours if row.part is None else ours[row.part]


def _theirs(rows: list[tuple[Row, Tensor]], cfg: Config) -> Tensor:
    (row, tensor), *_ = rows
    if row.part is not None:
        in_order = sorted(rows, key=lambda entry: entry[0].part or 0)
        tensor = torch.stack([part for _, part in in_order])
    if row.pattern is not None:
        theirs, ours = row.pattern.split("->")
        tensor = rearrange(tensor, f"{ours} -> {theirs}", **_lengths(row.pattern, cfg))
    return tensor.contiguous()
