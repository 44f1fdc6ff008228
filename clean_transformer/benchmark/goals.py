"""Lists the project's speed goals. Each goal is a bound on a quotient of measured values."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clean_transformer.benchmark.plan import Plan, parts
from clean_transformer.benchmark.work import Part, Work, format_value


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on a quotient of measured values: factor · product(`over`) / product(`under`).

    `over` and `under` have parts: contestants with their work. The measured values of the parts, in
    seconds or bytes, are multiplied. For example, "a is twice as fast as b" is `Goal(over=(b,),
    under=(a,), at_least=2)`. The work is measured several times, which gives several quotients. The
    bound, `at_least` or `at_most`, applies to the median of these quotients. `what` describes the
    goal in words. With `percent`, reports print the quotient in percent. An `optional` goal may
    stay unmeasured, because it compares our model with a package that may not be installed.

    Without `under`, the bound applies to the measured values of the one part in `over`.
    """

    what: str
    device: str
    over: tuple[Part, ...]
    under: tuple[Part, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    factor: float = 1.0
    percent: bool = False
    optional: bool = False

    @property
    def bound(self) -> str:
        """The bound as text, such as "≥ 1.70 ×"."""
        sign, value = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{sign} {self.number(value or math.nan)}"

    def number(self, value: float) -> str:
        """Return the quotient `value` as text, such as "1.24 ×" or "88%".

        Without `under`, `value` is a measured value, and the text has its unit: "30 s".
        """
        if not self.under:
            return format_value(value, self.over[0].work)
        return f"{100 * value:.0f}%" if self.percent else f"{value:.2f} ×"

    def holds(self, value: float) -> bool:
        """Return whether the quotient `value` is within the bound. The result is False for NaN."""
        if self.at_least is not None and not value >= self.at_least:
            return False
        return self.at_most is None or value <= self.at_most


def goals(device: str, plan: Plan) -> list[Goal]:
    """Return the goals for `device`. They are about the contestants and the work in `plan` only."""
    return [*_Goals(device, plan).all()]


@dataclass(frozen=True)
class _Goals:
    """Makes the goals for `device`.

    The bounds for "cpu" were chosen on a machine with two CPU cores, and the bounds for "cuda" on a
    machine with one GPU. A goal compares contestants in float32, unless the goal's text names
    another dtype.
    """

    device: str
    plan: Plan

    def all(self) -> Iterator[Goal]:
        """Yield all goals for the device."""
        kind, _, _ = self.device.partition(":")  # "cuda:0" is a "cuda"
        if kind == "cpu":
            yield from self.forward()
            yield from self.generate()
            yield from self.engines()
            yield from self.capture()
            yield from self.loading()
            yield from self.commands()
            yield from self.growth()
        if kind == "cuda":
            yield from self.gpu()
        if self.plan.train is not None:
            for peer in ("nanoGPT-style", "transformers sdpa"):
                yield self.faster(self.plan.train, "ours", peer, 1.15)

    def forward(self) -> Iterator[Goal]:
        """Yield the goals for forward passes."""
        work = self.plan.forward
        yield self.faster(work, "ours", "transformers sdpa", 1.1)
        yield self.faster(work, "ours", "HookedTransformer", 1.25)
        yield self.of_limit(work, "ours", 0.8)
        yield self.of_limit(work, "optimized", 0.92)
        yield self.faster(work, "optimized", "optimized", 1.0, "bfloat16")

    def generate(self) -> Iterator[Goal]:
        """Yield the goals for generating text."""
        work, fastest = self.plan.generate, self.plan.fastest
        yield self.faster(work, fastest("float32"), "transformers sdpa", 1.3)
        yield self.of_limit(work, fastest("float32"), 0.88)
        yield self.faster(work, fastest("bfloat16"), fastest("float32"), 1.0, "bfloat16")
        yield self.of_limit(work, fastest("int8"), 0.75, "int8")
        if self.plan.quantized:
            yield self.below(Work(kind="divergence"), "optimized", 0.01, "int8")
        for engine in self.plan.in_8_bits:
            than = self.faster(work, fastest("int8"), engine, 1.0, "int8", "int8")
            yield replace(than, optional=True)

    def engines(self) -> Iterator[Goal]:
        """Yield optional goals: our model shall be at least as fast as each inference engine."""
        for engine in self.plan.engines:
            for work, ours in (
                (self.plan.forward, "optimized"),
                (self.plan.generate, self.plan.fastest("float32")),
            ):
                yield replace(self.faster(work, ours, engine, 1.0), optional=True)

    def capture(self) -> Iterator[Goal]:
        """Yield the goals for `run_with_cache`, a forward pass that returns all activations."""
        work = self.plan.capture
        explicit = replace(work, kind="forward")
        yield self.cheaper(
            f"{work}: ours over our {explicit} with explicit attention",
            self.part(work, "ours"),
            self.part(explicit, "watched"),
            1.05,
        )
        for peer in self.plan.peers[1:]:
            yield self.faster(work, "ours", peer, 1.5)

    def loading(self) -> Iterator[Goal]:
        """Yield the goals for the time to import and to load, and for the peak memory.

        Loading is compared twice: until the model is there, and until it has run on one token. We
        read every weight when we load it, to find NaN and infinity. transformers maps the file into
        memory, and reads no weight before the model runs.
        """
        kinds = ("import", "load", "first_use", "memory")
        importing, loading, first_use, memory = (Work(kind=kind) for kind in kinds)
        yield self.cheaper(
            "import: clean_transformer over torch",
            self.part(importing, "ours"),
            self.part(importing, "limit"),
            1.05,
        )
        yield self.cheaper(
            "load: ours over transformers sdpa",
            self.part(loading, "ours"),
            self.part(loading, "transformers sdpa"),
            0.3,
        )
        yield self.cheaper(
            "load and run on one token: ours over transformers sdpa",
            self.part(first_use, "ours"),
            self.part(first_use, "transformers sdpa"),
            1.0,
        )
        yield self.cheaper(
            "memory: ours over the weights' bytes",
            self.part(memory, "ours"),
            self.part(memory, "limit"),
            1.1,
        )

    def commands(self) -> Iterator[Goal]:
        """Yield the goals for the commands `clean-transformer --help` and `doctor`."""
        if self.plan.commands:
            yield self.below(Work(kind="help"), "ours", 0.4)
            yield self.below(Work(kind="doctor"), "ours", 30.0)
            yield self.below(Work(kind="doctor_memory"), "ours", 1.2e9)

    def growth(self) -> Iterator[Goal]:
        """Yield the goals for large batches, long contexts and large models.

        With the largest batch, the time per input may be at most 10 % longer than with the smallest
        batch. The method `kept` makes the goals for long contexts and large models.
        """
        if batches := self.plan.batches:
            one, many = batches[0], batches[-1]
            cost = self.cheaper(
                f"{many} over {many.batch // one.batch} times {one}: optimized",
                self.part(many, "optimized"),
                self.part(one, "optimized"),
                1.1,
            )
            yield replace(cost, factor=one.batch / many.batch)
        if contexts := self.plan.contexts:
            short, long = self.plan.step(contexts[0]), self.plan.step(contexts[-1])
            what = f"of the limit, {long} over {short}: optimized"
            yield replace(self.kept(what, short, long), at_least=0.97)
        if sizes := self.plan.sizes:
            work = Work(kind="forward", length=128)
            what = f"of the limit, {sizes[-1]} over {sizes[0]}, {work}: optimized"
            yield self.kept(what, work, work, sizes[0], sizes[-1])

    def gpu(self) -> Iterator[Goal]:
        """Yield the goals for bfloat16 on a GPU."""
        forward, generate = self.plan.forward, self.plan.generate
        yield self.of_limit(forward, "optimized", 0.6, "bfloat16")
        ours, theirs = self.plan.fastest("bfloat16"), "transformers sdpa"
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

    def below(self, work: Work, ours: str, at_most: float, dtype: str = "float32") -> Goal:
        over, what = (self.part(work, ours, dtype),), f"{work}: {ours}{_in(dtype)}"
        return Goal(what=what, device=self.device, over=over, at_most=at_most)

    def kept(
        self, what: str, small: Work, large: Work, model: str = "small", larger: str = "small"
    ) -> Goal:
        """Return a goal that compares two shares of the limit.

        A share of the limit is the time of the contestant "limit" divided by the time of
        "optimized". The share when the model `larger` does the work `large` must be at least 0.9
        times the share when the model `model` does the work `small`.
        """
        over = (self.part(large, "limit", model=larger), self.part(small, "optimized", model=model))
        under = (
            self.part(large, "optimized", model=larger),
            self.part(small, "limit", model=model),
        )
        return Goal(what=what, device=self.device, over=over, under=under, at_least=0.9)


def _in(dtype: str) -> str:
    return "" if dtype == "float32" else f" in {dtype}"
