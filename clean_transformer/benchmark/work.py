"""Describe what is measured: the work, the contestant that does it, and the parts of a round."""

from dataclasses import dataclass, replace

# Kinds of work whose value is a number of bytes. All others are measured in seconds.
BYTES = ("memory",)

# Kinds of work that are done in a fresh process each time.
FRESH = ("import", "memory")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one `kind`, on `batch` inputs of `length` tokens each.

    - `forward`: compute the logits for all positions; with `last_only`, only for the last position
    - `generate`: read the inputs and choose `new` tokens greedily; with `new=1` this is the time
      to the first token
    - `step`: choose one token after `length` earlier tokens (the mean over `new` steps; the time
      to read the inputs is subtracted)
    - `capture`: a forward pass that returns every activation
    - `train`: forward pass, backward pass and one optimizer step
    - `import`: start Python and import the package
    - `load`: build the model from its folder; the file is already in the operating system's cache
    - `first_use`: load, then read one token, so that every weight is touched
    - `memory`: the peak memory of `first_use`
    """

    kind: str
    batch: int = 1
    length: int = 1
    new: int = 0
    last_only: bool = False

    @property
    def tokens(self) -> int:
        """The number of tokens to divide by the time; 0 for kinds without tokens per second."""
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
            case "generate" if self.new == 1:
                return "first token after" + shape
            case "generate":
                return f"generate{shape} + {self.new}"
            case "step":
                return "decode step after" + shape
            case "capture" | "train":
                return self.kind + shape
        return self.kind.replace("_", " ")


def format_value(value: float, work: Work) -> str:
    """A measured value with its unit, for people: MB, seconds or milliseconds."""
    if work.kind in BYTES:
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One contestant with one model, on one device, in one dtype. Each setup has its own process.

    `contestant` is a key of `contestants.CONTESTANTS`. `model` is a name that
    `running.models.config` accepts.
    """

    contestant: str
    device: str = "cpu"
    dtype: str = "float32"
    model: str = "small"

    def __str__(self) -> str:
        return f"{self.contestant}, {self.dtype}"


@dataclass(frozen=True)
class Part:
    """One setup, and the work that the setup does in each of its turns."""

    setup: Setup
    work: Work

    @property
    def warm_up(self) -> Work:
        """Less work that runs the same code, for the warm-up round.

        On a GPU the length stays the same, because another length would select other kernels.
        """
        work = replace(self.work, new=min(self.work.new, 4))
        if work.kind == "step":  # four steps take less time than the noise of reading the context
            work = replace(work, kind="generate")
        return replace(work, length=min(work.length, 64)) if self.setup.device == "cpu" else work

    def by(self, contestant: str, dtype: str | None = None) -> "Part":
        """The part in which another contestant does the same work, optionally in another dtype."""
        other = replace(self.setup, contestant=contestant, dtype=dtype or self.setup.dtype)
        return Part(other, self.work)

    def __str__(self) -> str:
        return f"{self.work}: {self.setup}"


@dataclass(frozen=True)
class Measurement:
    """Parts that take turns in every round, so that a slow minute of the machine slows all alike.

    The first round is a warm-up and is not counted, unless all work is done in fresh processes.
    """

    title: str
    parts: tuple[Part, ...]
    rounds: int

    @property
    def warm_ups(self) -> int:
        """The number of warm-up rounds: 0 or 1."""
        return 0 if all(part.work.kind in FRESH for part in self.parts) else 1

    @property
    def turns(self) -> int:
        """The number of turns of all parts over all rounds, for a progress bar."""
        return len(self.parts) * (self.warm_ups + self.rounds)
