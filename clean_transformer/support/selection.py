"""Which modules `names_filter` and pairs of hooks select, and whether hooks work there."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as shorten
from typing import Any, Protocol, runtime_checkable

from torch import nn

# A selection of activations: one name, several names, or a function that takes the name of a hook
# point and returns whether the activation is selected.
Names = str | Iterable[str] | Callable[[str], bool]
Hooks = Iterable[tuple[Names, Callable[..., Any]]]

# The block's hook points for the inputs of each attention head, and (in `PER_HEAD`) for each head's
# output. These activations [batch pos head d_model] need n_heads times the memory of the residual
# stream, so `run_with_cache` captures them only if its argument `names_filter` selects them.
PER_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
PER_HEAD = (*PER_HEAD_INPUTS, "hook_result")

# TransformerLens runs these hook points only after a switch, such as `set_use_attn_result`, was
# set. So a function selects them only if it selects nothing else. For example, `"hook_q" in name`
# selects hook_q without hook_q_input.
SWITCHED = (*PER_HEAD, "hook_mlp_in")


@runtime_checkable
class HasPoints(Protocol):
    """A `HookedModule`."""

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        """The hook points by path."""

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]:
        """Return the paths and all modules."""


def select(root: HasPoints, names: Names) -> dict[str, nn.Module]:
    """Return the submodules of `root` that `names` selects, by path.

    Raises `KeyError` if a name is unknown or nothing is selected, and `TypeError` for `names` of
    another type.
    """
    modules = dict(root.named_modules())
    if callable(names):
        selected = [name for name in root.hook_dict if names(name)]
        wanted = [name for name in selected if not name.endswith(SWITCHED)] or selected
        if not wanted:
            raise KeyError(
                f"the function selects no hook point of {type(root).__name__}; they are "
                f"{', '.join([*root.hook_dict][:3])}, …"
            )
    else:
        wanted = [names] if isinstance(names, str) else _listed(names)
    for name in wanted:
        if name not in modules or not name:
            near = [each for each in modules if each.endswith(f".hook_{name}")]
            near = near or difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
            some = [*root.hook_dict][:3]
            hint = f"did you mean {near[:3]}?" if name and near else f"such as {some}"
            raise KeyError(f"{type(root).__name__} has no {name!r}; {hint}")
    return {name: modules[name] for name in wanted}


def _listed(names: object) -> list[str]:
    listed: list[Any] = [*names] if isinstance(names, Iterable) else [names]
    if not listed:
        raise KeyError("the list of names is empty, so it selects no activation")
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(
                f"names are {shorten(names)}; give a name, a list of names, or a function"
            )
    return listed


def pairs(hooks: Hooks) -> list[tuple[Names, Callable[..., Any]]]:
    """Return `hooks` as a list. Raises `TypeError` if they are not pairs (names, function)."""
    listed = [*hooks] if isinstance(hooks, Iterable) else [hooks]
    for each in listed:
        if not isinstance(each, (tuple, list)) or len(each) != 2 or not callable(each[1]):
            raise TypeError(
                f"{each!r} is no pair (names, function); give a list of pairs, such as "
                'fwd_hooks=[("hook_embed", function)]'
            )
    return listed


def require_hookable(root: nn.Module, selected: Mapping[str, nn.Module]) -> None:
    """Raise `RuntimeError` if a hook on one of the modules `selected` could not work.

    This is the case for a module that is in several places of `root`, and inside of a module whose
    `forward` was compiled: the compiled graph does not call new hooks.
    """
    places = require_one_place(root, selected)
    compiled = [each for each in places if _has_compiled_forward(each)]
    in_graph = {part for each in compiled for part in each.modules() if part is not each}
    for name, module in selected.items():
        if module in in_graph:
            raise RuntimeError(
                f"{name} is in a module that was compiled with torch.compile(...), and a compiled "
                "graph does not call hooks; use module.compile(), which hooks can set aside"
            )


def require_one_place(root: nn.Module, selected: Mapping[str, nn.Module]) -> Counter[nn.Module]:
    """Return in how many places of `root` each of its modules is.

    Raises `RuntimeError` if one of the modules `selected` is in several places. A hook cannot know
    in which of them the module runs.
    """
    places, found = Counter[nn.Module](), [root]
    while found:  # `named_modules` would also build all the paths
        module = found.pop()
        places[module] += 1
        found += [part for part in module._modules.values() if part is not None]
    for name, module in selected.items():
        if places[module] > 1:
            raise RuntimeError(
                f"{name} is in several places of the model, and a hook cannot tell them apart; put "
                "copies of the module into the other places"
            )
    return places


def _has_compiled_forward(module: nn.Module) -> bool:
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
