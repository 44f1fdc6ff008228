"""What is measured, as plain data: work, those who do it, and groups that take turns."""

from dataclasses import dataclass, replace

# Kinds whose figure is not a time.
BYTES = ("memory",)


# Kinds that are done in a process of their own.
FRESH = ("import", "memory")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of a kind, on `batch` inputs of `length` tokens.

    - forward: the logits of every position, or `last_only` of the last
    - generate: `new` tokens, greedily; one is the time to the first token
    - step: one of `new` tokens after `length`, the first left out
    - capture: a forward pass that keeps every activation
    - train: forward, backward and an optimizer's step
    - import, load: a fresh process; the model from its folder, with the file in memory's cache
    - first_use: load, and read one token, which touches every weight
    - memory: the most bytes that first_use took at any moment
    """

    kind: str
    batch: int = 1
    length: int = 1
    new: int = 0
    last_only: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens a call makes or reads, for tokens per second; 0 where none are meant."""
        per_input = {
            "forward": self.length,
            "capture": self.length,
            "train": self.length,
            "generate": self.new if self.new > 1 else 0,
            "step": 1,
        }
        return self.batch * per_input.get(self.kind, 0)

    def __str__(self) -> str:
        shape = f" {self.batch} × {self.length}"
        match self.kind:
            case "forward":
                return "forward" + shape + (", last logits" if self.last_only else ", all logits")
            case "generate":
                return ("first token after" if self.new == 1 else "generate") + (
                    shape + (f" + {self.new}" if self.new > 1 else "")
                )
            case "step":
                return "decode step after" + shape
            case "capture" | "train":
                return self.kind + shape
        return self.kind.replace("_", " ")


def amount(value: float, work: Work) -> str:
    """What was measured of that work, to read."""
    if work.kind in BYTES:
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One process: a contestant with a model on a device in a dtype."""

    contestant: str
    device: str = "cpu"
    dtype: str = "float32"
    model: str = "small"

    def __str__(self) -> str:
        return f"{self.contestant}, {self.dtype}"


@dataclass(frozen=True)
class Part:
    """What one entrant does when its turn comes."""

    entrant: Entrant
    work: Work

    @property
    def to_warm_up(self) -> Work:
        """What goes the same ways in less time; on a GPU other lengths go other ways."""
        work = replace(self.work, new=min(self.work.new, 4))
        if work.kind == "step":  # so few could not be told from reading the context
            work = replace(work, kind="generate")
        return replace(work, length=min(work.length, 64)) if self.entrant.device == "cpu" else work

    def by(self, contestant: str, dtype: str | None = None) -> "Part":
        """The same work, by another contestant, or in another dtype."""
        other = replace(self.entrant, contestant=contestant, dtype=dtype or self.entrant.dtype)
        return Part(other, self.work)

    def __str__(self) -> str:
        return f"{self.work}: {self.entrant}"


@dataclass(frozen=True)
class Measurement:
    """Parts that take turns, so that whatever drifts hits all alike.

    A round before the others warms up, unless the work is done in fresh processes.
    """

    title: str
    parts: tuple[Part, ...]
    rounds: int

    @property
    def warm_ups(self) -> int:
        """How many rounds do not count."""
        return 0 if all(part.work.kind in FRESH for part in self.parts) else 1

    @property
    def turns(self) -> int:
        """How many there are, over all rounds."""
        return len(self.parts) * (self.warm_ups + self.rounds)
