"""What the fuzz targets share: mutations of bytes and of structures, and limits."""

import json
import os
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The number of inputs of each target. `make fuzz` sets it.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[*HealthCheck],
)

SECONDS = 20
MEMORY = 2**31  # more than the memory in use before


class TooSlow(BaseException):
    """An input took longer than `SECONDS`."""


@contextmanager
def limits() -> Iterator[None]:
    """Limit the time and the memory of the `with` block. Only Linux can limit the memory."""
    import resource

    def stop(*_: object) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    used = int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() else 0
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


@st.composite
def edits(draw: Any) -> Callable[[bytes], bytes]:
    """Draw a function that changes some bytes: it flips, cuts, repeats or replaces them."""
    kind = draw(st.sampled_from(["flip", "early", "cut", "remove", "repeat", "number", "digit"]))
    place, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    value, length = draw(st.integers(0, 255)), draw(st.sampled_from([1, 4, 8, 64, 512]))
    number = draw(st.sampled_from(NUMBERS))

    def edit(raw: bytes) -> bytes:
        early = kind in ("early", "number", "digit")
        start = int(place * (min(len(raw), 4000) if early else len(raw)))
        if kind in ("flip", "early"):
            changed = raw[start] ^ (1 << value % 8) if kind == "flip" else value
            return raw[:start] + bytes([changed]) + raw[start + 1 :]
        if kind == "cut":
            return raw[:start]
        if kind == "remove":
            return raw[:start] + raw[start + length :]
        if kind == "repeat":
            end = int(other * len(raw))
            return raw[:end] + raw[start : start + length] + raw[end:]
        if kind == "number":
            return raw[:start] + struct.pack("<Q", number) + raw[start + 8 :]
        digits = [at for at, byte in enumerate(raw[:4000]) if 48 <= byte < 58]
        if not digits:
            return raw
        at = digits[int(place * len(digits))]
        return raw[:at] + bytes([b'0123456789-e."[{'[value % 16]]) + raw[at + 1 :]

    return lambda raw: edit(raw) if raw else raw


@st.composite
def damages(draw: Any) -> Callable[[Path], None]:
    """Draw a function that damages a file: its bytes, or the records of a zip file."""
    changes = draw(st.lists(edits(), min_size=1, max_size=3))
    inside, which = draw(st.integers(0, 3)) > 0, draw(st.floats(0, 1, exclude_max=True))

    def damage(file: Path) -> None:
        if inside and zipfile.is_zipfile(file):  # then the checksums are right
            with zipfile.ZipFile(file) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            pickles = [name for name in records if name.endswith(".pkl")]
            names = [*records] + pickles * len(records)
            name = names[int(which * len(names))]
            for change in changes:
                records[name] = change(records[name])
            with zipfile.ZipFile(file, "w") as archive:
                for each, content in records.items():
                    archive.writestr(each, content)
            return
        raw = file.read_bytes()
        for change in changes:
            raw = change(raw)
        file.write_bytes(raw)

    return damage


def nested(depth: int) -> list[Any]:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside]
    return inside


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 10**9, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "12", "x", "../x", "/etc/passwd", "\x1b[2J", "\u202e", "\udc80", "a" * 10_000, [], [1], {},
    {"a": 1}, [[]] * 1000, nested(500),
)  # fmt: skip


@st.composite
def restructured(draw: Any, tree: Any, hostile: tuple[Any, ...] = HOSTILE) -> Any:
    """Draw the tree of dictionaries and lists with one to three of its places changed."""
    holder = [tree]
    for _ in range(draw(st.integers(1, 3))):
        holder = _changed(draw, holder, hostile)
    return holder[0]


def _changed(draw: Any, tree: Any, hostile: tuple[Any, ...]) -> Any:
    keys = [*(tree if isinstance(tree, dict) else range(len(tree)))]
    if not keys:
        return tree
    key = draw(st.sampled_from(keys))
    copy = tree.copy()
    if isinstance(tree[key], (dict, list)) and tree[key] and draw(st.integers(0, 4)):
        copy[key] = _changed(draw, tree[key], hostile)
        return copy
    kind = draw(st.sampled_from(["value", "value", "remove", "rename", "swap"]))
    if kind == "value" or not isinstance(tree, dict):
        copy[key] = draw(st.sampled_from(hostile))
    elif kind == "remove":
        del copy[key]
    elif kind == "rename":
        copy[draw(st.sampled_from(["", "x", "\x1b[2J", f"{key}.", f"module.{key}"]))] = copy.pop(
            key
        )
    else:
        other = draw(st.sampled_from(keys))
        copy[key], copy[other] = tree[other], tree[key]
    return copy


def rewrite_json(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))), errors="replace")


def hostile_tensors(like: torch.Tensor) -> tuple[Any, ...]:
    """Tensors that are no weights, and other objects that a pickle can hold without code."""
    one = like.flatten()[:1].clone()
    return (
        like.int(), like.bool(), like.half(), like.double(), like.to(torch.complex64),
        like.to_sparse(), one.expand(10**9), one.expand(10**6, 10**6), like.t(), like[:1], one[0],
        like * float("nan"), like.clone().fill_(3e38), torch.nn.Parameter(like), like[:0], 5, None,
        "x", [], {}, {"a": like}, [like], (like,), torch.float32, torch.Size([2]), like.dtype,
        like.as_strided(like.shape, (1,) * like.ndim), torch.empty(3, device="meta"),
    )  # fmt: skip
