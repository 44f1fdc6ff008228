"""Makes the oracle: a float64 copy of a module on the CPU, whose results count as exact.

The file also has the unit roundoff and the underflow threshold of each dtype.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from clean_transformer.parity.elementary import Elementary
from clean_transformer.support.replaced import replaced

M = TypeVar("M", bound=nn.Module)

# The unit roundoff u of each dtype: the largest relative error of one rounding.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Lower precisions that a device may use for float32 products if a setting allows them. The keys are
# the unit roundoffs of these precisions.
LOWER_PRECISION = {
    UNIT_ROUNDOFF[torch.float16]: "TF32",  # TF32 has as many mantissa bits as float16
    UNIT_ROUNDOFF[torch.bfloat16]: "bfloat16",
}

# The setting of `torch.nn.attention.flex_attention` that turns off its compilation.
UNCOMPILED = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"

# The unit roundoff of float32, in which kernels accumulate half-precision products.
ACCUMULATOR = UNIT_ROUNDOFF[torch.float32]


def smallest_kept(dtype: torch.dtype) -> float:
    """The underflow threshold η of a dtype: devices may flush smaller numbers to 0.

    η is the smallest normal number of the dtype. Float16 is an exception: η is the smallest
    subnormal number, because devices keep the subnormal numbers of float16.
    """
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(dtype).tiny)


@contextmanager
def trusted() -> Iterator[None]:
    """Turn off all of PyTorch's dispatch modes inside a `with` block, except `Elementary`.

    The device faults in `parity/faults` are dispatch modes, so they do not affect operations in
    this block. `Elementary` computes LayerNorm, softmax and GELU in float64 without the CPU's fused
    kernels. So a faulty fused kernel does not make the exact results wrong. Functions
    that were compiled with `torch.compile` run uncompiled.
    """
    with _disable_current_modes(), Elementary(), uncompiled(), uncompiled_flex_attention():
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled functions as they are written, inside a `with` block.

    Before PyTorch 2.6, nothing changes.
    """
    # Without Dynamo, nothing is compiled, and loading it takes seconds.
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def uncompiled_flex_attention() -> Iterator[None]:
    """Run PyTorch's `flex_attention` without compiling it, inside a `with` block.

    By default, `flex_attention` compiles itself, and then it does not run under dispatch modes such
    as the checks of this package. Raises `NotImplementedError` if the PyTorch that runs cannot turn
    this off, and if `flex_attention` has failed for this reason.
    """
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None and hasattr(flex, UNCOMPILED):
        with replaced(flex, UNCOMPILED, True):
            yield
        return
    try:
        yield
    except RuntimeError as error:
        if "flex_attention" not in str(error):
            raise
        raise NotImplementedError(
            f"NOT CHECKED: PyTorch {torch.__version__} cannot run flex_attention uncompiled, which "
            "the check needs; a newer PyTorch can"
        ) from error


def float64_oracle(module: M) -> M:
    """Return a float64 copy of the module on the CPU. The module itself stays unchanged.

    The device of the module need not support float64.
    """
    with trusted():
        return deepcopy(module).cpu().double()
