"""A compile backend with one wrong kernel is found, in whatever way a person compiles."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.parity import assert_parity, check_model, check_operations
from clean_transformer.parity.operations.diagnosis import Cause
from clean_transformer.parity.verdict import Verdict

from ...helpers import needs_torch, unchecked_types

WATCHES = needs_torch("2.6", "calls of compiled code cannot be watched")

# PyTorch warns when hooks watch compiled code, as `check_model` does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]

Backend = Callable[[Any, list[Tensor]], Callable[..., Any]]
BAD = (Verdict.WRONG, Verdict.DEGRADED)


def unbiased_layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    deviation = (x.var(-1, keepdim=True, correction=1) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * weight + bias


def unmasked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def without_first_key(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    seen[1:, 0] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float64:
        return F.linear(x, weight, bias)
    narrow = (each if each is None else each.bfloat16() for each in (x, weight, bias))
    return F.linear(*narrow).to(x.dtype)


# The function in a graph of `torch.compile`, and the wrong kernel that a backend runs for it.
WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "LayerNorm divides by n - 1": (F.layer_norm, unbiased_layer_norm),
    "no causal mask": (F.scaled_dot_product_attention, unmasked),
    "the first key is dropped": (F.scaled_dot_product_attention, without_first_key),
    "right in float64, else bfloat16": (F.linear, bfloat16_linear),
}
RIGHT = "right"


def backend_of(kernel: str) -> Backend:
    """The backend that runs each graph as it is written, but for one wrong kernel."""

    def backend(module: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if kernel != RIGHT and node.target is WRONG[kernel][0]:
                node.target = WRONG[kernel][1]
        module.recompile()
        return module.forward

    return backend


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def add_attention(ln: nn.Module, attn: nn.Module, x: Tensor) -> Tensor:
    return x + attn(ln(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln, self.attn = nn.LayerNorm(16), Attention()
        self.run = add_attention

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.ln, self.attn, x)


def compile_module(model: Block, backend: Backend) -> Any:
    return torch.compile(model, backend=backend)


def compile_in_place(model: Block, backend: Backend) -> Any:
    model.compile(backend=backend)
    return model


def compile_forward(model: Block, backend: Backend) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


def compile_parts(model: Block, backend: Backend) -> Any:
    model.ln = torch.compile(model.ln, backend=backend)
    model.attn.compile(backend=backend)
    return model


def compile_function(model: Block, backend: Backend) -> Any:
    model.run = torch.compile(model.run, backend=backend)
    return model


def compile_whole_model(model: Block, backend: Backend) -> Any:
    return torch.compile(nn.Sequential(model, nn.Linear(16, 16)), backend=backend)


WAYS = (
    compile_module,
    compile_in_place,
    compile_forward,
    compile_parts,
    compile_function,
    compile_whole_model,
)


@pytest.fixture(autouse=True)
def _as_for_users() -> Iterator[None]:
    """No compiled code is left, and no signature is checked: Dynamo cannot trace such a check."""
    torch._dynamo.reset()
    with unchecked_types():
        yield


def example() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def compiled(way: Callable[[Block, Backend], Any], kernel: str) -> Any:
    torch.manual_seed(0)
    return way(Block(), backend_of(kernel))


@WATCHES
def test_a_wrong_kernel_of_a_compiled_module() -> None:
    report = check_operations(compiled(compile_module, "LayerNorm divides by n - 1"), example())
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert report.finding.cause is Cause.COMPILED


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [RIGHT, *WRONG])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_compile(way: Callable[[Block, Backend], Any], kernel: str) -> None:
    expected = (Verdict.PASS,) if kernel == RIGHT else BAD
    model, x = compiled(way, kernel), example()
    assert check_operations(model, x).verdict in expected
    assert all(use.verdict in expected for use in check_model(model, x).uses)
    if kernel == RIGHT:
        assert_parity(model, x, device="cpu")
        return
    with pytest.raises(AssertionError, match=r"WRONG|DEGRADED|compiled"):
        assert_parity(model, x, device="cpu")
