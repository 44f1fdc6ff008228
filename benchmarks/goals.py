"""What the speed is to be, as data: each goal is a quotient of measured values and a bound."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.plan import Works
from benchmarks.work import Entrant, Part, Work


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The product of the values of `over` by that of `under`, times `factor`, within a bound.

    Values are seconds (or bytes), so a speed-up of a over b is Goal(over=(b,), under=(a,)). Each
    round gives a quotient; their median is judged.
    """

    what: str
    over: tuple[Part, ...]
    under: tuple[Part, ...]
    at_least: float | None = None
    at_most: float | None = None
    factor: float = 1.0
    percent: bool = False

    @property
    def bound(self) -> str:
        """The goal, to read."""
        sign, value = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{sign} {self.number(value or math.nan)}"

    def number(self, value: float) -> str:
        """A measured quotient, to read."""
        return f"{100 * value:.0f}%" if self.percent else f"{value:.2f} ×"

    def holds(self, value: float) -> bool:
        """Whether that is within the bound."""
        if self.at_least is not None and not value >= self.at_least:
            return False
        return self.at_most is None or value <= self.at_most


def goals(device: str, works: Works) -> list[Goal]:
    """The goals for a device."""
    return [*(gpu_goals if device == "cuda" else cpu_goals)(device, works)]


def cpu_goals(device: str, works: Works) -> Iterator[Goal]:
    """As the project set them: two cores, GPT-2 small."""

    def part(work: Work, contestant: str, dtype: str = "float32", model: str = "small") -> Part:
        entrant = Entrant(contestant=contestant, device=device, dtype=dtype, model=model)
        return Part(entrant, work)

    def faster(work: Work, ours: str, than: str, at_least: float, dtype: str = "float32") -> Goal:
        what = f"{work}: {ours}{'' if dtype == 'float32' else ' in ' + dtype} over {than}"
        over, under = (part(work, than),), (part(work, ours, dtype),)
        return Goal(what=what, over=over, under=under, at_least=at_least)

    def of_limit(work: Work, ours: str, at_least: float) -> Goal:
        over, under = (part(work, "limit"),), (part(work, ours),)
        what = f"{work}: {ours}, of the limit"
        return Goal(what=what, over=over, under=under, at_least=at_least, percent=True)

    def cheaper(what: str, mine: Part, theirs: Part, at_most: float) -> Goal:
        return Goal(what=what, over=(mine,), under=(theirs,), at_most=at_most)

    forward, generate, capture = works.forward, works.generate, works.capture
    yield faster(forward, "ours", "transformers sdpa", 1.1)
    yield faster(forward, "ours", "HookedTransformer", 1.25)
    yield faster(forward, "optimized", "transformers sdpa", 1.7)
    yield faster(forward, "optimized", "HookedTransformer", 1.9)
    yield of_limit(forward, "optimized", 0.9)
    yield faster(forward, "optimized", "transformers sdpa", 3.3, "bfloat16")
    yield faster(generate, "optimized", "transformers sdpa", 2.2)
    yield faster(generate, "optimized", "HookedTransformer", 8.0)
    yield of_limit(generate, "optimized", 0.8)
    yield faster(generate, "optimized", "transformers sdpa", 2.8, "bfloat16")
    yield faster(generate, "optimized", "transformers sdpa", 5.5, "int8")
    for engine in ("CTranslate2", "onnxruntime", "llama.cpp"):
        yield faster(forward, "optimized", engine, 1.0)
        yield faster(generate, "optimized", engine, 1.0)
    yield cheaper(
        f"{capture}: ours over our forward pass with explicit attention",
        part(capture, "ours"),
        part(replace(capture, kind="forward"), "watched"),
        1.08,
    )
    yield faster(capture, "ours", "HookedTransformer", 1.5)
    yield faster(capture, "ours", "TransformerBridge", 1.5)
    importing, loading, memory = Work(kind="import"), Work(kind="load"), Work(kind="memory")
    yield cheaper(
        "import clean_transformer over import torch",
        part(importing, "ours"),
        part(importing, "limit"),
        1.2,
    )
    yield cheaper(
        "load from safetensors: ours over transformers",
        part(loading, "ours"),
        part(loading, "transformers sdpa"),
        0.3,
    )
    yield cheaper(
        "most memory to load and read a token: ours over the weights' bytes",
        part(memory, "ours"),
        part(memory, "limit"),
        1.1,
    )
    yield faster(works.train, "ours", "nanoGPT-style", 1.0)
    yield faster(works.train, "ours", "transformers sdpa", 1.0)
