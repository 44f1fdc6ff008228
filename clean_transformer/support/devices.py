"""Choosing a device by name."""

import torch


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" takes cuda, then mps, then cpu.

    Raises `ValueError` for a device that PyTorch does not know or this machine does not have.
    """
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if is_available(device))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; this machine has {available()}") from None
    if not is_available(str(device)):
        raise ValueError(f"device {name!r} is not available; this machine has {available()}")
    return device


def is_available(name: str) -> bool:
    """Whether a tensor can be made on that device here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def available() -> list[str]:
    """The kinds of device that this machine has, the fastest first."""
    return [kind for kind in ("cuda", "mps", "cpu") if is_available(kind)]


def choose_devices(names: str) -> list[str]:
    """The devices named, between commas; "auto" is the fastest here, "all" cuda, mps and cpu.

    Raises `ValueError` for one that PyTorch does not know; one that is absent is NOT CHECKED.
    """
    if names == "all":
        return ["cpu", "cuda", "mps"]
    chosen = [str(resolve_device()) if name == "auto" else name for name in names.split(",")]
    for name in chosen:
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"PyTorch knows no device {name!r}; this machine has {available()}"
            ) from None
    return chosen
