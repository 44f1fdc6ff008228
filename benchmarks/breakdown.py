"""Print where the time of one decoded token, or of one forward pass, goes on a CPU.

The table has the time of each operation that PyTorch's profiler sees. For each product with a
weight, it also has a rate: bytes of the weight per second (for a token), or floating-point
operations per second (for a forward pass). Python itself takes the time that is not in the table.

    python -m benchmarks.breakdown --dtype bfloat16
    python -m benchmarks.breakdown --batch 4 --length 256
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import profile

from clean_transformer.benchmark.contestants.limit import BUFFER, fastest, readings, weight_bytes
from clean_transformer.benchmark.running.timing import median_seconds, seconds
from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.text.decoding import decode_one, prefill
from clean_transformer.weights.synthetic import stress

Shapes = Sequence[Sequence[int]]
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "_int_mm", "_linear_pointwise")


@dataclass(frozen=True)
class Row:
    """One operation: how many times it runs in a call of the model, and its total seconds per call.

    `amount` is 0 if the operation is not a product. For a product, it is the bytes of weights that
    it reads per call, or its additions and multiplications per call.
    """

    operation: str
    times: float
    seconds: float
    amount: float = 0.0


def decoder(model: DemoTransformer, context: int, new: int) -> Any:
    """A function that decodes a token after `context` tokens. Call it at most `new` times."""
    prompt = [[token % model.cfg.d_vocab for token in range(context)]]
    logits, cache = prefill(model, prompt, new, getattr(model, "cache_class", KVCache))

    def step() -> None:
        nonlocal logits
        logits = decode_one(model, logits.argmax(dim=-1), cache)

    return step


def reader(model: DemoTransformer, batch: int, length: int) -> Callable[[], object]:
    """A function that computes all logits of a batch."""
    tokens = torch.arange(batch * length).view(batch, length) % model.cfg.d_vocab
    return lambda: model(tokens)


def bytes_read(shapes: Shapes, itemsize: int) -> int:
    """The bytes of a product's weight, which is its largest argument if the input is one row."""
    return math.prod(max(shapes, key=math.prod)) * itemsize


def flops(shapes: Shapes) -> float:
    """Additions and multiplications of a product of two matrices, perhaps added to a third one.

    `shapes` has the shapes of its arguments. Three matrices can be in any order.
    """
    matrices = [shape for shape in shapes if len(shape) > 1]
    if len(matrices) == 3:  # [r o], [r i], [i o]: each size occurs twice
        return 2 * math.sqrt(math.prod(map(math.prod, matrices)))
    x, W = matrices  # perhaps each with a batch axis
    return 2 * math.prod(x) * math.prod(W[-2:]) / x[-1]


def operations(events: Any, calls: int, amount: Callable[[Shapes], float]) -> list[Row]:
    """Summarize the events of `calls` profiled calls, the slowest operation first.

    `amount` computes `Row.amount` from the shapes of one product.
    """
    rows: dict[str, Row] = {}
    for event in events:
        name, done = event.key.split("::")[-1], 0.0
        if name in PRODUCTS:
            shapes = [shape for shape in event.input_shapes if shape]
            name = f"{name} {max(shapes, key=math.prod)}"
            done = event.count * amount(shapes)
        before = rows.get(name, Row(name, 0.0, 0.0))
        rows[name] = Row(
            name,
            before.times + event.count / calls,
            before.seconds + event.self_cpu_time_total / 1e6 / calls,
            before.amount + done / calls,
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def main(
    size: Annotated[str, typer.Option(help="small, medium, large or xl")] = "small",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64 or int8")] = (
        "float32"
    ),
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step to one graph.")
    ] = False,
    context: Annotated[int, typer.Option(help="Number of tokens before the decoded one.")] = 64,
    batch: Annotated[int, typer.Option(help="Batch of a forward pass.")] = 1,
    length: Annotated[
        int, typer.Option(help="Length of a forward pass; 0 decodes a token instead.")
    ] = 0,
    calls: Annotated[int, typer.Option(help="Number of profiled calls.")] = 20,
) -> None:
    """Print where the time of one token, or of one forward pass, goes after `optimize`."""
    cfg = Config.gpt2(size)
    weights: Literal["int8"] | None = "int8" if dtype == "int8" else None
    computed = torch.float32 if weights else choose_dtype(dtype)
    itemsize = 1 if weights else computed.itemsize
    model = DemoTransformer.from_state_dict(stress(cfg), cfg).to(computed)
    with torch.inference_mode():
        optimized = model.requires_grad_(False).optimize(weights, compile=compiled)
        call = reader(model, batch, length) if length else decoder(model, context, 3 * calls)
        for _ in range(calls):
            call()
        taken = statistics.median(seconds(call, "cpu") for _ in range(calls))
        with profile(record_shapes=True) as profiled:
            for _ in range(calls):
                call()
    console = Console()
    console.print(optimized)
    events = profiled.key_averages(group_by_input_shape=True)
    if length:
        rows = operations(events, calls, flops)
        console.print(table(rows, taken, "GFLOP/s"))
        products = [row for row in rows if row.amount]
        share = sum(row.seconds for row in products) / taken
        rate = sum(row.amount for row in products) / share / taken
        console.print(
            f"{1e3 * taken:.0f} ms per pass; the products take {share:.0%} of it, at "
            f"{rate / 1e9:.0f} GFLOP/s"
        )
    else:
        rows = operations(events, calls, partial(bytes_read, itemsize=itemsize))
        console.print(table(rows, taken, "GB/s"))
        rate, least = read_rate(), weight_bytes(cfg, dtype)
        console.print(
            f"{1e3 * taken:.1f} ms per token; this machine reads {rate / 1e9:.1f} GB/s, so that "
            f"reading the weights takes {1e3 * least / rate:.1f} ms, "
            f"{least / rate / taken:.0%} of it"
        )


def read_rate() -> float:
    """The bytes per second at which this machine reads memory."""
    buffer = torch.ones(BUFFER // 4)
    read = fastest([lambda call=call: call for call in readings(buffer)], "cpu")
    return BUFFER / median_seconds(read, "cpu", at_least=0.5)


def table(rows: list[Row], taken: float, rate: str) -> Table:
    """A table of the twelve slowest operations, with one row for all others."""
    printed = Table("operation", "times", "µs each", "ms in total", "share", rate)
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
            f"{row.amount / row.seconds / 1e9:.1f}" if row.amount else "",
        )
    return printed


if __name__ == "__main__":
    typer.run(main)
