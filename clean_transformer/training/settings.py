"""`Training`: settings for training."""

# This file does not import PyTorch, because the command line reads the help texts in this file, and
# should start quickly.
import math
import sys
from dataclasses import dataclass, fields
from typing import Annotated

from clean_transformer.support.keywords import checks_fields
from clean_transformer.support.validation import require


@checks_fields
@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings for training. `clean-transformer train --help` shows the help text of each field.

    The defaults come from Brown et al. 2020 (appendix B), for a model as large as GPT-2 small.
    Raises `ValueError` for an invalid value. The message names the field.
    """

    steps: Annotated[int, "Number of optimizer steps."]
    batch: Annotated[int, "Number of windows of n_ctx tokens in a step, summed over all processes."]
    accumulation: Annotated[
        int, "Split each process's share of a batch into this many parts, to save memory."
    ] = 1
    learning_rate: Annotated[float, "Peak learning rate, reached after the warm-up."] = 6e-4
    final_share: Annotated[
        float, "The cosine schedule ends at this share of the peak learning rate."
    ] = 0.1
    warmup: Annotated[
        int, "Number of steps in which the learning rate rises linearly to its peak."
    ] = 100
    weight_decay: Annotated[
        float, "Weight decay of the matrices; biases and LayerNorms have none."
    ] = 0.1
    clip: Annotated[float, "Largest norm of all gradients together; inf turns clipping off."] = 1.0
    seed: Annotated[int, "Seed of the random weights and of the order of the data."] = 0
    autocast: Annotated[bool, "Compute in bfloat16; the parameters stay float32."] = False
    recompute: Annotated[
        bool,
        "Save memory by gradient checkpointing: a block's activations are recomputed in the "
        "backward pass.",
    ] = False
    sharded: Annotated[
        bool, "Give each process a part of every parameter (fully_shard), instead of a whole model."
    ] = False
    save_every: Annotated[int, "Number of steps between checkpoints."] = 500
    held_out_every: Annotated[int, "Number of steps between evaluations on held-out data."] = 500
    held_out_batches: Annotated[int, "Number of held-out batches in an evaluation."] = 8

    def __post_init__(self) -> None:
        for each in fields(self):
            given, default = getattr(self, each.name), each.default
            if isinstance(default, bool):
                require(self, each.name, isinstance(given, bool), "True or False")
            elif isinstance(default, float):
                number = isinstance(given, (int, float)) and not isinstance(given, bool)
                limit = math.inf if each.name == "clip" else sys.float_info.max
                require(self, each.name, number and -limit <= given <= limit, "a finite number")
            else:
                whole = isinstance(given, int) and not isinstance(given, bool)
                require(self, each.name, whole, "a whole number")
        counts = ("steps", "batch", "accumulation", "save_every", "held_out_every")
        for field in (*counts, "held_out_batches"):
            require(self, field, getattr(self, field) >= 1, "1 or more")
        for field in ("warmup", "weight_decay", "seed"):
            require(self, field, getattr(self, field) >= 0, "0 or more")
        for field in ("learning_rate", "clip"):
            require(self, field, getattr(self, field) > 0, "more than 0")
        require(self, "seed", self.seed < 2**64, "less than 2**64")
        require(self, "final_share", 0 <= self.final_share <= 1, "from 0 to 1")
        require(self, "batch", self.batch % self.accumulation == 0, "a multiple of accumulation")

    def rate(self, step: int) -> float:
        """Return the learning rate of step number `step`, counted from 0.

        The learning rate rises linearly during the warm-up, and then follows a cosine schedule.
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        decayed = (1 - self.final_share) * (1 - math.cos(math.pi * progress)) / 2
        return self.learning_rate * (1 - decayed)

    def is_due(self, every: int, step: int) -> bool:
        """Whether a task, such as saving a checkpoint, is due after step number `step`.

        The task is due after every `every` steps, and after the last step of the run. `step` counts
        from 0.
        """
        return (step + 1) % every == 0 or step + 1 == self.steps
