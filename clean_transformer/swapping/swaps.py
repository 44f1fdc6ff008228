"""Defines `swap` and `transplant`, which replace modules in our and in other libraries' models."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from clean_transformer.hooks import name_hook_points
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.reports.page import in_words, render_page
from clean_transformer.support.interrupts import Undoable
from clean_transformer.support.stand_in import StandIn
from clean_transformer.swapping.adapting import adapted
from clean_transformer.swapping.libraries.base import Library, Place
from clean_transformer.swapping.libraries.find import as_ours, known_libraries, library_of
from clean_transformer.swapping.libraries.ours import Ours
from clean_transformer.swapping.loading import WeightsNotCopied, load, refuse_unset
from clean_transformer.swapping.making import (
    Make,
    new_module,
    require_no_hooks,
    take_points,
    taken_points,
)
from clean_transformer.swapping.parameters import compare, marked_memory
from clean_transformer.swapping.patterns import matching
from clean_transformer.swapping.swapped import (
    Swapped,
    by_classes,
    by_parameters,
    class_name,
    in_one_line,
)
from clean_transformer.swapping.trial import SwapError, probe


class HookPointsLost(UserWarning):
    """Warns that new modules do not run hook points, so that caches lack their activations."""


class LooksAhead(UserWarning):
    """Warns that the output of a new module depends on later positions."""


class Swap(Undoable["Swap"]):
    """The result of `swap` and `transplant`: the new modules, and the modules that they replaced.

    The new modules stay in the model until `restore` is called or the `with` block ends.

    - `swapped`: for each swapped module its path, class names, and what became of the parameters.
    - `paths`: the paths of the swapped modules.
    - `lost`: the full names of the hook points that do not run while the new modules are in place.
    """

    def __init__(
        self,
        swapped: list[Swapped],
        modules: dict[str, nn.Module],
        places: list[Place],
        lost: list[str],
    ):
        self.swapped = swapped
        self.paths, self.lost = tuple(modules), tuple(lost)
        self._modules, self._places = modules, places
        self._now: list[Place] = []
        self._before: list[Place] = []
        self._stand_ins: list[StandIn] = []
        # A block reads the attribute `takes_per_head_inputs` of its attention. So each new
        # attention gets this attribute until `restore` is called, unless it has the attribute
        # already.
        self._told: list[nn.Module] = []
        super().__init__(Swap.restore)

    def make(self) -> None:
        """Put the new modules into the model."""
        for place in self._places:
            self._before.append(place.put())
            self._now.append(place)
        for path, module in self._modules.items():
            self._stand_ins += adapted(kind(path), module)
            if kind(path) == "attn" and "takes_per_head_inputs" not in vars(module):
                self._told.append(module)
                vars(module)["takes_per_head_inputs"] = accepts(module, "key_input")

    def unmake(self) -> None:
        """Put the old modules back."""
        self._put_back()
        for stand_in in self._stand_ins:
            stand_in.restore()
        for module in self._told:
            vars(module).pop("takes_per_head_inputs", None)
        self._now, self._before, self._stand_ins, self._told = [], [], [], []

    def __repr__(self) -> str:
        return f"Swap({in_one_line(self.swapped)}{'' if self._now else '; restored'})"

    def _repr_html_(self) -> str:
        changes = by_classes(self.swapped)
        facts = {f"{old} → {new}": in_words(paths) for (old, new), paths in changes.items()}
        facts["state"] = "in place" if self._now else "restored"
        for said, paths in by_parameters(self.swapped).items():
            facts[f"parameters at {in_words(paths)}"] = said
        if self.lost:
            facts["hook points that do not run"] = in_words([*self.lost])
        return render_page("facts.html.jinja", title="Swap", facts=facts)

    def restore(self) -> None:
        """Put the old modules (the same objects) back into the model. A second call does nothing.

        Raises `RuntimeError`, and restores nothing, if a later swap replaced one of the new modules
        and was not restored yet.
        """
        self.end()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the old modules back while a `with` block of this method runs.

        At the end of this block, the new modules are put into the model again. Raises
        `RuntimeError`, and changes nothing, if a later swap replaced one of the new modules and was
        not restored yet.
        """
        self._put_back()
        try:
            yield
        finally:
            for place in self._now:
                place.put()

    def is_in(self, model: nn.Module) -> bool:
        """Return whether this swap was made in `model`, and `restore` was not called yet."""
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


def swap(model: nn.Module, pattern: str, make: Make) -> Swap:
    """Replace all modules of a `DemoTransformer` whose paths match `pattern`.

    Returns a `Swap`. The new modules stay until `Swap.restore` is called or the `with` block ends:

        with swap(model, "blocks.*.mlp", variants.ReluMLP):
            logits = model(tokens)
        swap(model, "blocks.[3-7].attn", make)

    A pattern is a path ("embed", "blocks.3", "blocks.3.attn", "ln_final", …) in which `*` stands
    for any layer and `[3-7]` for a range of layers. `make` is one of

    - a class. `swap` makes the new module with `new = make(cfg)`, where `cfg` is the model's
      `Config`. Then `swap` calls `new.load_from(old)`. If the class has no `load_from`, each
      parameter of the new module becomes a copy of the old module's weight with the same name and
      shape. `swap` warns with `WeightsNotCopied` about the other parameters of the new module.
      Buffers of the new module are not changed;
    - a function. `swap` makes the new module with `make(old, path)`. `path` is the old module's
      path;
    - a module. If the pattern matches several paths, each path gets a copy of the module;
    - a whole model of this package or of another library. The new module at each path is the module
      that `make` has at the same path, not a copy.

    swapping/README.md describes the contract: the inputs and outputs of each kind of module. `swap`
    adapts modules of `HookedTransformer`, `TransformerBridge` and `GPT2LMHeadModel` to the
    contract. It also adapts modules that do not take `kv_cache` or `positions`. If the embedding is
    swapped and the unembedding is tied, the unembedding still uses the old embedding.

    Before the swap, every new module runs on a tiny batch. Raises `SwapError`, and swaps nothing,
    if the pattern matches no path, if an old module has a hook, if a new module raises an error or
    returns the wrong shape, dtype or device, if no weight can be copied to the parameters of a
    class, if a parameter comes from `torch.empty` and is never set, or if a new module with hook
    points is also elsewhere in the model. Warns with `HookPointsLost` if the new modules do not run
    hook points of the old modules, with `LooksAhead` if a new module is not causal, and with
    `LayoutUnknown` if the shape of a copied weight does not show the order of its axes.
    """
    home = library_of(model)
    if not isinstance(home, Ours):
        raise SwapError(f"swap is for a DemoTransformer, not {type(model).__name__}; {which_one()}")
    return _swap(home, model, pattern, make)


def transplant(their_model: nn.Module, pattern: str, make: Make) -> Swap:
    """Put our modules into a `HookedTransformer`, `TransformerBridge` or `GPT2LMHeadModel`.

    `pattern`, `make`, the returned `Swap`, errors and warnings are the same as for `swap`. Patterns
    are written with the paths of our models, such as "blocks.3.attn", for every library. If `make`
    is a class, the weights are converted to our names and layouts before `transplant` copies them
    to the new module. An adapter gives each new module the call signature of the other library. The
    adapter also converts the other library's KV caches and padding masks, so that the library's
    `generate` works. In models of TransformerLens, the old hook points replace the new module's
    hook points with the same names, so that `run_with_cache` and hooks work too. Hugging Face's
    `output_attentions` and `output_hidden_states` do not contain activations of transplanted
    modules.
    """
    home = library_of(their_model)
    if home is None or isinstance(home, Ours):
        raise SwapError(f"transplant is not for {type(their_model).__name__}; {which_one()}")
    return _swap(home, their_model, pattern, make)


def which_one() -> str:
    """Return a text for error messages: which models `transplant` and `swap` accept."""
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
    swapped: list[Swapped] = []
    places: list[Place] = []
    lost: list[str] = []
    kept: list[str] = []
    source = library_of(make) if isinstance(make, nn.Module) else None
    taken = taken_points(model, found.values())
    for path, old in found.items():
        require_no_hooks(old, path)
        with marked_memory():
            new = new_module(make, old, path, cfg, alone=len(found) == 1)
        weights = home.weights(model, path)
        if isinstance(make, type):
            new = new.to(like.device, like.dtype).train(old.training)
            kept += [f"{path}.{name}" for name in load(new, old, weights, path)]
        named = dict(new.named_parameters())
        ours = source.weights(make, path) if source else {}
        parameters = compare(ours or named, dict(old.named_parameters()), weights)
        if not isinstance(make, nn.Module):
            refuse_unset(new, parameters, path)
        modules[path] = as_ours(kind(path), new)
        take_points(modules[path], path, taken)
        name_hook_points(modules[path], path)
        looks_ahead, idle = probe(modules[path], type(new).__name__, path, cfg, like)
        swapped.append(
            Swapped(path, class_name(old), class_name(modules[path]), parameters, looks_ahead)
        )
        here = home.places(model, path, modules[path])
        lost += home.lost(model, path, here, idle)
        places += here
    if lost:
        warnings.warn(
            f"caches will not hold {', '.join(lost)}: the new modules do not run such hook points",
            HookPointsLost,
            stacklevel=3,
        )
    if kept:
        warnings.warn(
            f"the old modules have no weights for {', '.join(kept)}, so these keep the values that "
            "the class gave them",
            WeightsNotCopied,
            stacklevel=3,
        )
    if ahead := [each.path for each in swapped if each.looks_ahead]:
        warnings.warn(
            f"the new modules at {', '.join(ahead)} look ahead: their output at a position depends "
            "on later positions, so that the model predicts tokens that it has read",
            LooksAhead,
            stacklevel=3,
        )
    return Swap(swapped, modules, places, lost).begin()
