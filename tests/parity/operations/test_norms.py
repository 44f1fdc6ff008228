"""Operations of other models than GPT-2: what is healthy passes, and what is wrong is found."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.parity import check_operations
from clean_transformer.parity.faults.corruptions import with_result
from clean_transformer.parity.verdict import Verdict

from ..small import broken


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained_batch_norm(*, training: bool) -> nn.Module:
    norm = nn.BatchNorm1d(16)
    with torch.no_grad():
        norm.running_mean.fill_(1.0)
        norm.bias.fill_(0.3)
    return norm.train(training)


# Inputs whose mean is not 0, so that the norm subtracts large numbers.
CASES = {
    "native_batch_norm": (trained_batch_norm(training=False), sample(200, 16) + 1),
    "batch norm, training": (trained_batch_norm(training=True), sample(200, 16) + 1),
    "native_group_norm": (nn.GroupNorm(4, 16), sample(4, 16, 8).abs() + 1),
    "group norm, 1000": (nn.GroupNorm(4, 16), sample(4, 16, 8) + 1000),
    "instance norm": (nn.InstanceNorm1d(16, affine=True), sample(4, 16, 8).abs()),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), sample(2, 4, 7, 7)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, stride=2), sample(2, 4, 5, 5)),
}


def run(module: nn.Module, x: Tensor) -> None:
    output = module(x)
    torch.autograd.grad(output, [x, *module.parameters()], output.detach().cos())


@pytest.mark.parametrize("case", CASES)
def test_a_healthy_norm_or_convolution_passes_forward_and_backward(case: str) -> None:
    module, x = CASES[case]
    report = check_operations(run, module, x.clone().requires_grad_())
    assert (report.finding, dict(report.not_checked)) == (None, {})
    assert report.verdict is Verdict.PASS


def off(output: Any) -> Any:
    first, *others = output if isinstance(output, tuple) else (output,)
    return (first * 1.5, *others) if others else first * 1.5


@pytest.mark.parametrize("name", ["native_batch_norm", "native_group_norm", "convolution"])
@pytest.mark.parametrize("suffix", ["", "_backward"])
def test_a_wrong_norm_or_convolution_is_wrong(name: str, suffix: str) -> None:
    module, x = CASES[name]
    with broken(name + suffix, with_result(off)):
        report = check_operations(run, module, x.clone().requires_grad_())
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert report.finding.call.name == name + suffix


def test_a_gradient_that_is_not_asked_for_is_left_out() -> None:
    convolution, x = nn.Conv2d(3, 4, 3), sample(2, 3, 8, 8)
    report = check_operations(lambda: convolution(x).sum().backward())
    assert "convolution_backward" in report.compared
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("mode", ["trunc", "floor"])
def test_a_quotient_at_an_integer_may_be_rounded_to_either_side(mode: str) -> None:
    x, y = torch.arange(1.0, 50.0), torch.tensor(0.1)
    assert check_operations(torch.div, x, y, rounding_mode=mode).verdict is Verdict.PASS
    with broken("div", with_result(lambda output: output + 2)):
        assert check_operations(torch.div, x, y, rounding_mode=mode).verdict.is_bad
    with broken("div", with_result(lambda output: output + 1)):
        assert check_operations(torch.div, x + 0.05, y * 10, rounding_mode=mode).verdict.is_bad


def test_an_operation_without_a_rule_is_never_called_wrong() -> None:
    x = sample(1, 2, 224, 224)
    resized = check_operations(F.interpolate, x, size=(300, 300), mode="bilinear")
    assert resized.verdict is Verdict.NOT_CHECKED
    assert resized.not_checked == {"upsample_bilinear2d": 1}
    assert resized.largest["upsample_bilinear2d"] > 30  # what PyTorch rounds inside is unknown
    assert check_operations(torch.lgamma, sample(99).abs()).verdict is Verdict.PASS


def test_the_limit_of_a_variance_is_that_of_its_own_row() -> None:
    x = sample(3, 64)
    x[0] += 3000

    def wrong(output: Tensor) -> Tensor:
        output[1:] = 0.5
        return output

    assert check_operations(torch.var, x, -1).verdict is Verdict.PASS
    assert check_operations(torch.var, torch.full((3, 64), 0.1), -1).verdict is Verdict.PASS
    assert check_operations(torch.var, x).verdict is Verdict.PASS
    with broken("var", with_result(wrong)):
        assert check_operations(torch.var, x, -1).verdict is Verdict.WRONG


def test_a_draw_without_replacement_repeats_no_index() -> None:
    weights = sample(4, 100).abs()
    assert check_operations(torch.multinomial, weights, 5).verdict is Verdict.PASS
    with broken("multinomial", with_result(lambda drawn: drawn[..., :1].expand_as(drawn))):
        assert check_operations(torch.multinomial, weights, 5).verdict is Verdict.WRONG
        assert check_operations(torch.multinomial, weights, 5, True).verdict is Verdict.PASS
