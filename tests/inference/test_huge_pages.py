"""Tests for `use_huge_pages`."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clean_transformer.inference import huge_pages
from clean_transformer.inference.huge_pages import (
    HUGE_PAGE,
    MADV_COLLAPSE,
    SMALLEST,
    use_huge_pages,
)


def huge_bytes(tensor: Tensor) -> int:
    """Return the bytes of huge pages in the memory mappings that contain parts of `tensor`."""
    first, found, overlaps = tensor.data_ptr(), 0, False
    last = first + tensor.numel() * tensor.element_size()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        label, *values = line.split()
        if "-" in label:
            start, end = (int(address, 16) for address in label.split("-"))
            overlaps = start < last and first < end
        elif label == "AnonHugePages:" and overlaps:
            found += 1024 * int(values[0])
    return found


def can_collapse() -> bool:
    """Whether this is a Linux that moves memory to huge pages when it is asked."""
    if sys.platform != "linux":
        return False
    memory = mmap.mmap(-1, 2 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"1" * len(memory))
    try:
        memory.madvise(MADV_COLLAPSE)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_collapse(), reason="this system does not move memory to huge pages")
def test_a_weight_is_moved_and_keeps_its_values_and_address() -> None:
    weight = torch.arange(2**22).float()
    address = weight.data_ptr()
    use_huge_pages(weight)
    assert huge_bytes(weight) >= 7 * HUGE_PAGE
    assert weight.data_ptr() == address
    assert torch.equal(weight, torch.arange(2**22).float())


@pytest.mark.parametrize(
    ("platform", "weight"),
    [
        ("darwin", torch.zeros(2**20)),
        ("linux", torch.zeros(SMALLEST // 4 - 1)),
        ("linux", torch.zeros(2**20, device="meta")),
    ],
)
def test_other_systems_small_weights_and_other_devices_are_left_alone(
    platform: str, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(huge_pages, "madvise", lambda: lambda *given: asked.append(given))
    monkeypatch.setattr(sys, "platform", platform)
    use_huge_pages(weight)
    assert not asked
