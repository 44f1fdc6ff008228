"""For other people's test suites: `pytest -p clean_transformer.parity.pytest_plugin`.

Gives the option `--parity-device` and the fixture `assert_parity`, which is the function of that
name on the chosen device. A device that is absent skips the test, with that reason.
"""

from collections.abc import Callable
from functools import partial

import pytest

from clean_transformer.parity import assertion
from clean_transformer.support.devices import is_available


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-device`."""
    parser.addoption(
        "--parity-device", default="auto", help="where assert_parity runs: auto, cpu, cuda, mps, …"
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`clean_transformer.parity.assertion.assert_parity` on the device of `--parity-device`."""
    device = request.config.getoption("--parity-device")
    if device != "auto" and not is_available(device):
        pytest.skip(f"NOT CHECKED: this machine has no {device}")
    return partial(assertion.assert_parity, device=device)
