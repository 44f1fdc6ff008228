"""A pytest plugin: the fixture `assert_parity` and the option `--parity-device`."""

from collections.abc import Callable
from functools import partial

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--parity-device` to pytest."""
    parser.addoption(
        "--parity-device", default="auto", help="where assert_parity runs: auto, cpu, cuda, mps, …"
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """The function `assert_parity`, with its argument `device` set to the option `--parity-device`.

    Skips the test if this machine does not have the device. Raises `ValueError` if PyTorch does not
    know the device.
    """
    # Every pytest run loads this plugin, so import PyTorch only if a test uses the fixture.
    from clean_transformer.parity.assertion import assert_parity
    from clean_transformer.support.devices import is_available, known_device

    device = request.config.getoption("--parity-device")
    if device != "auto" and not is_available(str(known_device(device))):
        pytest.skip(f"NOT CHECKED: this machine has no {device}")
    return partial(assert_parity, device=device)
