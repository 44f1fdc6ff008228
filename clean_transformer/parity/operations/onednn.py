"""The rule for oneDNN's kernel of x Wᵀ + b, which `optimize` uses on some processors.

One call may also add another tensor to the product, or compute its GELU.
"""

import torch.nn.functional as F
from torch import Tensor

from clean_transformer.parity.limits import GELU, LINEAR
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import within
from clean_transformer.parity.scales import Size, gelu_scale, square, sum_scale, typical_size

# The largest slope of the GELU, rounded up: it multiplies the error of the product.
SLOPE_OF_GELU = 1.13


def linear_pointwise(call: Call64) -> list[Expected | None] | None:
    """The rule for `mkldnn::_linear_pointwise`.

    The kernel does not run in float64, so the exact output comes from the formula. The result is
    None, which means NOT CHECKED, if the kernel computes something else after the product.
    """
    named = call.named
    addends = [named[name] for name in ("B", "other") if named.get(name) is not None]
    attr, n_terms = named["attr"], named["X"].shape[-1]

    def terms(size: Size) -> Tensor:
        return sum(map(size, addends), F.linear(size(named["X"]), size(named["W"])))

    exact = terms(lambda x: x)
    scale = sum_scale(exact, terms, call.u)
    if attr == "gelu":
        approximate = named["algorithm"]
        healthy, _ = LINEAR.limits(n_terms, call.u)
        of_product = SLOPE_OF_GELU * healthy / GELU.healthy * scale
        allowed = gelu_scale(exact, approximate) + of_product
        return [within(GELU, call, F.gelu(exact, approximate=approximate), allowed)]
    if attr not in ("none", "add"):
        return None
    typical = typical_size(exact, terms(square))
    return [within(LINEAR, call, exact, scale, n_terms, lambda: typical)]
