"""Alternative kernels for `x W + b`, optionally with the GELU or the residual add that follows.

`kernel_for` returns the kernel for a dtype. All kernels compute the same function up to rounding.
The kernel in `int8` also rounds the weights to 8 bits.
"""

import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clean_transformer.inference.huge_pages import use_huge_pages
from clean_transformer.reports.environment import processor

Rows = Float[Tensor, "row d_in"]
Output = Float[Tensor, "row d_out"]


# Below this number of rows of x, reading W takes longer than computing, and in half precision
# `torch.addmm` is the fastest kernel.
FEW_ROWS = 4


class Weight(NamedTuple):
    """A weight `W`, row-major or column-major in memory, and a bias `b`."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Matmul:
    """PyTorch's default kernel: one `torch.addmm`. This is the base class of the other kernels."""

    column_major = False  # whether the weights of a block are column-major in memory

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Any:
        """Return the argument `weight` for the other methods. Only `Int8` copies W."""
        use_huge_pages(W)
        return Weight(W, b)

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        return torch.addmm(weight.b, x, weight.W)

    def gelu(self, x: Rows, weight: Any) -> Output:
        """Return gelu_new(x W + b), with the tanh approximation that GPT-2 uses."""
        # A GELU in place saves memory traffic: 10% of the time of W_in at one row.
        return torch.ops.aten.gelu_(self(x, weight), approximate="tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b as a new tensor."""
        return (residual + weight.b).addmm_(x, weight.W)


class OneDNNGelu(Matmul):
    """Like `Matmul`, but one kernel of oneDNN computes x W + b and the GELU, for 4 rows or more.

    The kernel does not support gradients. `torch.compile` cannot trace the kernel, and some builds
    of PyTorch do not have it. Then `Matmul.gelu` is used instead.
    """

    column_major = True

    def gelu(self, x: Rows, weight: Any) -> Output:
        """Return gelu_new(x W + b)."""
        # For fewer rows, `Matmul` is as fast in bfloat16, and 13% faster per block in float16.
        linear = onednn_linear()
        if len(x) < FEW_ROWS or linear is None or torch.compiler.is_compiling():
            return super().gelu(x, weight)
        return linear.default(x, weight.W.T, weight.b, "gelu", [], "tanh")


class OneDNN(Matmul):
    """oneDNN computes x W + b and the GELU or the residual add that follows, in one kernel.

    The kernel does not support gradients.
    """

    # The kernel reads column-major weights faster than row-major ones if there is one row.
    column_major = True

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b."""
        if torch.compiler.is_compiling():
            return traceable_linear(x, weight.W.T, weight.b)
        return onednn_linear().default(x, weight.W.T, weight.b, "none", [], "")

    def gelu(self, x: Rows, weight: Any) -> Output:
        """Return gelu_new(x W + b)."""
        if torch.compiler.is_compiling():
            return super().gelu(x, weight)
        return onednn_linear().default(x, weight.W.T, weight.b, "gelu", [], "tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """Return residual + x W + b as a new tensor."""
        if torch.compiler.is_compiling():
            return residual + self(x, weight)
        return onednn_linear().binary(x, residual, weight.W.T, weight.b, "add")


def onednn_linear() -> Any:
    """Return oneDNN's kernel, a private operation of PyTorch, or None if this build has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's kernel, and `torch.backends.mkldnn` is enabled."""
    backend = torch.backends.mkldnn
    is_there: bool = backend.is_available()  # type: ignore[no-untyped-call]
    return is_there and bool(backend.enabled) and onednn_linear() is not None


# `torch.compile` cannot trace oneDNN's kernel, but it can call this operation.
@torch.library.custom_op("clean_transformer::onednn_linear", mutates_args=())
def traceable_linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return x Wᵀ + b for x [row d_in], W [d_out d_in] and b [d_out]."""
    product: Tensor = onednn_linear().default(x, W, b, "none", [], "")
    return product


@traceable_linear.register_fake
def _shape_of_product(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(len(x), len(b))


class ThroughFloat32(Matmul):
    """Computes half-precision products in float32, and rounds the result at the end.

    On a processor without instructions for half precision, this is faster than `Matmul` for 4 rows
    or more. The kernel converts the weights of `at_a_time` output features at a time.
    """

    column_major = True

    def __init__(self, at_a_time: int = 4096):
        self.at_a_time = at_a_time

    def __call__(self, x: Rows, weight: Any) -> Output:
        """Return x W + b, computed in float32 and rounded to the dtype of x."""
        if len(x) < FEW_ROWS:
            return super().__call__(x, weight)
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


def kernel_for(dtype: torch.dtype, device: torch.device) -> Matmul:
    """Return the kernel for weights with this dtype on this device.

    The result depends only on the arguments, the processor, the build of PyTorch, and whether
    `torch.backends.mkldnn` is enabled. So every process on a machine uses the same kernel.
    README.md shows the measurements behind this rule.
    """
    if device.type != "cpu" or dtype == torch.float64:
        return Matmul()
    if dtype == torch.float32:
        return OneDNN() if has_onednn() and mkl_reads_with_one_thread() else Matmul()
    return OneDNNGelu() if has_instructions(dtype) else ThroughFloat32()


def mkl_reads_with_one_thread() -> bool:
    """Whether PyTorch multiplies a single row with MKL, and on a processor of AMD.

    There, MKL reads the weight with one thread, however many it has.
    """
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    # Windows calls every 64-bit processor of this kind "AMD64".
    return has_mkl and re.search(r"AMD(?!64)", processor()) is not None


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies bfloat16 or float16 with this processor's own instructions."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # These operations are private, so a build of PyTorch may lack them.
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    is_supported = getattr(torch.ops.mkldnn, asked[dtype], None)
    return is_supported is not None and bool(is_supported())
