import sys
from types import ModuleType

import pytest


@pytest.fixture
def known_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of known faults that knows one."""

    class Known:
        name = "mm-permuted"

    table = ModuleType("clean_transformer.parity.known_faults")
    table.match = lambda call: (  # type: ignore[attr-defined]
        [Known] if call.name == "mm" and not call.operands[1].is_contiguous else []
    )
    monkeypatch.setitem(sys.modules, table.__name__, table)
