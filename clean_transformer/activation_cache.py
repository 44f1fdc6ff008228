"""`ActivationCache`: the activations of one forward pass, by name."""

import difflib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

# The keys are TransformerLens's short words for hook points. The values are the names of these hook
# points, without the prefix "hook_".
SHORTHAND = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}


class ActivationCache(Mapping[str, Tensor]):
    """A mapping from names to activations, in the order of the forward pass.

    A key is a full name, such as `cache["blocks.0.attn.hook_pattern"]`, or a shorthand, as in
    TransformerLens, such as `cache["pattern", 0, "attn"]`, `cache["resid_pre", -1]` or
    `cache["normalized", "ln_final"]`. The first word of a shorthand is the name of the hook point
    without "hook_", or a key of `SHORTHAND`. The layer's number and the names of modules in the
    hook point's path can follow, in any order.

    `n_layers` is the number of layers (blocks) of the model. Layer -1 is the last layer of the
    model, even if only earlier layers were captured.
    """

    def __init__(self, activations: Mapping[str, Tensor], n_layers: int):
        self._activations = dict(activations)
        self.n_layers = n_layers

    def __getitem__(self, key: str | tuple[str | int, ...]) -> Tensor:
        return self._activations[self.full_name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        try:
            self.full_name(key)  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return False
        return True

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations: {', '.join(self)})"

    def full_name(self, key: str | tuple[str | int, ...]) -> str:
        """Return the full name of the activation that `key` selects.

        Raises `KeyError` if `key` selects no activation, or more than one.
        """
        if isinstance(key, str) and key in self._activations:
            return key
        word, *place = key if isinstance(key, tuple) else (key,)
        point = f"hook_{SHORTHAND.get(str(word), word)}"
        wanted = {
            str(part + self.n_layers if isinstance(part, int) and part < 0 else part)
            for part in place
        }
        found = [
            name
            for name in self
            if name.split(".")[-1] == point and wanted <= set(name.split(".")[:-1])
        ]
        if len(found) != 1:
            near = found or difflib.get_close_matches(str(key), self, n=3, cutoff=0.3)
            problem = "is ambiguous" if found else "is not in the cache"
            raise KeyError(f"{key!r} {problem}; did you mean one of {near}? (cached: {len(self)})")
        return found[0]

    def to(self, device: str | torch.device) -> "ActivationCache":
        """Return a new cache with all activations on `device`."""
        moved = {name: value.to(device) for name, value in self.items()}
        return ActivationCache(moved, self.n_layers)

    def remove_batch_dim(self) -> "ActivationCache":
        """Remove the batch axis from the activations of this cache, and return the cache.

        Raises `ValueError` if the batch holds more than one input.
        """
        longest = max((value.shape[0] for value in self.values()), default=1)
        if longest != 1:
            raise ValueError(f"cannot remove the batch dimension: the batch holds {longest} inputs")
        self._activations = {name: value[0] for name, value in self.items()}
        return self

    def accumulated_resid(
        self, *, incl_mid: bool = False
    ) -> tuple[Float[Tensor, "component *batch pos d_model"], list[str]]:
        """Return the residual stream before each block and after the last block, with labels.

        The residual streams are stacked along a new first axis, `component`. With `incl_mid`, they
        include the residual stream between the attention and the MLP of each block. The second
        return value is a list with one label per component, as in TransformerLens: "0_pre",
        "0_mid", "1_pre", …, "final_post". Raises `KeyError` if one of these activations was not
        captured.
        """
        points = ("resid_pre", "resid_mid") if incl_mid else ("resid_pre",)
        states = {
            f"{layer}_{point.removeprefix('resid_')}": self[point, layer]
            for layer in range(self.n_layers)
            for point in points
        }
        states["final_post"] = self["resid_post", -1]
        return torch.stack([*states.values()]), [*states]
