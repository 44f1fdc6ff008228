"""Defines `Format`, which reads and writes the state dicts of one checkpoint format.

A `Format` has a table with one `Row` for each parameter.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.hub import FileSets
from clean_transformer.weights.refusals import (
    WeightsError,
    refuse_differences,
    refuse_other_kinds,
)
from clean_transformer.weights.rows import Row, write_rows
from clean_transformer.weights.shapes import parameter_axes, parameter_shapes

State = Mapping[str, Tensor]  # a state dict


# Prefixes that other software adds to parameter names: PyTorch's DataParallel and torch.compile,
# Opacus, DeepSpeed, PyTorch Lightning and scripts that keep the model in an attribute `model`.
PREFIXES = re.compile(r"(?:^|(?<=\.))(?:_?module|_orig_mod|_forward_module|model)\.")


@dataclass(frozen=True)
class Folder:
    """Describes how a format is stored in a folder.

    A folder contains the format if the folder has every file of one set in `file_sets`. The first
    file of each set describes the architecture. If a folder contains several formats, we read the
    format with the highest `priority`. `read` takes the path of the folder. It returns the
    architecture, and the tensors under the format's names.
    """

    file_sets: FileSets
    read: Callable[[Path], tuple[Config, State]]
    priority: int


@dataclass(frozen=True)
class File:
    """Describes how a format is stored in a single file with one of the `suffixes`.

    `read` takes the path of the file, and returns a pair. The first item is the architecture, or
    None if the file does not describe the architecture. The second item is the state dict, whose
    keys may be the names of any format.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Path], tuple[Config | None, State]]


@dataclass(frozen=True)
class Format:
    """Describes the names and the layout of GPT-2's parameters in one checkpoint format.

    "Our" parameters have this package's names and axes, and "their" tensors have the names and axes
    of the checkpoint format. `outer` has one `Row` for each parameter outside of the blocks.
    `block` has one `Row` for each parameter of a block. The names in `block` do not contain the
    number of the block. The method `all_rows` adds a prefix with this number: `blocks.{layer}.` to
    our names, and `block_prefix` to their names.

    Every checkpoint of the format has the key `marker`. If several formats have the same marker,
    the function `layout` distinguishes the formats: it takes a state dict, and returns whether the
    tensors have this format's layout. `optional_prefix` is a prefix of their names that some
    checkpoints leave out. We ignore tensors whose keys match the regular expression `buffers`,
    because these tensors are not parameters.

    `folder` is None if the format is never stored in a folder. `file` is None if the format is
    never stored in a single file.
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
        """Return a copy of `state`, in which `optional_prefix` is added to keys that lack it."""
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
        """Return whether `state` has this format: the key `marker` and the right `layout`."""
        named = self.full_names(state)
        return self.marker in named and self.layout(named)

    def rows(self, cfg: Config) -> list[Row]:
        """Return one `Row` for each parameter of the architecture `cfg`.

        Raises `WeightsError` if the format has no place for a parameter.
        """
        rows = {row.ours: row for row in self.all_rows(cfg.n_layers)}
        names = parameter_axes(cfg)
        if missing := [name for name in names if name not in rows]:
            raise WeightsError(f"the {self.name} format has no place for {', '.join(missing)}")
        return [row for name, row in rows.items() if name in names]

    def all_rows(self, n_layers: int) -> list[Row]:
        """Return one `Row` for each parameter that a model with `n_layers` blocks can have.

        The names contain the numbers of the blocks. A model may lack some of these parameters: for
        example, a tied model (see `is_tied`) has no `unembed.W_U`.
        """
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
        """Return our parameters, by our names, as views of the tensors in the state dict.

        `state` has their tensors under their full names (see `full_names`). If the format does not
        store a parameter, the result has a tensor of zeros for the parameter. Raises `WeightsError`
        if tensors are missing, unused, or of the wrong shape or dtype. Also raises `WeightsError`
        if `cfg.tied_unembed` is True, but the state dict is not tied (see `is_tied`).
        """
        # This comes first, because the rows of many layers take memory. A few more layers than the
        # tensors can have are no danger, and are told below by the names of the missing tensors.
        if cfg.n_layers > len(state) + 1000:
            raise WeightsError(
                f"the architecture has {cfg.n_layers} layers, but this {self.name} state dict has "
                f"only {len(state)} tensors"
            )
        rows, axes = self.rows(cfg), parameter_axes(cfg)
        wanted = {row.theirs: row.their_shape(axes[row.ours], cfg) for row in rows if row.theirs}
        # Even if the unembedding is tied, a checkpoint may store a copy of the embedding under the
        # unembedding's name. We do not report this copy as unused.
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
        refuse_other_kinds({key: state[key] for key in wanted})
        if cfg.tied_unembed and not self.is_tied(state):
            raise WeightsError(
                f"this {self.name} state dict has its own unembedding, which differs from the "
                "embedding, but the architecture "
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
        """Convert our parameters to the format's tensors, and return the tensors by their names.

        `state` has our parameters under our names. The returned tensors are contiguous. Raises
        `WeightsError` if the format has no place for a parameter that is not zero.
        """
        rows_of: dict[str, list[tuple[Row, Tensor]]] = {}
        for row in self.rows(cfg):
            if row.theirs is not None:
                rows_of.setdefault(row.theirs, []).append((row, state[row.ours]))
            elif state[row.ours].count_nonzero():
                raise WeightsError(
                    f"the {self.name} format has no place for {row.ours}, which is not zero. GPT-2 "
                    "has no such parameter: if an optimizer of yours trained it, leave it out of "
                    "the optimizer. To keep it, torch.save(model.state_dict(), 'model.pt')"
                )
        return {theirs: write_rows(rows, cfg) for theirs, rows in rows_of.items()}

    def is_tied(self, state: State) -> bool:
        """Return whether the model is tied: it uses its embedding as its unembedding, too.

        `state` has their tensors under their full names. A model is tied if `state` has no
        unembedding. A model whose unembedding equals its embedding is also tied, except in
        HookedTransformer's format.
        """
        rows = {row.ours: row for row in self.outer}
        embed, unembed = rows["embed.W_E"], rows.get("unembed.W_U")
        if unembed is None or unembed.theirs not in state:
            return True
        # In HookedTransformer's format, W_U is always a separate parameter, so the result is False.
        # We recognize this format by its row for W_U, because no other format has a row for W_U
        # without a pattern.
        if unembed.pattern is None:
            return False
        return _equal(state[str(embed.theirs)], state[str(unembed.theirs)])


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal. NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if torch.equal(one, other):
        return True
    return bool(one.isnan().any()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def plain_names(state: State) -> dict[str, Tensor]:
    """Return a copy of `state` whose keys lack prefixes such as "module." and "_orig_mod.".

    PyTorch and training libraries add these prefixes. A prefix of all keys, such as "gpt2.", is the
    name of an attribute that holds the model, and is removed, too. Raises `WeightsError` if two
    keys differ only in their prefixes.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = PREFIXES.sub("", key)
        if name in plain:
            raise WeightsError(f"this state dict has {name} twice, with different prefixes")
        plain[name] = tensor
    # The prefix "transformer." is a part of Hugging Face's names. One key alone shows no prefix.
    while len(plain) > 1 and len({key.split(".")[0] for key in plain}) == 1:
        if any("." not in key or key.startswith("transformer.") for key in plain):
            break
        plain = {key.partition(".")[2]: tensor for key, tensor in plain.items()}
    return plain


def detect(formats: Iterable[Format], state: State) -> Format:
    """Return the format in `formats` that the state dict has (see `Format.fits`).

    Prefixes of the keys do not matter (see `plain_names`). Raises `WeightsError` if the state dict
    has none or several of the formats.
    """
    plain = plain_names(state)
    fitting = [known for known in formats if known.fits(plain)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(known.name for known in fitting or formats)
    raise WeightsError(
        f"this is a state dict of {'several' if fitting else 'none of the'} known formats "
        f"({names}); its first keys are {[*state][:3]}"
    )
