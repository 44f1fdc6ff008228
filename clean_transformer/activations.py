"""Watching and patching: `run_with_cache`, `run_with_hooks` and the cache that they fill."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.hooks import HookPoint

Predicate = Callable[[str], bool]
Names = str | Iterable[str] | Predicate
HookFunction = Callable[..., Tensor | None]

# These copy the residual stream (or build the output) once per head, so that capturing them costs
# n_heads times as much; they are captured only when asked for.
PER_HEAD = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result")

# TransformerLens's other words for the same activations.
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
    """Activations by name, in the order in which the forward pass made them.

    Takes full names, `cache["blocks.0.attn.hook_pattern"]`, and TransformerLens's shorthand:
    `cache["pattern", 0, "attn"]`, `cache["resid_pre", -1]`, `cache["normalized", "ln_final"]`.
    Negative layers count from `n_layers`, the model's, of which only some may have been captured.
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
        """The name that a shorthand stands for. Raises `KeyError` if it is not exactly one."""
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
        """The same activations on another device."""
        moved = {name: value.to(device) for name, value in self.items()}
        return ActivationCache(moved, self.n_layers)

    def remove_batch_dim(self) -> "ActivationCache":
        """The same activations without their first axis. Raises `ValueError` unless it is 1."""
        longest = max((value.shape[0] for value in self.values()), default=1)
        if longest != 1:
            raise ValueError(f"cannot remove the batch dimension: the batch holds {longest} inputs")
        single = {name: value[0] for name, value in self.items()}
        return ActivationCache(single, self.n_layers)

    def accumulated_resid(
        self, *, incl_mid: bool = False
    ) -> tuple[Float[Tensor, "component *batch pos d_model"], list[str]]:
        """The residual stream before each block, then after the last one, with their labels.

        `incl_mid` also takes the stream between attention and MLP. Labels are TransformerLens's:
        "0_pre", "0_mid", "1_pre", …, "final_post".
        """
        points = ("resid_pre", "resid_mid") if incl_mid else ("resid_pre",)
        states = {
            f"{layer}_{point.removeprefix('resid_')}": self[point, layer]
            for layer in range(self.n_layers)
            for point in points
        }
        states["final_post"] = self["resid_post", -1]
        return torch.stack([*states.values()]), [*states]


class HookedModule(nn.Module):
    """A module whose hook points can be watched and patched, alone or inside a larger one.

    `name` is as in `HookPoint`, for functions that are hooked onto a module's output.
    """

    name: str | None = None

    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point below this module, by name."""
        return {
            name: module for name, module in self.named_modules() if isinstance(module, HookPoint)
        }

    def default_points(self) -> dict[str, HookPoint]:
        """The hook points that `run_with_cache` captures unless told otherwise."""
        return {
            name: point
            for name, point in self.hook_points().items()
            if name.split(".")[-1] not in PER_HEAD
        }

    def run_with_cache(
        self,
        *inputs: Any,
        names: Names | None = None,
        remove_batch_dim: bool = False,
        **arguments: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run `self(*inputs, **arguments)` and keep what its hook points saw, detached.

        `names` is a name, several, or a predicate; by default every hook point but the five that
        cost memory in proportion to heads. The name of a submodule ("blocks.0.ln1") captures its
        output. Raises `KeyError` for a name that the model does not have, before running.
        """
        captured: dict[str, Tensor] = {}

        def capture(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            captured[name] = output.detach()

        wanted = self._named(names) if names is not None else self.default_points()
        with _forward_hooks((module, partial(capture, name)) for name, module in wanted.items()):
            output = self(*inputs, **arguments)
        layers = {name.split(".")[1] for name in self.hook_points() if name.startswith("blocks.")}
        cache = ActivationCache(captured, len(layers))
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self, *inputs: Any, hooks: Iterable[tuple[Names, HookFunction]], **arguments: Any
    ) -> Any:
        """Run `self(*inputs, **arguments)` with each function called at the points it names.

        A function takes `(activation, hook)`, where `hook.name` is the point's name, and returns a
        replacement or `None` to leave the activation as it is. Raises `KeyError` for an unknown
        name, before running.
        """

        def call(function: HookFunction, point: nn.Module, args: Any, output: Tensor) -> Any:
            return function(output, hook=point)

        placed = []
        for names, function in hooks:
            for name, point in self._named(names).items():
                point.name = name  # type: ignore[assignment, unused-ignore]
                placed.append((point, partial(call, function)))
        with _forward_hooks(placed):
            return self(*inputs, **arguments)

    def _named(self, names: Names) -> Mapping[str, nn.Module]:
        if callable(names):
            return {name: point for name, point in self.hook_points().items() if names(name)}
        modules = dict(self.named_modules())
        wanted = [names] if isinstance(names, str) else [*names]
        for name in wanted:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                raise KeyError(f"{type(self).__name__} has no {name!r}; did you mean {near}?")
        return {name: modules[name] for name in wanted}


@contextmanager
def _forward_hooks(
    placed: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    handles = []
    try:
        for module, function in placed:
            handles.append(module.register_forward_hook(function))
        yield
    finally:
        for handle in handles:
            handle.remove()
