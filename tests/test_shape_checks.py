"""While tests run, every shape and type in a signature of the package is checked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from beartype import beartype
from beartype.roar import (
    BeartypeCallHintParamViolation,
    BeartypeCallHintReturnViolation,
    BeartypeCallHintViolation,
)
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.activations.oracle_run import owner_of

from .helpers import TINY, unchecked_types
from .type_checks import checked, has_shapes


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match=r"modules\.mlp\.MLP\.forward"):
        MLP(TINY)(torch.zeros(TINY.d_model))


def test_a_wrong_type_is_refused_where_no_argument_has_a_shape():
    with pytest.raises(BeartypeCallHintParamViolation, match="owner_of"):
        owner_of(7)
    with unchecked_types(), pytest.raises(AttributeError):
        owner_of(7)


def test_a_wrong_result_is_refused():
    @checked(typechecker=beartype)
    def plain(x: int) -> str:
        return x

    @checked(typechecker=beartype)
    def with_shape(x: Float[Tensor, "a b"]) -> Float[Tensor, "b a"]:
        return x

    with pytest.raises(BeartypeCallHintReturnViolation):
        plain(7)
    with_shape(torch.zeros(2, 2))
    with pytest.raises(TypeCheckError):
        with_shape(torch.zeros(2, 3))


@pytest.mark.parametrize("annotation", [int, Float[Tensor, ""]], ids=["type", "shape"])
def test_dataclasses_and_every_kind_of_method_are_checked(annotation: type):
    @checked(typechecker=beartype)
    @dataclass
    class Fields:
        number: annotation
        others: list[int] = field(default_factory=list)

    class Methods:
        @checked(typechecker=beartype)
        @classmethod
        def of_class(cls, x: annotation) -> None: ...

        @checked(typechecker=beartype)
        @staticmethod
        def static(x: annotation) -> None: ...

        @checked(typechecker=beartype)
        @property
        def own(self) -> annotation:
            return "neither"

    right = 7 if annotation is int else torch.tensor(7.0)
    calls = Fields, Methods.of_class, Methods.static, lambda _: Methods().own
    for call in calls[:-1]:
        call(right)
    for call in calls:
        with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
            call("neither")


Alias = Float[Tensor, "a b"]


def test_shapes_are_found_wherever_an_annotation_has_them():
    def direct(x: Float[Tensor, "a"]) -> None: ...
    def optional(x: int, y: Float[Tensor, "a"] | None = None) -> None: ...
    def inside(x: dict[str, list[Alias]]) -> None: ...
    def called(x: Callable[[Alias], int]) -> None: ...
    def returned() -> tuple[Alias, ...]: ...
    def quoted(x: "Alias") -> None: ...
    def none(x: Tensor, y: dict[str, Tensor] | None) -> Callable[[int], Tensor]: ...

    class Mine:
        def own(self) -> "Mine": ...

    assert all(map(has_shapes, (direct, optional, inside, called, returned, quoted)))
    assert not any(map(has_shapes, (none, Mine.own)))


def test_no_module_was_imported_before_the_checks_were_installed():
    """As our pytest plugin would do if this project's own tests loaded it."""
    loaders = {
        name: type(module.__loader__).__name__
        for name, module in sys.modules.items()
        if name.split(".")[0] == "clean_transformer"
    }
    unchecked = [name for name, loader in loaders.items() if loader != "_JaxtypingLoader"]
    assert len(loaders) > 10
    assert not unchecked
