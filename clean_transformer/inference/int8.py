"""The kernel for weights in 8 bits. The inputs and the sums stay in float32."""

import warnings
from functools import cache
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float
from jaxtyping import Int8 as Int8Tensor
from torch import Tensor

from clean_transformer.inference.huge_pages import use_huge_pages
from clean_transformer.inference.matmuls import Matmul, Output, Rows

# 16 weights of one output feature have a common scale. Larger groups are less accurate.
GROUP = 16

# The C++ kernel computes 64 output features at a time. Their weights are next to each other.
TILE = 64

# For more rows, converting the weights to float32 costs less than the C++ kernel.
MOST_ROWS = 8

# Without the C++ kernel, so many tiles are converted to float32 at a time, in a small buffer.
AT_A_TIME = 16

FLAGS = ["-O3", "-march=native", "-fopenmp"]


class NoInt8Kernel(UserWarning):
    """Warns that the C++ kernel could not be compiled, so that 8-bit weights are slow."""


class Int8Weight(NamedTuple):
    """A weight rounded to 8 bits, and a bias. `W * step` is approximately the original weight.

    `W` holds integers from −127 to 127. Each 16 inputs of an output feature have one scale in
    `step`. Inputs and outputs are padded with zeros to whole groups and tiles. `b` is the bias in
    float32.
    """

    W: Int8Tensor[Tensor, "tile group 16 64"]
    step: BFloat16[Tensor, "tile group 64"]
    b: Float[Tensor, "d_out"]

    def floats(self, d_in: int) -> Float[Tensor, "d_in tile_64"]:
        """Return the rounded weights of all tiles in float32, without the padding of the inputs."""
        rounded = self.W * self.step.float()[:, :, None]
        return rounded.permute(1, 2, 0, 3).reshape(-1, len(self.W) * TILE)[:d_in]


class Int8(Matmul):
    """Computes x W + b in float32 with W rounded to 8 bits.

    With its scales, an 8-bit weight takes 28% of the bytes of a float32 weight. For at most
    `MOST_ROWS` rows, a C++ kernel reads the 8-bit weights directly. PyTorch compiles this kernel
    once per machine. For more rows, and without a C++ compiler, the weights are converted to
    float32 piece by piece.
    """

    def __init__(self) -> None:
        self.few_rows = compiled_kernel()

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Int8Weight:
        """Return an 8-bit copy of the weights. The error of a weight is at most half its scale."""
        d_in, d_out = W.shape
        padded = F.pad(W.detach().float(), (0, -d_out % TILE, 0, -d_in % GROUP))
        groups = padded.view(-1, GROUP, padded.shape[1] // TILE, TILE).permute(2, 0, 1, 3)
        # The scales are rounded first, so that the error of a weight is at most half of a rounded
        # scale. No weight exceeds 127 scales by more than 2⁻⁹, so none is rounded to 128.
        step = (groups.abs().amax(dim=2) / 127).bfloat16()
        smallest = torch.finfo(torch.bfloat16).tiny  # avoids 0 / 0 in a group of zeros
        whole = (groups / step.float().clamp(min=smallest)[:, :, None]).round_().to(torch.int8)
        weight = Int8Weight(whole.contiguous(), step.contiguous(), b.float())
        use_huge_pages(weight.W)
        return weight

    def __call__(self, x: Rows, weight: Int8Weight) -> Output:
        """Return x W + b in the dtype of x."""
        rows = x.float()
        if self.few_rows is not None and len(x) <= MOST_ROWS:
            return self.few_rows(rows, weight.W, weight.step, weight.b).to(x.dtype)
        pieces = zip(weight.W.split(AT_A_TIME), weight.step.split(AT_A_TIME), strict=True)  # type: ignore[no-untyped-call]
        products = [rows @ Int8Weight(*piece, weight.b).floats(x.shape[1]) for piece in pieces]
        return torch.cat(products, dim=1)[:, : len(weight.b)].add(weight.b).to(x.dtype)

    def add(self, residual: Output, x: Rows, weight: Int8Weight) -> Output:
        """Return residual + x W + b as a new tensor."""
        return self(x, weight).add_(residual)


@cache
def compiled_kernel() -> Any:
    """Compile the C++ kernel, and return its PyTorch operator; None if it cannot be compiled.

    PyTorch keeps the compiled kernel in its folder for extensions, so only the first call on a
    machine takes long (half a minute). The warning `NoInt8Kernel` says why there is no kernel.
    """
    from torch.utils import cpp_extension  # takes a second to import

    source, processor = Path(__file__).with_suffix(".cpp"), torch.backends.cpu.get_cpu_capability()
    wide = ["-mprefer-vector-width=512"] if processor == "AVX512" else []
    try:
        cpp_extension.load(
            f"clean_transformer_int8_{processor.lower()}",
            str(source),
            extra_cflags=[*FLAGS, *wide],
            is_python_module=False,
        )
    except (OSError, RuntimeError, CalledProcessError) as error:  # torch 2.4 raises the last one
        warnings.warn(
            "8-bit weights are slow here, because their C++ kernel could not be compiled: "
            f"{str(error).strip().splitlines()[0]}",
            NoInt8Kernel,
            stacklevel=2,
        )
        return None

    @torch.library.register_fake("clean_transformer::int8_linear")  # type: ignore[untyped-decorator]
    def shape_of_output(x: Tensor, W: Tensor, step: Tensor, b: Tensor) -> Tensor:
        return x.new_empty(len(x), len(b))

    return torch.ops.clean_transformer.int8_linear.default
