"""Estimates how much rounding alone changes a module's output, without running a device.

The module runs in float64 under `RandomRounding`, which adds a random number to every element of
each operation's result, as if a device had rounded the element (Monte Carlo arithmetic, Parker
1997). The random number is normal. Its standard deviation is u G, about the size of one rounding
error (see `parity/limits.py`). The output then changes about as much as on a healthy device, in
whatever order the device sums. No kernel in the device's dtype runs here, so a wrong kernel cannot
make the allowed error larger.
"""

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.operations.bounds import (
    PRODUCTS,
    RULES,
    WITHOUT_VALUES,
    expected_outputs,
)
from clean_transformer.parity.operations.replay import (
    Call64,
    Expected,
    computed,
    operation_name,
)
from clean_transformer.parity.operations.rules import equal
from clean_transformer.parity.oracle import UNIT_ROUNDOFF


class RandomRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that adds random errors to the results of float64 operations.

    The errors are as large as the errors of rounding to `dtype`. The errors of matrix products are
    as large as those of rounding to `products`, which is `dtype` by default. Under autocast, pass
    the autocast dtype as `products`. `seed` seeds the random numbers.
    """

    # Higher-order operators such as `flex_attention` run without random errors. This does not make
    # the allowed error larger.
    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype, products: torch.dtype | None = None, seed: int = 0):
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.products = dtype, products or dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **keywords)
        name = operation_name(func)
        if name in WITHOUT_VALUES or RULES.get(name) is equal:  # these operations do not round
            return func(*args, **keywords)
        dtype = self.products if name in PRODUCTS else self.dtype
        # An operation without expected outputs draws random numbers or moves memory. It does not
        # round, so its result stays unchanged.
        expected = expected_outputs(Call64(func, args, keywords, dtype)) or []
        output = self._exact(func, expected)
        if output is None:
            output = func(*args, **keywords)
        results = tree_leaves(computed(func, args, keywords, output))
        for value, wanted in zip(results, expected, strict=False):
            if wanted is None or wanted.scale is None or not value.is_floating_point():
                continue
            moved = torch.randn(value.shape, generator=self.generator)
            value.add_(moved * wanted.scale.nan_to_num(0.0, posinf=0.0), alpha=UNIT_ROUNDOFF[dtype])
        return output

    @staticmethod
    def _exact(func: Any, expected: list[Expected | None]) -> Any:
        """Return the exact outputs in `expected`; None if one is missing or `func` is in-place."""
        exact = [wanted.exact for wanted in expected if wanted and wanted.scale is not None]
        returns = [str(each.type) for each in func._schema.returns]
        if func._schema.is_mutable or returns != ["Tensor"] * len(exact):
            return None
        return exact[0] if len(exact) == 1 else tuple(exact)
