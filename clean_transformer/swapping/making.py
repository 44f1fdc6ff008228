"""`new_module`: makes the module that takes the place of an old one, from what a user gave."""

from collections.abc import Callable, Iterable
from copy import deepcopy

from torch import nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint, hook_points
from clean_transformer.support.captures import writes
from clean_transformer.support.module_hooks import edited_modules
from clean_transformer.swapping.libraries.find import library_of
from clean_transformer.swapping.trial import SwapError

# What `swap` accepts as new modules; `swap` explains each.
Make = Callable[[nn.Module, str], nn.Module] | type[nn.Module] | nn.Module


def require_no_hooks(old: nn.Module, path: str) -> None:
    """Raise `SwapError` if `old`, the module at `path`, has a hook of `add_hook` or `hooks`.

    The hook would stay in the old module, and have no effect.
    """
    for name in edited_modules(old, path):
        raise SwapError(
            f"{name} has a hook, which would not be called in the new module; swap first, and add "
            "the hooks then"
        )


def taken_points(model: nn.Module, old: Iterable[nn.Module]) -> dict[HookPoint, str]:
    """Return the paths of all hook points in `model` that are outside of the modules `old`."""
    inside = {point for module in old for point in hook_points(module).values()}
    return {point: path for path, point in hook_points(model).items() if point not in inside}


def take_points(new: nn.Module, path: str, taken: dict[HookPoint, str]) -> None:
    """Add the hook points of `new`, the new module at `path`, to `taken`.

    Raises `SwapError` if one of them is there already. A cache could not tell the two places of
    such a module apart.
    """
    for name, point in hook_points(new, path).items():
        if point in taken:
            raise SwapError(
                f"{path}: the new module is also elsewhere in the model: {name} is {taken[point]}; "
                "give a copy.deepcopy of the module"
            )
        taken[point] = name


def new_module(make: Make, old: nn.Module, path: str, cfg: Config, *, alone: bool) -> nn.Module:
    """Return the new module for the path `path`, from `make`: a class, function, module or model.

    `old` is the old module at the path. `alone` is True if the pattern matches only this path. If
    `make` is a single module, the result is a copy of `make`, or `make` itself if `alone` is True.
    Raises `SwapError` if `make` raises an error or does not return a module.
    """
    if isinstance(make, nn.Module):
        source = library_of(make)
        part = source.find(make, path) if source else None
        if part is not None:
            return part
        return make if alone else deepcopy(make)
    if not callable(make):
        raise SwapError(
            f"{path}: wanted a class, a function (old, path) or a torch.nn.Module, not {make!r}"
        )
    is_class, before = isinstance(make, type), _writes(old)
    try:
        new = make(cfg) if is_class else make(old, path)  # type: ignore[call-arg, arg-type]
    except Exception as error:
        call = f"{getattr(make, '__name__', make)}({'cfg' if is_class else 'old, path'})"
        raise SwapError(
            f"{path}: wanted a torch.nn.Module, but {call} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(new, nn.Module):
        raise SwapError(f"{path}: wanted a torch.nn.Module, but make gave {type(new).__name__}")
    if _writes(old) != before:
        raise SwapError(
            f"{path}: make changed the weights of the old module, which `restore` cannot undo, and "
            "which are now in the model; change a copy.deepcopy(old) instead"
        )
    return new


def _writes(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Return for each parameter its identity, and how often PyTorch wrote into it so far."""
    return {name: (id(each), writes(each)) for name, each in module.named_parameters()}
