"""Measures the time and the memory of `clean-transformer doctor`, which checks a device.

The script runs the command in a fresh process for each entry of the list `--weights`. It prints the
wall-clock time and the CPU time (user plus system) in seconds, and the peak resident memory of the
largest process. It also prints this memory divided by the bytes of the weights in float32.

    python -m benchmarks.doctor --weights demo,stress:small

To see how time and memory grow with the model, name several sizes, such as
`--weights stress:small,stress:medium,stress:large,stress:xl`.

With `--steps`, the script also runs the check in its own process, and prints the time of each step.

With `--peer`, the script also measures TransformerLens's own benchmark suite, which compares a
`TransformerBridge` with Hugging Face's GPT-2 on the CPU. Both load the same weights. Text quality,
phase 4 of that suite, is left out, because it needs a second model from the Hugging Face hub.
"""

import sys
import time
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
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
        of_steps = Table(f"step of {each}", "seconds", "CPU seconds", box=None)
        for step, wall_time, cpu_time in step_times(each):
            of_steps.add_row(step, f"{wall_time:.1f}", f"{cpu_time:.1f}")
        console.print(of_steps)


if __name__ == "__main__":
    typer.run(main)
