"""Swapping modules: another in the place of one, in our model or in another library's."""

import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules.contract import SwapError, kind, parts, probe
from clean_transformer.swapping.libraries.base import Ours, Place
from clean_transformer.swapping.libraries.find import as_ours, library

Make = Callable[[nn.Module, str], nn.Module] | type[nn.Module] | nn.Module


class HookPointsLost(UserWarning):
    """Hook points that caches will not hold while a module that lacks them is in place."""


class Swap(AbstractContextManager["Swap"]):
    """Modules that are in the place of others, until `restore` or the end of a `with` block.

    `paths` are the places, `lost` the full names of the hook points that nothing fires meanwhile.
    """

    def __init__(self, places: list[Place], paths: list[str], lost: list[str]):
        self.paths, self.lost = tuple(paths), tuple(lost)
        self._now = places
        self._before = [place.put() for place in places]

    def restore(self) -> None:
        """Put the very same modules back. A second call does nothing.

        Raises `RuntimeError`, and restores nothing, while a later swap is still in a place.
        """
        self._put_back()
        self._now, self._before = [], []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it, the very same modules as before are in their places; then the new ones are.

        Raises `RuntimeError`, and undoes nothing, while a later swap is still in a place.
        """
        self._put_back()
        try:
            yield
        finally:
            for place in self._now:
                place.put()

    def is_in(self, model: nn.Module) -> bool:
        """Whether all that was swapped is in that model, and not restored."""
        parts = set(model.modules())
        return bool(self._now) and all(place.owner in parts for place in self._now)

    def _put_back(self) -> None:
        moved = next((place for place in self._now if not place.is_put), None)
        if moved is not None:
            raise RuntimeError(
                f"{moved.name!r} of {type(moved.owner).__name__} was swapped again; restore that "
                "swap before this one"
            )
        for place in reversed(self._before):
            place.put()

    def __exit__(self, *_: object) -> None:
        self.restore()


def swap(model: nn.Module, pattern: str, make: Make) -> Swap:
    """Put other modules in the place of those of our model that `pattern` matches, at once.

    For as long as a `with` block runs, after which the old ones are back as they were, or for good:

        with swap(model, "blocks.*.mlp", variants.ReluMLP):
            logits = model(tokens)
        swap(model, "blocks.[3-7].attn", make)

    A pattern is a path ("embed", "blocks.3", "blocks.3.attn", "ln_final", …) in which `*` stands
    for any layer and `[3-7]` for a range. `make` is one of

    - a function of the old module and its path that gives the new one;
    - a class, which is made with the model's `Config`, and whose parameters of the same name and
      shape are copied from the old module (or by a `load_from(old)` method, if it has one);
    - a module; where the pattern matches several places, each gets a copy;
    - a whole model, ours or another library's, whose own part of each path is taken.

    Modules keep the contract of README.md, or are those of `HookedTransformer`,
    `TransformerBridge` or `GPT2LMHeadModel`, with their own conventions. Where the embedding is
    swapped, a tied unembedding still reads the old one.

    Every new module is first tried on a tiny batch. Raises `SwapError`, and swaps nothing, for a
    pattern that matches nothing, and for a module that cannot be called, or that gives another
    shape, dtype or device, with the path, what was wanted and what was given. Warns
    `HookPointsLost` of hook points that the new modules do not have.
    """
    home = library(model)
    if home is None or type(home) is not Ours:
        raise SwapError(f"swap is for a DemoTransformer, not {type(model).__name__}; {THEIRS}")
    return _swap(home, model, pattern, make)


def transplant(their_model: nn.Module, pattern: str, make: Make) -> Swap:
    """Put modules of ours into a `HookedTransformer`, `TransformerBridge` or `GPT2LMHeadModel`.

    Patterns, `make`, what comes back and what is refused are as for `swap`, with the paths of
    ours in any model. The modules are called by the other model's convention, with its KV caches
    and padding, so that its `generate` goes on working. In TransformerLens's models their hook
    points take the place of ours of the same name, so that `run_with_cache` and hooks do as well.
    Hugging Face's `output_attentions` and `output_hidden_states` leave transplanted modules out.
    """
    home = library(their_model)
    if home is None or type(home) is Ours:
        raise SwapError(f"transplant is not for {type(their_model).__name__}; {THEIRS}")
    return _swap(home, their_model, pattern, make)


THEIRS = (
    "transplant puts modules into a HookedTransformer, TransformerBridge or GPT2LMHeadModel, "
    "swap into a DemoTransformer"
)


def _swap(home: Ours, model: nn.Module, pattern: str, make: Make) -> Swap:
    cfg, like = home.config(model), next(model.parameters())
    found = matching(home, model, cfg, pattern)
    places: list[Place] = []
    lost: list[str] = []
    for path, old in found.items():
        new = made(make, old, path, cfg, like, alone=len(found) == 1)
        called_as_ours = as_ours(kind(path), new)
        probe(called_as_ours, type(new).__name__, path, cfg, like)
        here = home.places(model, path, called_as_ours if type(home) is Ours else new)
        lost += home.lost(model, path, here)
        places += here
    if lost:
        warnings.warn(
            f"caches will not hold {', '.join(lost)}: the new modules have no such hook points",
            HookPointsLost,
            stacklevel=3,
        )
    return Swap(places, [*found], lost)


def matching(home: Ours, model: nn.Module, cfg: Config, pattern: str) -> dict[str, nn.Module]:
    """The parts whose path the pattern matches. Raises `SwapError` if there are none."""
    words = [re.escape(word) for word in pattern.split(".")]
    for place, word in enumerate(pattern.split(".")):
        if word == "*":
            words[place] = r"[^.]+"
        elif layers := re.fullmatch(r"\[(\d+)-(\d+)\]", word):
            words[place] = "|".join(map(str, range(int(layers[1]), int(layers[2]) + 1))) or "(?!)"
    known = [path for path in parts(cfg.n_layers) if home.find(model, path) is not None]
    wanted = re.compile(r"\.".join(f"({word})" for word in words))
    found = {path: home.find(model, path) for path in known if wanted.fullmatch(path)}
    if not found:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
        raise SwapError(
            f"{pattern!r} matches nothing in this model of {cfg.n_layers} layers; did you mean one "
            f"of {near}? Patterns are such as 'embed', 'blocks.3', 'blocks.*.attn', "
            "'blocks.[3-7].mlp', 'ln_final'"
        )
    return found  # type: ignore[return-value]


def made(
    make: Make, old: nn.Module, path: str, cfg: Config, like: Tensor, *, alone: bool
) -> nn.Module:
    """The new module for one place. Raises `SwapError` if `make` gives none."""
    if isinstance(make, nn.Module):
        source = library(make)
        part = source.find(make, path) if source and hasattr(source, "find") else None
        if part is not None:
            return part
        return make if alone else deepcopy(make)
    is_class = isinstance(make, type)
    try:
        new = make(cfg) if is_class else make(old, path)  # type: ignore[call-arg, arg-type]
    except Exception as error:
        asked = f"{getattr(make, '__name__', make)}({'cfg' if is_class else 'old, path'})"
        raise SwapError(
            f"{path}: wanted a torch.nn.Module, but {asked} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(new, nn.Module):
        raise SwapError(f"{path}: wanted a torch.nn.Module, but make gave {type(new).__name__}")
    if is_class:
        new = new.to(like.device, like.dtype).train(old.training)
        load_from = getattr(new, "load_from", partial(copy_parameters, new))
        load_from(old)
    return new


@torch.no_grad()
def copy_parameters(new: nn.Module, old: nn.Module) -> None:
    """Give the new module the old one's parameters wherever name and shape agree."""
    given = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
