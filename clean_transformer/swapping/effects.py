"""Defines `effect`, which measures how a swap changes a model's activations and predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS, Impact, impact, rms_difference, run
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.contract import kind, parts
from clean_transformer.reports.environment import environment
from clean_transformer.support.numerics import upcast
from clean_transformer.swapping.libraries.base import Adapter
from clean_transformer.swapping.swaps import Swap


@dataclass(frozen=True)
class Swapped:
    """One swapped module: its path, and the class names of the old and the new module."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Change:
    """How much one activation of the swapped model differs from the original model's activation.

    There are three versions of the activation. The swapped activation is from the model with the
    new modules. The original activation is from the model with the old modules. The isolated
    activation is what the old module computes from the inputs of the new module.

    - `name`: the full name of the activation.
    - `module`: the path of the swapped module that computes the activation. "" means that no
      swapped module computes the activation; then `introduced` is 0, and `inherited` is `total`.
    - `scale`: the root mean square of the original activation.
    - `total`: the root mean square of (swapped − original), divided by `scale`.
    - `introduced`: the root mean square of (swapped − isolated), divided by `scale`.
    - `inherited`: the root mean square of (isolated − original), divided by `scale`.
    - `note`: if the four numbers are None, the reason. Otherwise a remark, or "" for no remark.
    """

    name: str
    module: str
    scale: float | None = None
    total: float | None = None
    introduced: float | None = None
    inherited: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Effect:
    """The result of `effect`: how a swap changed the predictions and each activation.

    - `title`: the headline of the report.
    - `cfg`: the architecture of the model.
    - `device` and `dtype`: where and in which precision the model ran.
    - `tokens`: the shape (batch, pos) of the tokens that the model read.
    - `environment`: the versions of Python, packages and libraries, and the name of the processor.
    - `swapped`: the path and the class names of each swapped module.
    - `impact`: how much the predictions changed.
    - `rows`: the change of each activation, in the order of the forward pass.
    """

    title: str
    cfg: Config
    device: str
    dtype: str
    tokens: tuple[int, int]
    environment: dict[str, str]
    swapped: list[Swapped]
    impact: Impact
    rows: list[Change]

    @property
    def first_change(self) -> Change | None:
        """The first activation in the forward pass that changed, or None if none changed."""
        return next((row for row in self.rows if row.total), None)

    @property
    def most_introduced(self) -> list[Change]:
        """The activations whose `introduced` is a number above 0 or NaN, the largest first."""
        sizes = {row: row.introduced for row in self.rows if row.introduced}
        return sorted(sizes, key=lambda row: (not isnan(sizes[row]), -sizes[row]))


@torch.no_grad()
def effect(
    model: DemoTransformer, swapped: Swap, tokens: Int[Tensor, "batch pos"], title: str = ""
) -> Effect:
    """Measure how a swap changes the predictions and the activations of a model.

        with swap(model, "blocks.*.mlp", variants.ReluMLP) as swapped:
            report = effect(model, swapped, tokens)

    The model runs three times. The first run is with the new modules, and the second run is with
    the old modules. In the third run, each old module gets the inputs that the new module at its
    path got in the first run. The third run separates two changes: the change that a new module
    introduces, and the change that is already in the new module's inputs (the inherited change).

    This function compares the activations that `run_with_cache` returns by default, the outputs of
    LayerNorms and of swapped modules, and the logits. All activations are kept on the CPU and
    compared in float64. `title` is the headline of the report.

    Raises `ValueError` if the swap was restored or belongs to another model. Raises `TypeError` if
    `model` is not a `DemoTransformer`.
    """
    if not isinstance(model, DemoTransformer):
        raise TypeError(f"effect is for a DemoTransformer, not {type(model).__name__}")
    if not swapped.is_in(model):
        raise ValueError(
            f"the swap of {', '.join(swapped.paths)} is not in place in this model; call effect "
            "with the model that was swapped, before the swap is restored"
        )
    paths, received = swapped.paths, dict[str, tuple[Tensor, ...]]()

    def keep(path: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received[path] = tuple(x.clone() for x in inputs)  # a module may change x in place

    def give(path: str, _: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
        return received[path]

    new = _class_names(model, paths)
    with _before_each(model, paths, keep):
        now = _activations(model, tokens, _watched(model, paths))
    with swapped.undone():
        old = _class_names(model, paths)
        names = _watched(model, paths)
        original = _activations(model, tokens, names)
        with _before_each(model, paths, give):
            inside = [name for name in names if maker(output_of(name), paths)]
            isolated = _activations(model, tokens, inside)

    rows = [
        _change(name, maker(name, paths), now, original, isolated, lost=name in swapped.lost)
        for name in _merged(original, now, swapped.lost)
    ]
    logits = now[LOGITS]
    return Effect(
        title=title or f"a model of {model.cfg.n_layers} layers",
        cfg=model.cfg,
        device=str(tokens.device),
        dtype=str(logits.dtype).removeprefix("torch."),
        tokens=(tokens.shape[0], tokens.shape[1]),
        environment=environment(),
        swapped=[Swapped(path, old[path], new[path]) for path in paths],
        impact=impact(logits, upcast(original[LOGITS]), tokens.cpu()),
        rows=rows,
    )


def output_of(path: str) -> str:
    """Return the name of the activation that the module at `path` outputs.

    For a LayerNorm, whose output has no hook point, the name is the LayerNorm's path. The path of a
    hook point is returned unchanged.
    """
    owner, word = path.rpartition(".")[0], kind(path)
    match word:
        case "block":
            return f"{path}.hook_resid_post"
        case "attn" | "mlp":
            return f"{owner}.hook_{word}_out"
        case "embed" | "pos_embed":
            return f"hook_{word}"
        case "unembed":
            return LOGITS
    return path


def maker(name: str, paths: Iterable[str]) -> str:
    """Return the path in `paths` whose module computes the activation `name`; if none does, ""."""
    made_by = (path for path in paths if name == output_of(path) or name.startswith(f"{path}."))
    return next(made_by, "")


def _watched(model: DemoTransformer, paths: Iterable[str]) -> list[str]:
    modules = {name for name, _ in model.named_modules()}
    norms = [path for path in parts(model.cfg.n_layers) if kind(path).startswith("ln")]
    return [*model.default_points(), *(norm for norm in norms if norm in modules), *paths]


def _activations(model: DemoTransformer, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    return {output_of(name): value for name, value in run(model, tokens, names).items()}


@contextmanager
def _before_each(
    model: nn.Module, paths: tuple[str, ...], hook: Callable[..., Any]
) -> Iterator[None]:
    with ExitStack() as placed:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(partial(hook, path))
            placed.callback(handle.remove)
        yield


def _class_names(model: nn.Module, paths: tuple[str, ...]) -> dict[str, str]:
    modules = {path: model.get_submodule(path) for path in paths}
    return {
        path: type(module.module if isinstance(module, Adapter) else module).__name__
        for path, module in modules.items()
    }


def _merged(
    original: Mapping[str, Tensor], now: Mapping[str, Tensor], lost: tuple[str, ...]
) -> list[str]:
    """Return the names of all activations, each name once, in the order of the original model.

    A name that is only in `now` comes after the name that precedes it in `now`. Names that are only
    in `lost` come at the end.
    """
    names, at = [*original], 0
    for name in now:
        if name not in original:
            names.insert(at, name)
        at = names.index(name) + 1
    return [*names, *(name for name in lost if name not in names)]


def _change(
    name: str,
    module: str,
    now: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    isolated: Mapping[str, Tensor],
    *,
    lost: bool,
) -> Change:
    if name not in now or name not in original:
        only = "original" if lost or name in original else "swapped"
        return Change(name, module, note=f"only the {only} model makes it")
    given, before = now[name], original[name]
    if given.shape != before.shape:
        note = f"shape {[*given.shape]} instead of {[*before.shape]}"
        return Change(name, module, note=note)
    masked = before.masked_fill(before.isinf(), 0.0)
    scale = rms_difference(masked, torch.zeros_like(masked))

    def size(given: Tensor, other: Tensor) -> float:
        difference = rms_difference(given, other)
        if scale:
            return difference / scale
        return torch.inf if difference else 0.0

    alone = isolated[name] if module else given
    return Change(
        name,
        module,
        scale,
        total=size(given, before),
        introduced=size(given, alone),
        inherited=size(alone, before),
        note="read from the module's output: the new one has no such hook point" if lost else "",
    )
