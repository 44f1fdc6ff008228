"""The fixture `assert_parity` and the option `--parity-device`, for other people's test suites."""

from collections.abc import Callable
from functools import partial

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-device`."""
    parser.addoption(
        "--parity-device", default="auto", help="where assert_parity runs: auto, cpu, cuda, mps, …"
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`clean_transformer.parity.assert_parity` on the device that `--parity-device` names.

    A device that this machine lacks skips the test, with that reason.
    """
    # Every pytest run loads this plugin; PyTorch is imported when a test asks for the fixture.
    from clean_transformer.parity.assertion import assert_parity
    from clean_transformer.support.devices import is_available

    device = request.config.getoption("--parity-device")
    if device != "auto" and not is_available(device):
        pytest.skip(f"NOT CHECKED: this machine has no {device}")
    return partial(assert_parity, device=device)
