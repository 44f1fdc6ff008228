"""TODO inference/matmuls."""

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
    """W [d_in d_out], in either order in memory, and b [d_out]."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Product:
    """x W + b in one call of the BLAS: what PyTorch does by itself."""

    most_rows = math.inf  # with more, it cannot be the fastest

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Any:
        """What it reads the weights from: for most, the very same memory."""
        return Weight(W, b)

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b."""
        return torch.addmm(weight.b, x, weight.W)

    def gelu(self, x: Rows, weight: Any) -> Output:
        """gelu(x W + b), in GPT-2's tanh form."""
        return F.gelu(self(x, weight), approximate="tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, in new memory."""
        return (residual + weight.b).addmm_(x, weight.W)


class WithoutBias(Product):
    """The bias by itself: in some BLAS a product of one row is faster when it adds to nothing."""

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W, then + b."""
        return (x @ weight.W).add_(weight.b)

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """x W, then + b, then + residual."""
        return self(x, weight).add_(residual)


class EachThreadItsInputs(WithoutBias):
    """As many products as threads, each of a part of the inputs: some BLAS reads the weights of a
    single row with one thread only."""

    most_rows = 8

    def __init__(self, n_threads: int):
        self.n_threads = n_threads

    def __call__(self, x: Rows, weight: Any) -> Output:
        """The sum over parts of the inputs of x W, then + b."""
        d_in, d_out = weight.W.shape
        if d_in % self.n_threads:
            return super().__call__(x, weight)
        parts = (self.n_threads, d_in // self.n_threads)
        x = x.view(len(x), *parts).transpose(0, 1)
        return torch.bmm(x, weight.W.view(*parts, d_out)).sum(dim=0).add_(weight.b)


class OneDNN(Product):
    """oneDNN's kernels, which take the GELU and the residual into the product. No gradients.

    Not in every build of PyTorch, and not in a graph of `torch.compile`, which gets the BLAS's.
    """

    def __init__(self) -> None:
        self.linear = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b."""
        if torch.compiler.is_compiling():
            return super().__call__(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "none", [], "")

    def gelu(self, x: Rows, weight: Any) -> Output:
        """gelu(x W + b), in one kernel."""
        if torch.compiler.is_compiling():
            return super().gelu(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "gelu", [], "tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, in one kernel."""
        if torch.compiler.is_compiling():
            return super().add(residual, x, weight)
        return self.linear.binary(x, residual, weight.W.T, weight.b, "add")


class InFloat32(Product):
    """Half precision through float32: far faster where the processor has no instructions for it,
    and rounded once, at the end.

    So many outputs at a time that what is in float32 fits into memory that the process has already:
    to be given new memory takes as long as to fill it.
    """

    def __init__(self, at_a_time: int = 4096):
        self.at_a_time = at_a_time

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b in float32, then rounded."""
        output, x = x.new_empty(len(x), len(weight.b)), x.float()
        parts = (output.T, weight.W.T, weight.b)
        for rounded, W, b in zip(*(each.split(self.at_a_time) for each in parts), strict=True):
            rounded.T.copy_(torch.addmm(b.float(), x, W.T.float()))
        return output

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, each sum rounded."""
        return residual + self(x, weight)


class Int8Weight(NamedTuple):
    """W in 8 bits, transposed in memory, the size of a step of each output, and b."""

    W: Int8Tensor[Tensor, "d_in d_out"]
    step: Float[Tensor, "d_out"]
    b: Float[Tensor, "d_out"]


class Int8(Product):
    """Weights and rows in 8 bits, each output and each row with a step of its own, summed exactly
    in 32 bits (Dettmers et al. 2022, section 2.1): a quarter of float32's memory to read."""

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Int8Weight:
        """A copy of the weights in 8 bits. Raises `ValueError` for weights of a single input."""
        if len(W) == 1:  # of which torch._int_mm makes something else (seen in PyTorch 2.13)
            raise ValueError("weights of a single input cannot be in 8 bits")
        whole, step = in_8_bits(W.detach().T.float().contiguous())
        return Int8Weight(whole.T, step.flatten(), b.float())

    def __call__(self, x: Rows, weight: Int8Weight) -> Output:
        """x W + b, each factor rounded to 127 steps on both sides of zero."""
        whole, step = in_8_bits(x.float())  # float16 cannot hold the sums
        sums = torch._int_mm(whole, weight.W)
        return torch.addcmul(weight.b, sums * step, weight.step).to(x.dtype)

    def add(self, residual: Output, x: Rows, weight: Int8Weight) -> Output:
        """residual + x W + b."""
        return self(x, weight).add_(residual)


def in_8_bits(
    x: Float[Tensor, "row column"],
) -> tuple[Int8Tensor[Tensor, "row column"], Float[Tensor, "row 1"]]:
    """Each row in whole steps of a 127th of its largest entry, and those steps."""
    step = x.abs().amax(dim=1, keepdim=True) / 127
    smallest = torch.finfo(x.dtype).tiny  # a row of zeros has steps, too
    return (x / step.clamp(min=smallest)).round_().to(torch.int8), step


# What is read between two uses of the same weights, so that no cache holds them, in bytes.
STREAMED = 128 * 2**20
