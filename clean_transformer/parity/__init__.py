"""Is it GPT-2, does the device compute it accurately, and where does it first go wrong?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The names are imported when they are first used. Every run of pytest imports this room for the
# sake of `pytest_plugin`, and must not wait for PyTorch.
if TYPE_CHECKING:
    from clean_transformer.parity.assertion import assert_parity as assert_parity
    from clean_transformer.parity.faults import inject as inject
    from clean_transformer.parity.operations.check import check_operations as check_operations
    from clean_transformer.parity.suite import check_device as check_device
    from clean_transformer.parity.suite import run_suite as run_suite

HOMES = {
    "assert_parity": "assertion",
    "check_device": "suite",
    "check_operations": "operations.check",
    "inject": "faults",
    "run_suite": "suite",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
