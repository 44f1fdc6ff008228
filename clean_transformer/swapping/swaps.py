"""`swap` and `transplant`: put other modules into a model, ours or another library's."""

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
from clean_transformer.modules.contract import accepts, kind, parts
from clean_transformer.swapping.adapting import adapted
from clean_transformer.swapping.libraries.base import Library, Place
from clean_transformer.swapping.libraries.find import as_ours, known_libraries, library_of
from clean_transformer.swapping.libraries.ours import Ours
from clean_transformer.swapping.trial import SwapError, probe

Make = Callable[[nn.Module, str], nn.Module] | type[nn.Module] | nn.Module


class HookPointsLost(UserWarning):
    """The swapped-in modules lack hook points, which caches will not hold."""


class Swap(AbstractContextManager["Swap"]):
    """Swapped-in modules, which stay until `restore` or the end of a `with` block.

    `paths` are the paths that were swapped. `lost` are the full names of the hook points that do
    not run meanwhile.
    """

    def __init__(self, modules: dict[str, nn.Module], places: list[Place], lost: list[str]):
        self.paths, self.lost = tuple(modules), tuple(lost)
        self._now = places
        self._before = [place.put() for place in places]
        self._stand_ins = [
            stand_in for path, module in modules.items() for stand_in in adapted(kind(path), module)
        ]
        # The block asks its attention this, and not its signature.
        self._told = [
            module
            for path, module in modules.items()
            if kind(path) == "attn" and "takes_per_head_inputs" not in vars(module)
        ]
        for module in self._told:
            vars(module)["takes_per_head_inputs"] = accepts(module, "key_input")

    def restore(self) -> None:
        """Put the very same old modules back. A second call does nothing.

        Raises `RuntimeError`, and restores nothing, while a later swap is still in one of the
        places.
        """
        self._put_back()
        for stand_in in self._stand_ins:
            stand_in.restore()
        for module in self._told:
            vars(module).pop("takes_per_head_inputs", None)
        self._now, self._before, self._stand_ins = [], [], []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the very same old modules back for a `with` block, then the new ones in again.

        Raises `RuntimeError`, and undoes nothing, while a later swap is still in one of the places.
        """
        self._put_back()
        try:
            yield
        finally:
            for place in self._now:
                place.put()

    def is_in(self, model: nn.Module) -> bool:
        """Whether the swapped-in modules are in this model, and not restored."""
        inside = set(model.modules())
        return bool(self._now) and all(place.owner in inside for place in self._now)

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
    """Replace the modules of a `DemoTransformer` whose path matches `pattern`.

    The old modules come back at the end of a `with` block, or when the returned `Swap` is restored:

        with swap(model, "blocks.*.mlp", variants.ReluMLP):
            logits = model(tokens)
        swap(model, "blocks.[3-7].attn", make)

    A pattern is a path ("embed", "blocks.3", "blocks.3.attn", "ln_final", …) in which `*` stands
    for any layer and `[3-7]` for a range of layers. `make` is one of

    - a class. Each new module is made from the model's `Config`. It gets a copy of every parameter
      of the old module with the same name and shape; `load_from(old)` does that instead, if the
      class has it;
    - a function of the old module and its path, which returns the new module;
    - a module. If the pattern matches several paths, each gets a copy;
    - a whole model, ours or another library's. Its own module at each path is taken.

    The contract in swapping/README.md says what a module takes and gives. Modules of
    `HookedTransformer`, `TransformerBridge` and `GPT2LMHeadModel` are adapted to it, and so is a
    module that takes no `kv_cache` or no `positions`. After the embedding is swapped, a tied
    unembedding still reads the old one.

    Every new module first runs on a tiny batch. Raises `SwapError`, and swaps nothing, for a
    pattern that matches nothing, and for a module that raises an error or gives another shape,
    dtype or device than wanted. Warns `HookPointsLost` if the new modules lack hook points.
    """
    home = library_of(model)
    if not isinstance(home, Ours):
        raise SwapError(f"swap is for a DemoTransformer, not {type(model).__name__}; {which_one()}")
    return _swap(home, model, pattern, make)


def transplant(their_model: nn.Module, pattern: str, make: Make) -> Swap:
    """Replace modules of a `HookedTransformer`, `TransformerBridge` or `GPT2LMHeadModel` by ours.

    Patterns, `make`, the returned `Swap`, errors and warnings are those of `swap`. Paths are ours
    in every model. The other library calls the new modules by its own convention, with its KV
    caches and padding, so its `generate` works. In TransformerLens's models, their hook points
    replace ours of the same name, so `run_with_cache` and hooks work too. Hugging Face's
    `output_attentions` and `output_hidden_states` do not contain transplanted modules.
    """
    home = library_of(their_model)
    if home is None or isinstance(home, Ours):
        raise SwapError(f"transplant is not for {type(their_model).__name__}; {which_one()}")
    return _swap(home, their_model, pattern, make)


def which_one() -> str:
    """For errors: the models that `transplant` and `swap` are for."""
    theirs = [
        name.split(".")[-1]
        for each in known_libraries()
        if not isinstance(each, Ours)
        for name in each.MODELS
    ]
    return f"transplant puts modules into a {' or '.join(theirs)}, swap into a DemoTransformer"


def _swap(home: Library, model: nn.Module, pattern: str, make: Make) -> Swap:
    cfg, like = home.config(model), next(model.parameters())
    found = matching(home, model, cfg, pattern)
    modules: dict[str, nn.Module] = {}
    places: list[Place] = []
    lost: list[str] = []
    for path, old in found.items():
        new = new_module(make, old, path, cfg, like, alone=len(found) == 1)
        modules[path] = as_ours(kind(path), new)
        probe(modules[path], type(new).__name__, path, cfg, like)
        here = home.places(model, path, modules[path])
        lost += home.lost(model, path, here)
        places += here
    if lost:
        warnings.warn(
            f"caches will not hold {', '.join(lost)}: the new modules have no such hook points",
            HookPointsLost,
            stacklevel=3,
        )
    return Swap(modules, places, lost)


def matching(home: Library, model: nn.Module, cfg: Config, pattern: str) -> dict[str, nn.Module]:
    """The parts whose path matches the pattern. Raises `SwapError` if there are none."""
    words = [re.escape(word) for word in pattern.split(".")]
    for place, word in enumerate(pattern.split(".")):
        if word == "*":
            words[place] = r"[^.]+"
        elif layers := re.fullmatch(r"\[(\d+)-(\d+)\]", word):
            words[place] = "|".join(map(str, range(int(layers[1]), int(layers[2]) + 1))) or "(?!)"
    wanted = re.compile(r"\.".join(f"({word})" for word in words))
    every = {path: home.find(model, path) for path in parts(cfg.n_layers)}
    known = {path: part for path, part in every.items() if part is not None}
    found = {path: part for path, part in known.items() if wanted.fullmatch(path)}
    if not found:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
        raise SwapError(
            f"{pattern!r} matches nothing in this model of {cfg.n_layers} layers; did you mean one "
            f"of {near}? Examples of patterns: 'embed', 'blocks.3', 'blocks.*.attn', "
            "'blocks.[3-7].mlp', 'ln_final'"
        )
    return found


def new_module(
    make: Make, old: nn.Module, path: str, cfg: Config, like: Tensor, *, alone: bool
) -> nn.Module:
    """The new module for one path. Raises `SwapError` if `make` fails or returns no module."""
    if isinstance(make, nn.Module):
        source = library_of(make)
        part = source.find(make, path) if source else None
        if part is not None:
            return part
        return make if alone else deepcopy(make)
    is_class = isinstance(make, type)
    try:
        new = make(cfg) if is_class else make(old, path)  # type: ignore[call-arg, arg-type]
    except Exception as error:
        call = f"{getattr(make, '__name__', make)}({'cfg' if is_class else 'old, path'})"
        raise SwapError(
            f"{path}: wanted a torch.nn.Module, but {call} raised {type(error).__name__}: {error}"
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
    """Copy every parameter of the old module that the new one has by the same name and shape."""
    given = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
