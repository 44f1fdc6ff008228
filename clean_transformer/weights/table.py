"""`Format`: a checkpoint format as a table of rows, which reads and writes state dicts."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.hub import FileSets
from clean_transformer.weights.rows import Row, write_rows
from clean_transformer.weights.shapes import parameter_axes, parameter_shapes

State = Mapping[str, Tensor]  # a state dict


class WeightsError(ValueError):
    """A checkpoint cannot be read, or a format cannot hold a model."""


@dataclass(frozen=True)
class Folder:
    """How a format is stored in a folder.

    A folder holds the format if it has every file of one of the `file_sets`. The first file of each
    set describes the architecture. If a folder holds several formats, the one with the highest
    `priority` is read. `read` returns the architecture, and the tensors under the format's names.
    """

    file_sets: FileSets
    read: Callable[[Path], tuple[Config, State]]
    priority: int


@dataclass(frozen=True)
class File:
    """How a format is stored in a single file, which is recognized by its suffix.

    `read` returns the tensors, and the architecture if the file describes it. The tensors may
    have the names of any format.
    """

    suffix: str
    read: Callable[[Path], tuple[Config | None, State]]


@dataclass(frozen=True)
class Format:
    """How a family of checkpoints names and lays out GPT-2's parameters.

    `outer` has the rows of the parameters outside of the blocks. `block` has the rows of one block.
    The names in `block` lack the prefix: `blocks.{layer}.` for our names and `block_prefix` for
    theirs.

    Every checkpoint of the format has the key `marker`. If several formats share a marker, `layout`
    tells whether the tensors have this format's layout. In some checkpoints, the names lack
    `optional_prefix`. Keys that match the pattern `buffers` are not parameters and are ignored.

    `folder` and `file` say how the format is stored on disk. They are None if it is not.
    """

    name: str
    marker: str
    outer: tuple[Row, ...]
    block: tuple[Row, ...]
    block_prefix: str
    optional_prefix: str = ""
    buffers: str = r"(?!)"
    layout: Callable[[State], bool] = lambda state: True
    folder: Folder | None = None
    file: File | None = None

    def full_names(self, state: State) -> dict[str, Tensor]:
        """Return the state dict, with `optional_prefix` added if its names lack it."""
        short_marker = self.marker.removeprefix(self.optional_prefix)
        if self.marker in state or short_marker not in state:
            return dict(state)
        never = {row.theirs for row in self.outer if not self._is_prefixed(row)}
        return {
            key if key in never else self.optional_prefix + key: tensor
            for key, tensor in state.items()
        }

    def _is_prefixed(self, row: Row) -> bool:
        return row.theirs is not None and row.theirs.startswith(self.optional_prefix)

    def fits(self, state: State) -> bool:
        """Whether a state dict has this format. Its marker and its layout must match."""
        named = self.full_names(state)
        return self.marker in named and self.layout(named)

    def rows(self, cfg: Config) -> list[Row]:
        """Return one row for each parameter of the architecture.

        Raises `WeightsError` if the format has no place for a parameter.
        """
        rows = {row.ours: row for row in self.all_rows(cfg.n_layers)}
        names = parameter_axes(cfg)
        if missing := [name for name in names if name not in rows]:
            raise WeightsError(f"the {self.name} format has no place for {', '.join(missing)}")
        return [row for name, row in rows.items() if name in names]

    def all_rows(self, n_layers: int) -> list[Row]:
        """Return all rows for this number of layers, also of parameters that a model may lack."""
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
        """Return our parameters, as views of the tensors in the state dict.

        Raises `WeightsError` if tensors are missing, unused, or of the wrong shape. The error lists
        them all.
        """
        rows, axes = self.rows(cfg), parameter_axes(cfg)
        wanted = {row.theirs: row.their_shape(axes[row.ours], cfg) for row in rows if row.theirs}
        # Even if the unembedding is tied, a checkpoint may store a copy of the embedding under the
        # unembedding's name.
        repeated = {row.theirs for row in self.outer if row.ours == "unembed.W_U"}
        refuse_differences(
            f"this is not a complete {self.name} state dict",
            wanted,
            {
                key: tuple(tensor.shape)
                for key, tensor in state.items()
                if key in wanted or not (key in repeated or re.fullmatch(self.buffers, key))
            },
        )
        if cfg.tied_unembed and not self.is_tied(state):
            raise WeightsError(
                f"this {self.name} state dict has its own unembedding, but the architecture "
                "uses the embedding as the unembedding; set tied_unembed (in config.json: "
                "tie_word_embeddings) to false"
            )
        like, shapes = next(iter(state.values())), parameter_shapes(cfg)
        return {
            row.ours: row.read(state[row.theirs], cfg)
            if row.theirs is not None
            else like.new_zeros(shapes[row.ours])
            for row in rows
        }

    def write(self, cfg: Config, state: State) -> dict[str, Tensor]:
        """Return the format's tensors, contiguous, given a state dict of our parameters.

        Raises `WeightsError` if a parameter is not zero and the format has no place for it.
        """
        rows_of: dict[str, list[tuple[Row, Tensor]]] = {}
        for row in self.rows(cfg):
            if row.theirs is not None:
                rows_of.setdefault(row.theirs, []).append((row, state[row.ours]))
            elif state[row.ours].count_nonzero():
                raise WeightsError(
                    f"the {self.name} format has no place for {row.ours}, which is not zero"
                )
        return {theirs: write_rows(rows, cfg) for theirs, rows in rows_of.items()}

    def is_tied(self, state: State) -> bool:
        """Whether the state dict uses the embedding as the unembedding."""
        rows = {row.ours: row for row in self.outer}
        embed, unembed = rows["embed.W_E"], rows.get("unembed.W_U")
        if unembed is None or unembed.theirs not in state:
            return True
        # HookedTransformer always has a separate W_U with our axes, so its row has no pattern. In
        # the other formats, an unembedding that equals the embedding is tied.
        repeats = torch.equal(state[str(embed.theirs)], state[str(unembed.theirs)])
        return unembed.pattern is not None and repeats


def detect(formats: Iterable[Format], state: State) -> Format:
    """Return the format of a state dict. Raises `WeightsError` unless exactly one format fits."""
    fitting = [known for known in formats if known.fits(state)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(known.name for known in fitting or formats)
    raise WeightsError(
        f"this is a state dict of {'several' if fitting else 'none of the'} known formats "
        f"({names}); its first keys are {[*state][:3]}"
    )


def refuse_differences(
    problem: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `WeightsError` if tensors are missing, unused, or of the wrong shape.

    `wanted` and `given` hold the shapes by key. The error begins with `problem` and lists all
    differences.
    """
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
    """Return d_head of plain GPT-2. Raises `WeightsError` unless n_heads divides d_model."""
    if not n_heads or d_model % n_heads:
        raise WeightsError(f"{file}: n_embd {d_model} is not a multiple of {n_heads} heads")
    return d_model // n_heads
