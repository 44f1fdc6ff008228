"""Choosing devices by name."""

import torch


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device with that name; "auto" chooses cuda, else mps, else cpu.

    Raises `ValueError` for a device that PyTorch does not know or this machine does not have.
    """
    if name == "auto":
        name = available()[0]
    device = known_device(name)
    if not is_available(str(device)):
        raise ValueError(f"device {name!r} is not available; this machine has {available()}")
    return device


def known_device(name: str | torch.device) -> torch.device:
    """Return the device with that name. Raises `ValueError` if PyTorch does not know it."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; this machine has {available()}") from None


def is_available(name: str) -> bool:
    """Whether PyTorch can make a tensor on that device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def available() -> list[str]:
    """Return the types of device that this machine has, the fastest first."""
    return [kind for kind in ("cuda", "mps", "cpu") if is_available(kind)]


def choose_devices(names: str) -> list[str]:
    """Split names with commas between them; "auto" is the fastest device, "all" cpu, cuda and mps.

    A device that this machine lacks is returned all the same: the report calls it NOT CHECKED.
    Raises `ValueError` for a device that PyTorch does not know.
    """
    if names == "all":
        return ["cpu", "cuda", "mps"]
    chosen = [str(resolve_device()) if name == "auto" else name for name in names.split(",")]
    for name in chosen:
        known_device(name)
    return chosen
