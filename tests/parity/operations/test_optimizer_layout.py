"""Fused optimizers on the CPU read a parameter and its gradient in the order of their memory.

So the step is wrong if the two have different strides, such as a transposed parameter with a
contiguous gradient. `backward()` gives a gradient the strides of its parameter. The fault strikes
code that sets `grad` itself.
"""

import pytest
import torch
from torch import Tensor

from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.operations.known_issue import X86
from clean_transformer.parity.operations.leads import kind_of_device, match
from clean_transformer.parity.verdict import Verdict

W, GRADIENT = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
TRANSPOSED = W.T.contiguous().T
KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "_fused_adamw_": torch.optim.AdamW,
    "_fused_adam_": torch.optim.Adam,
    "_fused_sgd_": torch.optim.SGD,
    "_fused_adagrad_": torch.optim.Adagrad,
}


def step(kind: type[torch.optim.Optimizer], parameter: Tensor, *, fused: bool) -> Tensor:
    """The parameter after one step of the optimizer."""
    parameter = torch.nn.Parameter(parameter.clone(memory_format=torch.preserve_format))
    parameter.grad = GRADIENT.clone()
    kind([parameter], lr=0.1, fused=fused).step()  # type: ignore[call-arg]
    return parameter.detach()


def is_faulty(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether the PyTorch that runs has the fault: the probe of this known issue."""
    right, fused = (step(kind, TRANSPOSED, fused=fused) for fused in (False, True))
    return not torch.allclose(right, fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", KINDS)
def test_equal_layouts_are_right(operation: str) -> None:
    right, fused = (step(KINDS[operation], W, fused=fused) for fused in (False, True))
    torch.testing.assert_close(fused, right, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(kind_of_device("cpu") != X86, reason="seen on x86 only")
def test_the_fault_is_found_and_named_where_pytorch_has_it() -> None:
    assert check_operations(step, torch.optim.AdamW, W, fused=True).verdict is Verdict.PASS
    report = check_operations(step, torch.optim.AdamW, TRANSPOSED, fused=True)
    if not is_faulty(torch.optim.AdamW):
        assert report.verdict is Verdict.PASS, "KNOWN_ISSUES needs `fixed_in`"
        return
    assert report.finding is not None
    assert report.finding.verdict is Verdict.WRONG
    assert [issue.name for issue in match(report.finding)] == ["fused-optimizer-layout"]


@pytest.mark.skipif(
    kind_of_device("cpu") != X86 or not torch.__version__.startswith("2.13."),
    reason="seen with torch 2.13 on x86",
)
@pytest.mark.parametrize("operation", KINDS)
def test_every_fused_optimizer_of_this_version_has_it(operation: str) -> None:
    assert is_faulty(KINDS[operation])
