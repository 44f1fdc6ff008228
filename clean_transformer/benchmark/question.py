"""The short run of `clean-transformer bench`: how fast is one model at reading and writing?"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from clean_transformer.benchmark.contestants.limit import flops, weight_bytes
from clean_transformer.benchmark.plan import MAIN, forward, generate, parts
from clean_transformer.benchmark.running.models import config
from clean_transformer.benchmark.running.timing import median_seconds
from clean_transformer.benchmark.work import Measurement, Part, Work
from clean_transformer.config import PUBLISHED, Config

# The dtypes of a question, with the contestants that are measured if the user names none.
DTYPES = {
    "float32": MAIN,
    "bfloat16": MAIN,
    "float16": MAIN,
    "int8": ("limit", "optimized"),  # the others have no weights in 8 bits
}

# The number of rounds after the warm-up round.
ROUNDS = 3

# Roughly the seconds to start a contestant's process and to load its weights, and the seconds to
# measure its memory, which takes a process of its own.
START, MEMORY = 6.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Question:
    """The work of a short run. `batch` texts of `length` tokens are read, and then continued.

    `new` is the number of tokens that are generated after each text. `size` is a published size of
    GPT-2, such as "small". Raises `ValueError` for numbers below 1, for more tokens than GPT-2 has
    positions, and for an unknown dtype or size.
    """

    batch: int = 1
    length: int = 128
    new: int = 32
    dtype: str = "float32"
    size: str = "small"

    def __post_init__(self) -> None:
        """Raise `ValueError` if the work is impossible."""
        for name in ("batch", "length", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name, known in (("dtype", DTYPES), ("size", PUBLISHED)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"no {name} {getattr(self, name)!r}; choose from {', '.join(known)}"
                )
        n_ctx = Config.gpt2(self.size).n_ctx
        if self.length + self.new > n_ctx:
            raise ValueError(
                f"{self.length} tokens and {self.new} new ones are more than the n_ctx={n_ctx} "
                "positions of GPT-2; lower the length or the number of new tokens"
            )

    def __str__(self) -> str:
        return (
            f"GPT-2 {self.size} in {self.dtype}: {self.batch} × {self.length} tokens read, then "
            f"{self.new} written"
        )

    def measurements(self, device: str, only: Collection[str] | None) -> list[Measurement]:
        """Return the measurements on one device.

        `only` names the contestants. Raises `ValueError` if one of them cannot run in int8.
        """
        contestants = DTYPES[self.dtype] if only is None else tuple(only)
        if self.dtype == "int8" and (
            others := {*contestants} - {"optimized compiled", *DTYPES["int8"]}
        ):
            raise ValueError(f"no int8 for {', '.join(sorted(others))}; only optimized has it")
        works = {
            "forward": (forward(self.batch, self.length), ROUNDS),
            "first token": (generate(self.batch, self.length, 1), ROUNDS),
            "generate": (generate(self.batch, self.length, self.new), ROUNDS),
            "memory": (Work(kind="memory"), 1),
        }
        how = {"dtype": self.dtype, "model": self.size}
        return [
            Measurement(f"{title}, {device}", parts(device, work, *contestants, **how), rounds)
            for title, (work, rounds) in works.items()
        ]


def expected_seconds(measurements: Iterable[Measurement]) -> float:
    """Estimate how long the measurements take, from this machine's speed in two small tests.

    The tests are a matrix product and a sum over a tensor in memory. On other devices than the CPU,
    only the starts of processes are counted, because the work is short there.
    """
    square, memory = torch.ones(1024, 1024), torch.ones(2**25)
    flops_per_second = 2 * 1024**3 / median_seconds(lambda: square @ square, "cpu", 0.1)
    bytes_per_second = memory.nbytes / median_seconds(memory.sum, "cpu", 0.1)

    def seconds(part: Part) -> float:
        cfg, work = config(part.setup.model), part.work
        if work.kind == "memory":
            return MEMORY
        if part.setup.device != "cpu":
            return 0.0
        read = work.new * weight_bytes(cfg, part.setup.dtype)
        return 2 * (flops(cfg, work) / flops_per_second + read / bytes_per_second)

    planned = [*measurements]
    starts = START * len({part.setup for each in planned for part in each.parts})
    turns = (
        (each.warm_ups + each.rounds) * max(0.2, seconds(part))
        for each in planned
        for part in each.parts
    )
    return starts + sum(turns)
