"""TODO training/settings."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. The defaults are those of Brown et al. 2020 (appendix B) for GPT-2's size.

    A step reads `batch` windows of n_ctx tokens, over all processes, each in `accumulation` parts
    to save memory. `warmup` steps raise the learning rate to `learning_rate`, a cosine lowers it to
    `final_share` of that. `clip` is the largest norm of all gradients (inf for any). `autocast`
    computes in bfloat16 with float32 parameters, `recompute` keeps only the blocks' inputs for the
    backward pass, `sharded` gives each process a part of every parameter. The state is saved every
    `save_every` steps, and the loss on `held_out_batches` held-out batches taken as often as
    `held_out_every`.

    Raises `ValueError`, naming the field, for what cannot be.
    """

    steps: int
    batch: int
    accumulation: int = 1
    learning_rate: float = 6e-4
    final_share: float = 0.1
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    autocast: bool = False
    recompute: bool = False
    sharded: bool = False
    save_every: int = 500
    held_out_every: int = 500
    held_out_batches: int = 8

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulation", "save_every", "held_out_every")
        for field in (*counts, "held_out_batches"):
            self._require(field, getattr(self, field) >= 1, "1 or more")
        for field in ("warmup", "weight_decay", "seed"):
            self._require(field, getattr(self, field) >= 0, "0 or more")
        for field in ("learning_rate", "clip"):
            self._require(field, getattr(self, field) > 0, "more than 0")
        self._require("final_share", 0 <= self.final_share <= 1, "from 0 to 1")
        self._require("batch", self.batch % self.accumulation == 0, "a multiple of accumulation")

    def _require(self, field: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"Training.{field} is {getattr(self, field)!r}; it must be {wanted}")

    def rate(self, step: int) -> float:
        """The learning rate of that step, from 0: a warm-up, then a cosine down to its end."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        fallen = (1 - self.final_share) * (1 - math.cos(math.pi * progress)) / 2
        return self.learning_rate * (1 - fallen)
