"""`ActivationCache`: the activations of one forward pass, by name."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from clean_transformer.reports.page import in_words
from clean_transformer.reports.tensors import size_of, tensors_html
from clean_transformer.residual_stacks import ResidualStacks
from clean_transformer.support.left_out import has_no
from clean_transformer.support.selection import SWITCHED

# TransformerLens's short words for some hook points. The values are the names of the hook points
# without "hook_".
SHORTHAND = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}


# A full name, or a tuple: a word, the index of a layer, and names of modules. None is ignored.
Key = str | tuple[str | SupportsIndex | None, ...]


class ActivationCache(ResidualStacks, Mapping[str, Tensor]):
    """A mapping from names to activations, in the order of the forward pass.

    A key is either a full name, as in `cache["blocks.0.attn.hook_pattern"]`, or a shorthand, as in
    `cache["pattern", 0, "attn"]`, `cache["resid_pre", -1]` or `cache["normalized", "ln_final"]`. A
    shorthand begins with the name of a hook point without "hook_", or with a key of `SHORTHAND`,
    such as "mlp_post". The index of the layer (block) and the names of modules in the hook point's
    path can follow, in any order. Layer -1 is the last layer of the model, even if the cache has no
    activations of this layer.

    `model` is the model or the module that computed the activations. `has_batch_dim` says whether
    the first axis of each activation is the batch axis. The methods of `ResidualStacks` analyze the
    residual stream.
    """

    def __init__(
        self, activations: Mapping[str, Tensor], model: nn.Module, has_batch_dim: bool = True
    ):
        self.cache_dict = dict(activations)
        self.model: Any = model
        self.has_batch_dim = has_batch_dim

    def __getitem__(self, key: Key) -> Tensor:
        return self.cache_dict[self.full_name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __contains__(self, key: object) -> bool:
        try:
            self.full_name(key)  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        return f"ActivationCache({in_words([*self])}; {size_of(self.values())})"

    def _repr_html_(self) -> str:
        return tensors_html(f"{len(self)} activations, {size_of(self.values())}", self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(has_no(self, name))

    def full_name(self, key: Key) -> str:
        """Return the full name of the activation that `key` selects.

        Raises `KeyError` if `key` selects no activation, or more than one.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return key
        found = self._matches(key, self)
        if len(found) == 1:
            return found[0]
        if not found and (missed := self._matches(key, dict(self.model.named_modules()))):
            raise KeyError(
                f"{key!r} was not captured in this run: names_filter did not select {missed[0]!r}, "
                "or the module does not run it"
                + ("; give its name in names_filter" if missed[0].endswith(SWITCHED) else "")
            )
        near = found or difflib.get_close_matches(str(key), self, n=3, cutoff=0.3)
        problem = "is ambiguous" if found else "is not in the cache"
        raise KeyError(f"{key!r} {problem}; did you mean one of {near}? (cached: {len(self)})")

    def _matches(self, key: Key, names: Iterable[str]) -> list[str]:
        """Return the names in `names` that `key` selects."""
        word, *place = key if isinstance(key, tuple) else (key,)
        point = f"hook_{SHORTHAND.get(str(word), word)}"
        wanted = {
            part if isinstance(part, str) else str(self._layer(part))
            for part in place
            if part is not None
        }
        return [
            name
            for name in names
            if name == key or (name.split(".")[-1] == point and wanted <= {*name.split(".")[:-1]})
        ]

    def to(self, device: str | torch.device) -> "ActivationCache":
        """Move all activations of this cache to `device`, and return the cache."""
        self.cache_dict = {name: value.to(device) for name, value in self.items()}
        return self

    def remove_batch_dim(self) -> "ActivationCache":
        """Remove the batch axis from the activations of this cache, and return the cache.

        If the batch axis was removed before, nothing changes. Raises `ValueError` if the batch
        holds more than one input.
        """
        if not self.has_batch_dim:
            return self
        longest = max((value.shape[0] for value in self.values()), default=1)
        if longest != 1:
            raise ValueError(f"cannot remove the batch dimension: the batch holds {longest} inputs")
        self.cache_dict = {name: value[0] for name, value in self.items()}
        self.has_batch_dim = False
        return self

    def _layer(self, layer: SupportsIndex) -> int:
        return index(layer) + self.n_layers if index(layer) < 0 else index(layer)
