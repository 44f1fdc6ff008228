"""Measures the time and the memory of `clean-transformer doctor`, which checks a device.

The script runs the command in a fresh process for each entry of the list `--weights`. It prints the
wall-clock time and the CPU time (user plus system) in seconds, and the peak resident memory of the
largest process. It also prints this memory divided by the bytes of the weights in float32.

    python -m benchmarks.doctor --weights demo,stress:small

To see how time and memory grow with the model, name several sizes, such as
`--weights stress:small,stress:medium,stress:large,stress:xl`.

With `--steps`, the script also runs the check in its own process, and prints the CPU time of each
kind of work in `KINDS`, such as running the oracle, and the time of each step.

With `--peer`, the script also measures TransformerLens's own benchmark suite, which compares a
`TransformerBridge` with Hugging Face's GPT-2 on the CPU. Both load the same weights. Text quality,
phase 4 of that suite, is left out, because it needs a second model from the Hugging Face hub.
"""

import sys
import time
from collections import defaultdict
from importlib import import_module
from inspect import unwrap
from itertools import pairwise
from math import prod
from operator import attrgetter, itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from clean_transformer.benchmark.running.fresh import costs

SCRIPT = str(Path(sys.executable).with_name("clean-transformer"))
# The peer's row. `{folder}` has the model in Hugging Face's format.
PEER = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from transformer_lens.benchmarks import run_benchmark_suite
results = run_benchmark_suite({folder!r}, verbose=False, phases=[1, 2, 3])
raise SystemExit(not all(result.passed for result in results))
"""


def write_model(weights: str, folder: str) -> None:
    """Write the weights to `folder` in Hugging Face's format, with a tokenizer of made-up words.

    The peer needs a tokenizer. Only the number of tokens matters, so the words mean nothing.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from clean_transformer import DemoTransformer
    from clean_transformer.parity.inputs import choose_weights

    chosen = choose_weights(weights)
    DemoTransformer.from_state_dict(chosen.state, chosen.cfg).save_pretrained(folder)
    end = "<|endoftext|>"
    ids = {end: 0} | {f"word{number}": number for number in range(1, chosen.cfg.d_vocab)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=end))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)


def weight_bytes(weights: str) -> int:
    """Return the number of bytes of the weights in float32.

    If the unembedding shares the weights of the embedding, these weights count once.
    """
    from clean_transformer.parity.inputs import choose_weights

    return sum(4 * prod(value.shape) for value in choose_weights(weights).state.values())


# The kinds of work, and the functions that do it. Time in a function that another one of these
# functions calls counts for the called function only.
KINDS = {
    "making the weights": ["parity.inputs:choose_weights"],
    "oracle: converting weights": ["parity.uses.parts:ExactParts.weight"],
    "oracle: running in float64": [
        "parity.activations.oracle_run:run_oracle",
        "parity.cliffs:cliff_runs",
        "parity.measurements:_float64_run",
        *(f"parity.uses.judge:Judge.{part}" for part in ("_embedding", "_block", "_layer_norm")),
        "parity.uses.judge:Judge._logits",
        "parity.uses.module_gradients:judge_module",
        "parity.uses.training:TrainingJudge._rows",
    ],
    "oracle: random rounding": ["parity.rounding:RandomRounding.__torch_dispatch__"],
    "oracle: NumPy": ["parity.uses.oracle:check_oracle"],
    "device": [
        "parity.measurements:record_run",
        "parity.activations.isolated:isolate",
        "parity.uses.parts:run",
        "parity.uses.backward:run_backward",
        "parity.invariants:check_invariants",
    ],
    "judging": [
        "parity.activations.isolated:_judge",
        "parity.uses.rows:by_rows",
        "parity.uses.rows:elementwise",
        "parity.invariants:row_difference",
        "analysis.comparison:impact",
        "analysis.comparison:rms_difference",
    ],
    "single operations": [
        "parity.operations.probes:run_probes",
        "parity.uses.sampling:check_sampling",
    ],
}


class Stopwatch:
    """Measures the CPU seconds of each kind of work in `KINDS`, inside a `with` block.

    `spent` has the seconds by kind. The time outside of all these functions is "other".
    """

    def __init__(self) -> None:
        self.kinds = {
            unwrap(attrgetter(name)(import_module(f"clean_transformer.{module}"))).__code__: kind
            for kind, places in KINDS.items()
            for module, name in (place.split(":") for place in places)
        }
        self.spent: dict[str, float] = defaultdict(float)
        self.running = ["other"]

    def __enter__(self) -> "Stopwatch":
        self.last = time.process_time()
        sys.setprofile(self.watch)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        self.lap()

    def lap(self) -> None:
        """Add the time since the last call to the kind of work that runs now."""
        now = time.process_time()
        self.spent[self.running[-1]] += now - self.last
        self.last = now

    def watch(self, frame: FrameType, event: str, value: object) -> None:
        """Python calls this method at the start and at the end of each function."""
        if event not in ("call", "return") or frame.f_code not in self.kinds:
            return
        self.lap()
        if event == "call":
            self.running.append(self.kinds[frame.f_code])
        else:
            self.running.pop()


def step_times(weights: str) -> list[tuple[str, float, float]]:
    """Return (step, seconds, CPU seconds) for each step of a check of the CPU in float32."""
    import torch

    from clean_transformer.parity.inputs import choose_weights
    from clean_transformer.parity.suite import check_device

    begun = [("making the weights", time.perf_counter(), time.process_time())]

    def on_step(step: str) -> None:
        begun.append((step, time.perf_counter(), time.process_time()))

    check_device(choose_weights(weights), "cpu", torch.float32, on_step=on_step)
    on_step("end")
    return [(step, after[1] - wall, after[2] - cpu) for (step, wall, cpu), after in pairwise(begun)]


def measured(command: list[str], size: int) -> tuple[str, ...]:
    """Run a command, and return its exit status, seconds, CPU seconds, peak GB, and peak / `size`.

    `size` is the number of bytes of the weights.
    """
    found = costs(command)
    return (
        str(found.status),
        f"{found.seconds:.1f}",
        f"{found.cpu_seconds:.1f}",
        f"{found.peak / 1e9:.2f}",
        f"{found.peak / size:.1f}",
    )


def main(
    weights: Annotated[
        str, typer.Option(help="What `doctor --weights` accepts, with commas between.")
    ] = "demo,stress:small",
    steps: Annotated[
        bool, typer.Option("--steps", help="Also print the time of each step.")
    ] = False,
    peer: Annotated[
        bool, typer.Option("--peer", help="Also measure TransformerLens's benchmark suite.")
    ] = False,
) -> None:
    """Print the time and the memory of `doctor` for each entry of `weights`."""
    columns = ("weights", "exit status", "seconds", "CPU seconds", "peak GB", "ratio to weights")
    table = Table(*columns, box=None)
    for each in weights.split(","):
        table.add_row(each, *measured([SCRIPT, "doctor", "--weights", each], weight_bytes(each)))
        if peer:
            with TemporaryDirectory() as folder:
                write_model(each, folder)
                command = [sys.executable, "-c", PEER.format(folder=folder)]
                row = measured(command, weight_bytes(each))
            table.add_row(f"{each}, TransformerLens", *row)
    console = Console(width=100)
    console.print(table)
    for each in weights.split(",") if steps else ():
        with Stopwatch() as stopwatch:
            times = step_times(each)
        of_kinds = Table(f"work for {each}", "CPU seconds", box=None)
        for kind, spent in sorted(stopwatch.spent.items(), key=itemgetter(1), reverse=True):
            of_kinds.add_row(kind, f"{spent:.1f}")
        console.print(of_kinds)
        of_steps = Table(f"step of {each}", "seconds", "CPU seconds", box=None)
        for step, wall_time, cpu_time in times:
            of_steps.add_row(step, f"{wall_time:.1f}", f"{cpu_time:.1f}")
        console.print(of_steps)


if __name__ == "__main__":
    typer.run(main)
