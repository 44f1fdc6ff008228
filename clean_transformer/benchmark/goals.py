"""What the speed is to be, as data: each goal is a quotient of measured values and a bound."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clean_transformer.benchmark.plan import Works, parts
from clean_transformer.benchmark.work import Part, Work


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The product of the values of `over` by that of `under`, times `factor`, within a bound.

    Values are seconds (or bytes), so a speed-up of a over b is Goal(over=(b,), under=(a,)). Each
    round gives a quotient; their median is judged. An `optional` goal is one about something that
    need not be installed.
    """

    what: str
    device: str
    over: tuple[Part, ...]
    under: tuple[Part, ...]
    at_least: float | None = None
    at_most: float | None = None
    factor: float = 1.0
    percent: bool = False
    optional: bool = False

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
    """The goals for a device, of what is measured on it."""
    return [*_Goals(device, works).all()]


@dataclass(frozen=True)
class _Goals:
    """The goals as the project set them: for two cores, and for a GPU; in float32 unless said."""

    device: str
    works: Works

    def all(self) -> Iterator[Goal]:
        """Those that the device has."""
        if self.device == "cpu":
            yield from self.forward()
            yield from self.generate()
            yield from self.engines()
            yield from self.capture()
            yield from self.loading()
            yield from self.growth()
        if self.device == "cuda":
            yield from self.gpu()
        if self.works.train is not None:
            for peer in ("nanoGPT-style", "transformers sdpa"):
                yield self.faster(self.works.train, "ours", peer, 1.0)

    def forward(self) -> Iterator[Goal]:
        """All logits at once."""
        work = self.works.forward
        yield self.faster(work, "ours", "transformers sdpa", 1.1)
        yield self.faster(work, "ours", "HookedTransformer", 1.25)
        yield self.faster(work, "optimized", "transformers sdpa", 1.7)
        yield self.faster(work, "optimized", "HookedTransformer", 1.9)
        yield self.of_limit(work, "optimized", 0.9)
        yield self.faster(work, "optimized", "transformers sdpa", 3.3, "bfloat16")

    def generate(self) -> Iterator[Goal]:
        """Token after token."""
        work, fastest = self.works.generate, self.works.fastest
        yield self.faster(work, fastest("float32"), "transformers sdpa", 2.2)
        yield self.faster(work, fastest("float32"), "HookedTransformer", 8.0)
        yield self.of_limit(work, fastest("float32"), 0.8)
        yield self.faster(work, fastest("bfloat16"), "transformers sdpa", 2.8, "bfloat16")
        yield self.faster(work, fastest("int8"), "transformers sdpa", 5.5, "int8")

    def engines(self) -> Iterator[Goal]:
        """At the same precision; none of them has to be installed."""
        for engine in self.works.engines:
            for work, ours in (
                (self.works.forward, "optimized"),
                (self.works.generate, self.works.fastest("float32")),
            ):
                yield replace(self.faster(work, ours, engine, 1.0), optional=True)

    def capture(self) -> Iterator[Goal]:
        """Keeping every activation that HookedTransformer keeps."""
        work = self.works.capture
        explicit = replace(work, kind="forward")
        yield self.cheaper(
            f"{work}: ours over our {explicit} with explicit attention",
            self.part(work, "ours"),
            self.part(explicit, "watched"),
            1.08,
        )
        for peer in self.works.peers[1:]:
            yield self.faster(work, "ours", peer, 1.5)

    def loading(self) -> Iterator[Goal]:
        """Before the first token."""
        importing, loading, memory = (Work(kind=kind) for kind in ("import", "load", "memory"))
        yield self.cheaper(
            "import: clean_transformer over torch",
            self.part(importing, "ours"),
            self.part(importing, "limit"),
            1.2,
        )
        yield self.cheaper(
            "load: ours over transformers sdpa",
            self.part(loading, "ours"),
            self.part(loading, "transformers sdpa"),
            0.3,
        )
        yield self.cheaper(
            "memory: ours over the weights' bytes",
            self.part(memory, "ours"),
            self.part(memory, "limit"),
            1.1,
        )

    def growth(self) -> Iterator[Goal]:
        """Linear in the batch; as near the limit after long contexts, and in large models."""
        if batches := self.works.batches:
            one, many = batches[0], batches[-1]
            cost = self.cheaper(
                f"{many} over {many.batch // one.batch} times {one}: optimized",
                self.part(many, "optimized"),
                self.part(one, "optimized"),
                1.1,
            )
            yield replace(cost, factor=one.batch / many.batch)
        if contexts := self.works.contexts:
            short, long = self.works.step(contexts[0]), self.works.step(contexts[-1])
            yield self.kept(f"of the limit, {long} over {short}: optimized", short, long)
        if sizes := self.works.sizes:
            work = Work(kind="forward", length=128)
            what = f"of the limit, {sizes[-1]} over {sizes[0]}, {work}: optimized"
            yield self.kept(what, work, work, sizes[0], sizes[-1])

    def gpu(self) -> Iterator[Goal]:
        """In bfloat16."""
        forward, generate = self.works.forward, self.works.generate
        yield self.of_limit(forward, "optimized", 0.6, "bfloat16")
        ours, theirs = self.works.fastest("bfloat16"), "transformers sdpa"
        yield self.faster(generate, ours, theirs, 4.0, "bfloat16", "bfloat16")

    def part(
        self, work: Work, contestant: str, dtype: str = "float32", model: str = "small"
    ) -> Part:
        [found] = parts(self.device, work, contestant, dtype=dtype, model=model)
        return found

    def faster(
        self,
        work: Work,
        ours: str,
        than: str,
        at_least: float,
        dtype: str = "float32",
        their_dtype: str = "float32",
    ) -> Goal:
        what = f"{work}: {ours}{_in(dtype)} over {than}{_in(their_dtype)}"
        over, under = (self.part(work, than, their_dtype),), (self.part(work, ours, dtype),)
        return Goal(what=what, device=self.device, over=over, under=under, at_least=at_least)

    def of_limit(self, work: Work, ours: str, at_least: float, dtype: str = "float32") -> Goal:
        goal = self.faster(work, ours, "limit", at_least, dtype, dtype)
        return replace(goal, what=f"{work}: {ours}{_in(dtype)}, of the limit", percent=True)

    def cheaper(self, what: str, mine: Part, theirs: Part, at_most: float) -> Goal:
        return Goal(what=what, device=self.device, over=(mine,), under=(theirs,), at_most=at_most)

    def kept(
        self, what: str, small: Work, large: Work, model: str = "small", larger: str = "small"
    ) -> Goal:
        """A share of the limit that is as high for larger work, but for a tenth."""
        over = (self.part(large, "limit", model=larger), self.part(small, "optimized", model=model))
        under = (
            self.part(large, "optimized", model=larger),
            self.part(small, "limit", model=model),
        )
        return Goal(what=what, device=self.device, over=over, under=under, at_least=0.9)


def _in(dtype: str) -> str:
    return "" if dtype == "float32" else f" in {dtype}"
