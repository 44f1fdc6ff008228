"""Where the time of one decoded token goes on a processor: what keeps it from the machine's limit.

Prints each product with a weight, with the rate at which it reads that weight, and every other
operation, as PyTorch's profiler sees them; what is left is Python's.

    python -m benchmarks.breakdown --dtype bfloat16
"""

import math
import statistics
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import profile

from benchmarks._timing import median_seconds, seconds
from benchmarks.roofline import BUFFER, fastest, readings, weight_bytes
from clean_transformer.config import Config
from clean_transformer.generate import decode_one, prefill
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.choices import DTYPES
from clean_transformer.weights.synthetic import stress

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "_int_mm", "_linear_pointwise")


@dataclass(frozen=True)
class Row:
    """One operation: how often a token needs it, its seconds in all, and the bytes that it reads.

    `read` is of weights, and 0 for what has none.
    """

    operation: str
    times: float
    seconds: float
    read: float = 0.0


def decoder(model: DemoTransformer, context: int, new: int) -> Any:
    """A call that decodes one more token after so many, of as many as there is room for."""
    prompt = [[token % model.cfg.d_vocab for token in range(context)]]
    logits, cache = prefill(model, prompt, new, getattr(model, "cache_class", KVCache))

    def step() -> None:
        nonlocal logits
        logits = decode_one(model, logits.argmax(dim=-1), cache)

    return step


def operations(events: Any, tokens: int, itemsize: int) -> list[Row]:
    """The rows of a profile of so many tokens, the longest first."""
    rows: dict[str, Row] = {}
    for event in events:
        name, read = event.key.split("::")[-1], 0.0
        if name in PRODUCTS:  # of a single row with a weight, which is the largest of its arguments
            shape = max(event.input_shapes, key=math.prod)
            name, read = f"{name} {shape}", event.count * math.prod(shape) * itemsize
        before = rows.get(name, Row(name, 0.0, 0.0))
        rows[name] = Row(
            name,
            before.times + event.count / tokens,
            before.seconds + event.self_cpu_time_total / 1e6 / tokens,
            before.read + read / tokens,
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def main(
    size: Annotated[str, typer.Option(help="small, medium, large or xl")] = "small",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64 or int8")] = (
        "float32"
    ),
    compiled: Annotated[bool, typer.Option("--compile", help="As one graph.")] = False,
    context: Annotated[int, typer.Option(help="Tokens before it.")] = 64,
    tokens: Annotated[int, typer.Option(help="How many are profiled.")] = 20,
) -> None:
    """Print where the time of a decoded token goes, after `optimize`."""
    cfg = Config.gpt2(size)
    weights = "int8" if dtype == "int8" else None
    computed = torch.float32 if weights else DTYPES[dtype]
    model = DemoTransformer.from_state_dict(stress(cfg), cfg).to(computed)
    with torch.inference_mode():
        optimized = model.requires_grad_(False).optimize(weights, compile=compiled)
        step = decoder(model, context, 3 * tokens)
        for _ in range(tokens):
            step()
        taken = statistics.median(seconds(step, "cpu") for _ in range(tokens))
        with profile(record_shapes=True) as profiled:
            for _ in range(tokens):
                step()
        buffer = torch.ones(BUFFER // 4)
        read = fastest([lambda call=call: call for call in readings(buffer)], "cpu")
        rate = BUFFER / median_seconds(read, "cpu", at_least=0.5)
    events = profiled.key_averages(group_by_input_shape=True)
    rows = operations(events, tokens, 1 if weights else computed.itemsize)
    console = Console()
    console.print(optimized)
    console.print(table(rows, taken))
    least = weight_bytes(cfg, dtype) / rate
    console.print(
        f"{1e3 * taken:.1f} ms a token; reading its weights at the {rate / 1e9:.1f} GB/s of this "
        f"machine takes {1e3 * least:.1f} ms, {least / taken:.0%} of that"
    )


def table(rows: list[Row], taken: float) -> Table:
    """The longest rows, and the others together."""
    printed = Table("operation", "a token", "µs each", "ms a token", "share", "GB/s")
    shown, others = rows[:12], rows[12:]
    rest = Row(
        f"{len(others)} others", sum(r.times for r in others), sum(r.seconds for r in others)
    )
    for row in (*shown, rest):
        printed.add_row(
            row.operation,
            f"{row.times:.0f}",
            f"{1e6 * row.seconds / row.times:.0f}" if row.times else "",
            f"{1e3 * row.seconds:.2f}",
            f"{row.seconds / taken:.0%}",
            f"{row.read / row.seconds / 1e9:.1f}" if row.read else "",
        )
    return printed


if __name__ == "__main__":
    typer.run(main)
