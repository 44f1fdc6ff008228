"""`Training`: how to train."""

import math
from dataclasses import dataclass

from clean_transformer.support.validation import require


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. The defaults are those of Brown et al. 2020 (appendix B) for GPT-2's size.

    | field | meaning |
    |---|---|
    | `steps` | steps of the optimizer |
    | `batch` | windows of n_ctx tokens per step, over all processes |
    | `accumulation` | micro-batches per step and process; more of them need less memory |
    | `learning_rate` | peak learning rate, reached after `warmup` steps |
    | `final_share` | last learning rate of the cosine decay, as a share of the peak |
    | `weight_decay` | of matrices; gains and biases have none |
    | `clip` | largest norm of all gradients together; `math.inf` does not clip |
    | `seed` | of the windows' order and of dropout |
    | `autocast` | compute in bfloat16; parameters stay in float32 |
    | `recompute` | gradient checkpointing: less memory, a third more time |
    | `sharded` | each process holds a part of every parameter |
    | `save_every` | steps between two checkpoints |
    | `held_out_every`, `held_out_batches` | steps between two held-out losses; batches of each |

    Raises `ValueError`, naming the field, for an impossible value.
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
            require(self, field, getattr(self, field) >= 1, "1 or more")
        for field in ("warmup", "weight_decay", "seed"):
            require(self, field, getattr(self, field) >= 0, "0 or more")
        for field in ("learning_rate", "clip"):
            require(self, field, getattr(self, field) > 0, "more than 0")
        require(self, "final_share", 0 <= self.final_share <= 1, "from 0 to 1")
        require(self, "batch", self.batch % self.accumulation == 0, "a multiple of accumulation")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0: a linear warm-up, then a cosine decay."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        decayed = (1 - self.final_share) * (1 - math.cos(math.pi * progress)) / 2
        return self.learning_rate * (1 - decayed)

    def is_due(self, every: int, step: int) -> bool:
        """Whether `step`, from 0, ends an interval of `every` steps. The last step always does."""
        return (step + 1) % every == 0 or step + 1 == self.steps
