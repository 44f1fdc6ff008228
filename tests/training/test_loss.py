"""The loss and its gradient, beside PyTorch's in float64, in parts and whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.training import loss as module
from clean_transformer.training.loss import cross_entropy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn(rows: int, d_vocab: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, d_vocab, dtype=torch.float64, generator=generator)
    return logits, torch.randint(d_vocab, (rows,), generator=generator)


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    d_vocab=st.integers(1, 50),
    at_once=st.integers(1, 200),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    weight=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 99),
)
def test_it_is_what_pytorch_computes_in_float64(dtype, rows, d_vocab, at_once, scale, weight, seed):
    given_logits, targets = drawn(rows, d_vocab, scale, seed)
    logits = given_logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", at_once)
        loss = cross_entropy(logits, targets)
        (weight * loss).backward()
    expected = F.cross_entropy(exact, targets)
    (weight * expected).backward()

    # A row's sum of d_vocab exponentials, each of a difference of at most `reach`, and its
    # logarithm; then one more exponential (Higham 2002, sections 3.1 and 4.2).
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    u, reach = torch.finfo(compute).eps / 2, 2 * exact.detach().abs().max()
    off = u * (d_vocab + 2 * reach + 8)
    assert loss.dtype == compute
    assert (loss - expected).abs() <= off + rows * u * expected
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    p = exact.detach().softmax(dim=1)
    bound = weight / rows * (p * (off + u * reach + 8 * u) + 4 * u)
    bound += exact.grad.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    assert ((logits.grad.double() - exact.grad).abs() <= bound).all()


@pytest.mark.parametrize("at_once", [1, 2**22])
def test_its_gradient_is_that_of_its_loss(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    logits, targets = drawn(5, 7, 3.0, seed=1)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), logits.requires_grad_())


def test_the_logits_stay_as_they_are():
    logits, targets = drawn(5, 7, 3.0, seed=1)
    before = logits.clone()
    cross_entropy(logits.requires_grad_(), targets).backward()
    assert torch.equal(logits, before)


class Made(TorchDispatchMode):
    """Holds every tensor as large as the logits that operations make, by its memory."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits
        self.large: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in [result] if isinstance(result, Tensor) else []:
            memory = tensor.untyped_storage()
            if memory.nbytes() >= self.logits.untyped_storage().nbytes():
                self.large[memory.data_ptr()] = tensor
        self.large.pop(self.logits.data_ptr(), None)
        return result


@pytest.mark.parametrize(("loss", "made"), [(cross_entropy, 1), (F.cross_entropy, 3)])
def test_only_the_gradient_is_as_large_as_the_logits(loss, made: int):
    logits, targets = drawn(200, 50_000, 1.0, seed=1)
    logits = logits.float().requires_grad_()
    with Made(logits) as mode:
        torch.autograd.grad(loss(logits, targets), logits)
    assert len(mode.large) == made
