"""How far rounding alone may move the output of any module: derived, not measured on a device.

The module runs in float64. After each operation, every element of the result moves by a normal
random number times the operation's own u G (see `parity/limits.py`): as if a device had rounded it
(Monte Carlo arithmetic, Parker 1997). How far that moves the output is what a healthy device may be
off, in any order of summation. No kernel of the device's precision takes part, so a wrong kernel
cannot make the allowance larger.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.operations.bounds import PRODUCTS, WITHOUT_VALUES, expected_outputs
from clean_transformer.parity.operations.replay import Call64, operation_name
from clean_transformer.parity.oracle import UNIT_ROUNDOFF


class RandomRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that rounds the results of float64 operations as if they were in `dtype`.

    Products are rounded as if they were in `products`, which differs from `dtype` under autocast.
    """

    def __init__(self, dtype: torch.dtype, products: torch.dtype | None = None, seed: int = 0):
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.products = dtype, products or dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, keywords = operation_name(func), kwargs or {}
        if name in WITHOUT_VALUES:
            return func(*args, **keywords)
        dtype = self.products if name in PRODUCTS else self.dtype
        # An operation without a rule draws random numbers or moves memory: it rounds nothing.
        expected = expected_outputs(Call64(func, args, keywords, dtype)) or []
        output = func(*args, **keywords)
        for value, wanted in zip(tree_leaves(output), expected, strict=False):
            if wanted is None or wanted.scale is None or not value.is_floating_point():
                continue
            moved = torch.randn(value.shape, generator=self.generator, dtype=value.dtype)
            value.add_(moved * UNIT_ROUNDOFF[dtype] * wanted.scale.nan_to_num(0.0))
        return output
