"""The gradients of a module, and rows whose whole error is that of one number."""

from copy import deepcopy
from functools import reduce

import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.uses.backward import Flow, gradients_of
from clean_transformer.parity.uses.module_gradients import judge_module
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Verdict

from ..small import F32

N_ROWS, N_TERMS = 1000, 256
# Every partial sum is about as large as the first term, so that each addition rounds as much.
LARGE = 1000.0


class Sums(nn.Module):
    """Multiplies the sum of each row of its input by a row of parameters."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(N_ROWS, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=-1, keepdim=True) * self.w


def judged(factor: float) -> Isolated:
    """Judge the gradient of `Sums.w` on a device that adds in order.

    The last row of the gradient is multiplied by `factor`.
    """
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(1, N_ROWS, N_TERMS, generator=generator)
    x[..., 0] = LARGE
    # The sums differ a lot in size, but not in their errors.
    x[..., -1] = 10 ** torch.linspace(0, 4, N_ROWS) - LARGE
    module = Sums()
    output = module(x).detach()
    of_output = torch.randn(output.shape, generator=generator)
    of_x, _ = gradients_of(module, x, of_output)
    of_w = reduce(torch.add, x[0].unbind(dim=-1))[:, None] * of_output[0]
    of_w[-1] *= factor
    use = Use("training", "training", 1, (N_ROWS,))
    flow = Flow(x, output, of_x, of_output)
    rows = judge_module("sums", use, flow, {"sums.w": of_w}, deepcopy(module).double(), F32, None)
    assert [row.verdict for row in rows[:-1]] == [Verdict.PASS] * 2
    assert isinstance(rows[-1], Isolated)
    return rows[-1]


def test_a_row_whose_error_is_that_of_one_number_passes():
    """Two draws under random rounding nearly cancel in some rows, and a sum's error passes 4."""
    row = judged(1.0)
    assert row.verdict is Verdict.PASS, row
    assert row.ratio > 4


def test_a_wrong_row_is_found():
    row = judged(1.01)
    assert (row.verdict, row.worst_index) == (Verdict.WRONG, (N_ROWS - 1,))
