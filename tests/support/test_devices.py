import pytest
import torch

from clean_transformer.support import devices
from clean_transformer.support.devices import available, is_available, resolve_device


@pytest.mark.parametrize(
    ("present", "chosen"),
    [({"cpu"}, "cpu"), ({"cpu", "mps"}, "mps"), ({"cpu", "mps", "cuda"}, "cuda")],
)
def test_auto_takes_the_fastest_device_present(monkeypatch, present, chosen):
    monkeypatch.setattr(devices, "is_available", present.__contains__)
    assert resolve_device() == resolve_device("auto") == torch.device(chosen)
    assert set(available()) == present
    assert available()[0] == chosen


def test_a_device_by_name_and_by_itself(device: str):
    assert resolve_device(device) == resolve_device(torch.device(device)) == torch.device(device)


@pytest.mark.parametrize("name", ["warp", "", "cpu:x"])
def test_a_name_that_is_no_device_is_refused(name: str):
    message = rf"unknown device '{name}'; this machine has \[.*'cpu'\]"
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


# No machine has a hundred GPUs; PyTorch fails at each of the others in a way of its own.
@pytest.mark.parametrize("name", ["cuda:99", "xla", "hpu", "vulkan"])
def test_a_device_that_is_not_here_is_refused(name: str):
    assert not is_available(name)
    message = rf"device '{name}' is not available; this machine has \[.*'cpu'\]"
    with pytest.raises(ValueError, match=message):
        resolve_device(name)
