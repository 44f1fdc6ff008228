"""Checks that answer three questions about a GPT-2 model on a device.

1. Is the model the same function as GPT-2?
2. Does the device compute the model accurately?
3. Which operation goes wrong first?

Each name of this package is imported when it is first accessed. So pytest can load
`parity.pytest_plugin` without importing PyTorch.
"""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

if TYPE_CHECKING:
    from clean_transformer.parity.any_model.check import check_model as check_model
    from clean_transformer.parity.assertion import assert_parity as assert_parity
    from clean_transformer.parity.faults import inject as inject
    from clean_transformer.parity.operations.check import check_operations as check_operations
    from clean_transformer.parity.suite import check_device as check_device
    from clean_transformer.parity.suite import run_suite as run_suite
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
