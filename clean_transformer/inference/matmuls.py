"""Alternative kernels for `x W + b`, optionally with the GELU or the residual add that follows.

`autotune` measures which kernel is the fastest for given shapes. All kernels compute the same
function up to rounding. The kernel in `int8` also rounds the weights to 8 bits.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "row d_in"]


Output = Float[Tensor, "row d_out"]


class Weight(NamedTuple):
    """A weight `W`, row-major or column-major in memory, and a bias `b`."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Matmul:
    """PyTorch's default kernel: one `torch.addmm`. This is the base class of the other kernels."""

    most_rows = math.inf  # `autotune` measures this kernel only up to this number of rows

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Any:
        """Return the argument `weight` for the other methods. Only `Int8` copies W."""
        return Weight(W, b)

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        return torch.addmm(weight.b, x, weight.W)

    def gelu(self, x: Rows, weight: Any) -> Output:
        """Return gelu_new(x W + b), with the tanh approximation that GPT-2 uses."""
        return F.gelu(self(x, weight), approximate="tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b as a new tensor."""
        return (residual + weight.b).addmm_(x, weight.W)


class SeparateBias(Matmul):
    """Computes the product x W without the bias, and then adds the bias.

    If x has one row, some BLAS libraries are faster when they write the product to a new output
    than when they add the product to an existing output.
    """

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        return (x @ weight.W).add_(weight.b)

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b as a new tensor."""
        return self(x, weight).add_(residual)


class SplitInputs(SeparateBias):
    """Splits the input features into one group per thread, and sums the products of the groups.

    Some BLAS libraries use only one thread if x has a single row. This kernel uses all threads:
    each thread multiplies the inputs and weights of one group.
    """

    most_rows = 8

    def __init__(self, n_threads: int):
        self.n_threads = n_threads

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        d_in, d_out = weight.W.shape
        if d_in % self.n_threads:
            return super().__call__(x, weight)
        parts = (self.n_threads, d_in // self.n_threads)
        x = x.view(len(x), *parts).transpose(0, 1)
        return torch.bmm(x, weight.W.view(*parts, d_out)).sum(dim=0).add_(weight.b)


class OneDNN(Matmul):
    """oneDNN's kernels, which fuse the GELU or the residual add into the product.

    The kernels do not support gradients, and are missing in some builds of PyTorch. `torch.compile`
    cannot trace the kernels, so a compiled graph uses `Matmul` instead.
    """

    def __init__(self) -> None:
        self.linear = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        if torch.compiler.is_compiling():
            return super().__call__(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "none", [], "")

    def gelu(self, x: Rows, weight: Any) -> Output:
        """Return gelu_new(x W + b) from one kernel."""
        if torch.compiler.is_compiling():
            return super().gelu(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "gelu", [], "tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b from one kernel."""
        if torch.compiler.is_compiling():
            return super().add(residual, x, weight)
        return self.linear.binary(x, residual, weight.W.T, weight.b, "add")


class ThroughFloat32(Matmul):
    """Computes half-precision products in float32, and rounds the result at the end.

    This is much faster on a processor without instructions for half precision. The kernel converts
    the weights of `at_a_time` output features at a time.
    """

    def __init__(self, at_a_time: int = 4096):
        self.at_a_time = at_a_time

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b, computed in float32 and rounded once to the dtype of x."""
        output, x = x.new_empty(len(x), len(weight.b)), x.float()
        # The converted weights of one part fit in a small buffer, which PyTorch can reuse. For a
        # large buffer, PyTorch would get new memory from the operating system each time, and this
        # would take as long as writing the converted weights.
        parts = (output.T, weight.W.T, weight.b)
        for rounded, W, b in zip(*(each.split(self.at_a_time) for each in parts), strict=True):
            rounded.T.copy_(torch.addmm(b.float(), x, W.T.float()))
        return output

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + (x W + b). x W + b is rounded to half precision before the addition."""
        return residual + self(x, weight)
