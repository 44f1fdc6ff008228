"""Defines `effect`, which measures how a swap changes a model's activations and predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS, impact, rms_difference
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.contract import kind, parts
from clean_transformer.reports.environment import environment
from clean_transformer.support.captures import Captures
from clean_transformer.support.interrupts import Interrupts
from clean_transformer.support.module_hooks import Placed, Reading
from clean_transformer.support.numerics import upcast
from clean_transformer.support.selection import require_one_place
from clean_transformer.swapping.effect_report import Change, Effect
from clean_transformer.swapping.swaps import Swap


@torch.no_grad()
def effect(
    model: DemoTransformer, swapped: Swap, tokens: Int[Tensor, "batch pos"], title: str = ""
) -> Effect:
    """Measure how a swap changes the predictions and the activations of a model.

        with swap(model, "blocks.*.mlp", variants.ReluMLP) as swapped:
            report = effect(model, swapped, tokens)

    The model runs three times: first with the new modules, and then with the old modules. In the
    third run, each old module gets the inputs that the new module at its path got in the first run.
    The third run separates two changes: the change that a new module introduces, and the inherited
    change, which the new module's inputs already have.

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

    with Interrupts() as interrupts:
        with _before_each(model, paths, keep):
            now = interrupts.let_in(_activations, model, tokens, _watched(model, paths))
        with swapped.undone():
            names = _watched(model, paths)
            original = interrupts.let_in(_activations, model, tokens, names)
            with _before_each(model, paths, give):
                inside = [name for name in names if maker(output_of(name), paths)]
                isolated = interrupts.let_in(_activations, model, tokens, inside)

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
        swapped=swapped.swapped,
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
    """Return the path in `paths` of the module that computes the activation `name`, or ""."""
    made_by = (path for path in paths if name == output_of(path) or name.startswith(f"{path}."))
    return next(made_by, "")


def _watched(model: DemoTransformer, paths: Iterable[str]) -> list[str]:
    modules = {name for name, _ in model.named_modules()}
    norms = [path for path in parts(model.cfg.n_layers) if kind(path).startswith("ln")]
    names = [*model.default_points(), *(norm for norm in norms if norm in modules), *paths]
    return [*dict.fromkeys(names)]


def _activations(model: DemoTransformer, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return the activations `names` and the logits, on the CPU.

    Unlike `run_with_cache`, leaves out hook points that a new module does not run.
    """
    captures = Captures(model, "cpu")
    watched = {name: model.get_submodule(name) for name in names}
    require_one_place(model, watched)
    hooks = [(module, Reading(name, captures.capture)) for name, module in watched.items()]
    with Placed(model, hooks):
        logits = model(tokens)
    captures.require_unchanged()
    activations = {output_of(name): value for name, value in captures.activations.items()}
    return activations | {LOGITS: logits.cpu()}


@contextmanager
def _before_each(
    model: nn.Module, paths: tuple[str, ...], hook: Callable[..., Any]
) -> Iterator[None]:
    with ExitStack() as placed:
        for path in paths:
            handle = model.get_submodule(path).register_forward_pre_hook(partial(hook, path))
            placed.callback(handle.remove)
        yield


def _merged(
    original: Mapping[str, Tensor], now: Mapping[str, Tensor], lost: tuple[str, ...]
) -> list[str]:
    """Return the names of all activations, each name once.

    `original` and `now` hold the activations of the original and of the swapped model, by name.
    `lost` has names of activations that only the original model computes. The result has the order
    of `original`. A name that is only in `now` follows the name that precedes it in `now`.
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
