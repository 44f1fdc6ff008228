"""Alternative kernels for `x W + b`, optionally with the GELU or the residual add that follows.

`autotune` measures which of them is the fastest for given sizes. They all compute the same function
up to rounding, except `Int8`, which also rounds the weights and the inputs to 8 bits.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from jaxtyping import Int8 as Int8Tensor
from torch import Tensor

Rows = Float[Tensor, "row d_in"]


Output = Float[Tensor, "row d_out"]


class Weight(NamedTuple):
    """W [d_in d_out], row-major or column-major in memory, and b [d_out]."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Matmul:
    """One `torch.addmm`, which is what PyTorch uses by default. The base class of the others."""

    most_rows = math.inf  # for more rows than this, autotune does not try the kernel

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Any:
        """Return the weights in the form that this kernel reads. Only `Int8` copies them."""
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
    """A product without the bias, and then an add.

    Some BLAS libraries are faster for one row if they do not have to add to an existing output.
    """

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        return (x @ weight.W).add_(weight.b)

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b as a new tensor."""
        return self(x, weight).add_(residual)


class SplitInputs(SeparateBias):
    """One product per thread, each over a part of the input features, and then their sum.

    Some BLAS libraries use only one thread for a product of a single row. This kernel makes all
    threads read a part of the weights.
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

    They have no gradients, and not every build of PyTorch has them. `torch.compile` cannot trace
    them, so that a compiled graph uses `Matmul` instead.
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
    """Half precision, computed in float32 and rounded once at the end.

    It is much faster on a processor without instructions for half precision. It converts only
    `at_a_time` output features at once, so that a small buffer is used again and again: to get new
    memory from the operating system takes as long as to fill it.
    """

    def __init__(self, at_a_time: int = 4096):
        self.at_a_time = at_a_time

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b, rounded once."""
        output, x = x.new_empty(len(x), len(weight.b)), x.float()
        parts = (output.T, weight.W.T, weight.b)
        for rounded, W, b in zip(*(each.split(self.at_a_time) for each in parts), strict=True):
            rounded.T.copy_(torch.addmm(b.float(), x, W.T.float()))
        return output

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + (x W + b), rounded after each of the two sums."""
        return residual + self(x, weight)


class Int8Weight(NamedTuple):
    """W as 8-bit integers, column-major; the step of each output feature; and b in float32.

    The weight itself is about `W * step`.
    """

    W: Int8Tensor[Tensor, "d_in d_out"]
    step: Float[Tensor, "d_out"]
    b: Float[Tensor, "d_out"]


class Int8(Matmul):
    """An 8-bit product: a quarter of float32's bytes to read, and less accurate.

    Each row of x and each column of W is divided by its own step and rounded to −127 … 127. The
    products are summed exactly in 32 bits (Dettmers et al. 2022, section 2.1).
    """

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Int8Weight:
        """Return an 8-bit copy of the weights. Raises `ValueError` if d_in is 1."""
        if len(W) == 1:  # torch._int_mm returns wrong numbers for it (PyTorch 2.13)
            raise ValueError(
                "8-bit weights need 2 or more input features, and W has 1; leave out weights='int8'"
            )
        whole, step = to_int8(W.detach().T.float().contiguous())
        return Int8Weight(whole.T, step.flatten(), b.float())

    def __call__(self, x: Rows, weight: Int8Weight) -> Output:
        """Return x W + b in the dtype of x, with x and W rounded to 8 bits."""
        whole, step = to_int8(x.float())  # the sums can exceed the range of float16
        sums = torch._int_mm(whole, weight.W)
        return torch.addcmul(weight.b, sums * step, weight.step).to(x.dtype)

    def add(self, residual: Output, x: Rows, weight: Int8Weight) -> Output:
        """Return residual + x W + b as a new tensor."""
        return self(x, weight).add_(residual)


def to_int8(
    x: Float[Tensor, "row column"],
) -> tuple[Int8Tensor[Tensor, "row column"], Float[Tensor, "row 1"]]:
    """Return x as integers from −127 to 127, and the step of each row; x is about their product.

    The step of a row is a 127th of its largest absolute value.
    """
    step = x.abs().amax(dim=1, keepdim=True) / 127
    smallest = torch.finfo(x.dtype).tiny  # avoids 0 / 0 in a row of zeros
    return (x / step.clamp(min=smallest)).round_().to(torch.int8), step
