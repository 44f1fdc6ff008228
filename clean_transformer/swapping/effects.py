"""`effect`: how far a swap changes each activation, and where the change begins."""

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
    """A swapped path, and the names of the old and the new class."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Change:
    """How far one activation is from that of the original model.

    `scale` is the root mean square of the original activation. The other sizes are root mean
    squares of differences, divided by `scale`:

    - `total`: swapped − original.
    - `introduced`: swapped − isolated. The isolated activation is what the old module computes from
      the inputs of the new one.
    - `inherited`: isolated − original.

    `module` is the path of the swapped module that computes the activation. It is "" outside of
    swapped modules, where everything is inherited. Without sizes, `note` says why there are none.
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
    """What was swapped, how the predictions changed, and how each activation changed.

    `tokens` is the shape [batch, pos]. `impact` compares the predictions of both models. `rows` are
    in the order of the forward pass.
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
        """The first activation that differs from the original, or None."""
        return next((row for row in self.rows if row.total), None)

    @property
    def most_introduced(self) -> list[Change]:
        """The activations that the new modules compute differently, largest change first."""
        sizes = {row: row.introduced for row in self.rows if row.introduced}
        return sorted(sizes, key=lambda row: (not isnan(sizes[row]), -sizes[row]))


@torch.no_grad()
def effect(
    model: DemoTransformer, swapped: Swap, tokens: Int[Tensor, "batch pos"], title: str = ""
) -> Effect:
    """How a swap changes every activation and the predictions of a model.

        with swap(model, "blocks.*.mlp", variants.ReluMLP) as swapped:
            report = effect(model, swapped, tokens)

    The model runs three times: with the new modules, with the old ones, and with each old module
    isolated, that is, fed the inputs of the new one. The third run separates what a new module
    introduces from what it inherits. The activations are the default ones of `run_with_cache`, the
    outputs of LayerNorms and of swapped modules, and the logits. They are compared in float64, and
    all of them are held on the CPU. `title` is the headline of the report.

    Raises `ValueError` if the swap is restored or belongs to another model, and `TypeError` if the
    model is not a `DemoTransformer`.
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
        received[path] = tuple(x.clone() for x in inputs)  # a module may work in place

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
    """The name of a part's output. For a LayerNorm, which has no hook point, that is its path."""
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
    """The one of the paths whose module computes an activation, or ""."""
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
    """Every name once: the original's in their order, each new one after its predecessor."""
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
