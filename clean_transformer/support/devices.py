"""Finds the devices that PyTorch can use on this machine, and chooses devices by name."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import torch

# Packages that add a device to PyTorch when they are imported, by the device's type.
PLUGINS = {"xla": "torch_xla", "hpu": "habana_frameworks.torch.core", "npu": "torch_npu"}
# The packages that `import_packages` has imported. A new process must import them, too.
IMPORTED: list[str] = []


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called `name`. For "auto", return the first available of cuda, mps, cpu.

    Raises `ValueError` for a device that PyTorch does not know or that this machine does not have.
    """
    if name == "auto":
        name = available()[0]
    device = known_device(name)
    if not is_available(str(device)):
        raise ValueError(f"device {name!r} is not available; this machine has {available()}")
    return device


def known_device(name: str | torch.device) -> torch.device:
    """Return the device called `name`, even if this machine does not have the device.

    Raises `ValueError` if PyTorch does not know the name.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; this machine has {available()}") from None


def is_available(name: str) -> bool:
    """Whether PyTorch can create a tensor on the device called `name`."""
    _import_plugin(name.split(":")[0])
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def import_packages(names: Iterable[str]) -> None:
    """Import packages that add devices or compile backends to PyTorch.

    Raises `ValueError` if a package cannot be imported.
    """
    for name in names:
        try:
            import_module(name)
            if name not in IMPORTED:
                IMPORTED.append(name)
        except ImportError as error:
            raise ValueError(f"cannot import {name}: {error}") from error


def _import_plugin(kind: str) -> None:
    """Import the package that adds the device type `kind`, if it is installed."""
    package = PLUGINS.get(kind)
    if package is not None and find_spec(package.split(".")[0]) is not None:
        import_packages([package])


def available() -> list[str]:
    """Return the device types that this machine has, such as "cuda", the fastest type first."""
    return [kind for kind in ("cuda", "mps", "cpu") if is_available(kind)]


def choose_devices(names: str) -> list[str]:
    """Split `names`, a comma-separated text such as "cpu,cuda", into a list of device names.

    The name "auto" becomes the fastest device of this machine. If `names` is "all", the list is
    cpu, cuda and mps. The list may contain devices that this machine does not have. Raises
    `ValueError` for a device that PyTorch does not know.
    """
    if names == "all":
        return ["cpu", "cuda", "mps"]
    chosen = [str(resolve_device()) if name == "auto" else name for name in names.split(",")]
    for name in chosen:
        known_device(name)
    return chosen
