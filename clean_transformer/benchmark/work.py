"""Classes that describe what is measured: the work, and the contestant that does the work."""

from dataclasses import dataclass, replace

# The kinds of `Work` that are measured in bytes, and the kind that is measured in nats. All other
# kinds are measured in seconds.
BYTES = ("memory", "doctor_memory")
NATS = ("divergence",)

# The kinds of `Work` that generate tokens.
GENERATING = ("generate", "step")
# The kinds of `Work` that need no warm-up, because each starts a fresh process, or takes no time.
FRESH = ("import", "memory", "help", "doctor", "doctor_memory", "divergence")


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one `kind`, on `batch` inputs of `length` tokens each. The kinds are:

    - `forward`: compute the logits for all positions; with `last_only`, only for the last position
    - `generate`: read the inputs, and generate `new` tokens greedily after each input; with
      `new=1`, the measured time is the time to the first token
    - `step`: decode one token after `length` earlier tokens; the measured time is the mean over
      `new` steps, without the time to read the inputs
    - `capture`: run a forward pass that returns every activation
    - `train`: run a forward pass, a backward pass and one optimizer step
    - `import`: start Python, and import the contestant's package
    - `load`: build the model, and load its weights from a file; the operating system already has
      this file in its cache
    - `first_use`: build the model, and run it on one token, so that it reads every weight
    - `memory`: build the model, and run it on one token; the peak memory is measured
    - `help`: run `clean-transformer --help`; the CPU time is measured
    - `doctor`: run `clean-transformer doctor` on GPT-2 small
    - `doctor_memory`: the same, but the peak memory is measured
    - `divergence`: no work; the value is `Result.kl_divergence`
    """

    kind: str
    batch: int = 1
    length: int = 1
    new: int = 0
    last_only: bool = False

    @property
    def tokens(self) -> int:
        """The number of tokens that reports divide by the time, to print tokens per second.

        For "generate" and "step", this is the number of new tokens; for "forward", "capture" and
        "train", the number of tokens in all inputs. For all other kinds, and for "generate" with
        `new=1`, the number is 0, and reports print no tokens per second.
        """
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
    """Return a measured value as text with its unit: MB, nats, seconds or milliseconds."""
    if work.kind in BYTES:
        return f"{value / 1e6:,.0f} MB"
    if work.kind in NATS:
        return f"{value:.2g} nats"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A contestant with its model, device and dtype. Each setup runs in a process of its own.

    `contestant` is a key of `contestants.CONTESTANTS`. `model` is a published size, such as
    "small", or "tiny".
    """

    contestant: str
    device: str = "cpu"
    dtype: str = "float32"
    model: str = "small"

    def __str__(self) -> str:
        return f"{self.contestant}, {self.dtype}"


@dataclass(frozen=True)
class Part:
    """A contestant with its settings, and the work that it does in each round of a measurement."""

    setup: Setup
    work: Work

    @property
    def warm_up(self) -> Work:
        """The work in the warm-up round: less work than `work`, but with the same code."""
        work = replace(self.work, new=min(self.work.new, 4))
        # The time of "step" is a difference of two times. With only four steps, noise could make
        # the difference negative, which `worker.measure` reports as an error. So the warm-up for
        # "step" is "generate", which runs the same code.
        if work.kind == "step":
            work = replace(work, kind="generate")
        # On a GPU, the length stays, because another length would select other kernels.
        return replace(work, length=min(work.length, 64)) if self.setup.device == "cpu" else work

    def by(self, contestant: str, dtype: str | None = None) -> "Part":
        """Return a copy of this part with `contestant`, and with `dtype` if `dtype` is not None."""
        other = replace(self.setup, contestant=contestant, dtype=dtype or self.setup.dtype)
        return Part(other, self.work)

    def __str__(self) -> str:
        return f"{self.work}: {self.setup}"


@dataclass(frozen=True)
class Measurement:
    """Contestants and their work, measured in rounds. In every round, each part has one turn.

    If the machine is slow for a minute, the times of all parts increase alike. `rounds` is the
    number of rounds whose values count. Before these rounds, there is a warm-up round, whose values
    are discarded. There is no warm-up round if the work of all parts is in `FRESH`.
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
        """The number of turns of all parts in all rounds, including the warm-up round."""
        return len(self.parts) * (self.warm_ups + self.rounds)
