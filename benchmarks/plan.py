"""Which contestants do what: the measurements of a run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.work import Entrant, Measurement, Part, Work

ENGINES = ("CTranslate2", "onnxruntime", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class Works:
    """The sizes of a run."""

    forward: Work
    generate: Work
    capture: Work
    train: Work
    rounds: int


FULL = Works(
    forward=Work(kind="forward", batch=4, length=256),
    generate=Work(kind="generate", length=16, new=64),
    capture=Work(kind="capture", batch=4, length=256),
    train=Work(kind="train", batch=4, length=256),
    rounds=5,
)
QUICK = Works(
    forward=Work(kind="forward", length=256),
    generate=Work(kind="generate", length=16, new=16),
    capture=Work(kind="capture", length=256),
    train=Work(kind="train", length=256),
    rounds=3,
)


def measurements(device: str, works: Works) -> list[Measurement]:
    """What is measured on that device, in this order."""
    return [*_measurements(device, works)]


def _measurements(device: str, works: Works) -> Iterator[Measurement]:
    def parts(work: Work, *contestants: str, dtype: str = "float32") -> tuple[Part, ...]:
        return tuple(
            Part(Entrant(contestant=contestant, device=device, dtype=dtype), work)
            for contestant in contestants
        )

    peers = ("transformers sdpa", "HookedTransformer", "TransformerBridge")
    watched = replace(works.capture, kind="forward")
    yield Measurement(
        "forward",
        parts(works.forward, "limit", "ours", "optimized", *peers, *ENGINES)
        + parts(works.forward, "limit", "optimized", dtype="bfloat16"),
        works.rounds,
    )
    yield Measurement(
        "generate",
        parts(works.generate, "limit", "ours", "optimized", *peers, *ENGINES)
        + parts(works.generate, "limit", "optimized", dtype="bfloat16")
        + parts(works.generate, "limit", "optimized", dtype="int8"),
        works.rounds,
    )
    yield Measurement(
        "capture",
        parts(works.capture, "limit", "ours", "HookedTransformer", "TransformerBridge")
        + parts(watched, "watched"),
        works.rounds,
    )
    for kind in ("import", "memory"):
        yield Measurement(
            kind, parts(Work(kind=kind), "limit", "ours", "transformers sdpa"), works.rounds
        )
    for kind in ("load", "first_use"):
        yield Measurement(kind, parts(Work(kind=kind), "ours", "transformers sdpa"), works.rounds)
    yield Measurement(
        "train",
        parts(works.train, "limit", "ours", "nanoGPT-style", "transformers sdpa"),
        works.rounds,
    )
