"""Prints how long each operation takes in a decoded token, a forward pass or a training step.

PyTorch's profiler measures these times. It does not measure the time that Python itself takes. For
each matrix product, the script also prints a rate. If the script decodes a token, the rate is the
number of bytes of weights that are read per second. If it runs a forward pass or a training step,
the rate is the number of floating-point operations per second.

    python -m benchmarks.breakdown --dtype bfloat16
    python -m benchmarks.breakdown --batch 4 --length 256
    python -m benchmarks.breakdown --batch 4 --length 256 --training --calls 5
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
from clean_transformer.inference.huge_pages import use_huge_pages
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.text.decoding import decode_one, prefill
from clean_transformer.training.loss import cross_entropy
from clean_transformer.weights.synthetic import stress

Shapes = Sequence[Sequence[int]]
# The operations of PyTorch that are matrix products.
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "int8_linear", "_linear_pointwise")


@dataclass(frozen=True)
class Row:
    """One row of the table: an operation and its time.

    In each call of the model, the operation runs `times` times, and takes `seconds` in total. If
    the script decodes a token, `amount` is the number of bytes of weights that the operation reads
    in these runs. Otherwise, `amount` is the number of additions and multiplications. `amount` is 0
    if the operation is not a matrix product.
    """

    operation: str
    times: float
    seconds: float
    amount: float = 0.0


def decoder(model: DemoTransformer, context: int, new: int) -> Any:
    """Read a prompt of `context` tokens, and return a function that decodes the next token.

    The function can be called at most `new` times.
    """
    prompt = [[token % model.cfg.d_vocab for token in range(context)]]
    logits, cache = prefill(model, prompt, new, getattr(model, "cache_class", KVCache))

    def step() -> None:
        nonlocal logits
        logits = decode_one(model, logits.argmax(dim=-1), cache)

    return step


def reader(model: DemoTransformer, batch: int, length: int) -> Callable[[], object]:
    """Return a function that runs the model on `batch` inputs of `length` tokens each."""
    tokens = torch.arange(batch * length).view(batch, length) % model.cfg.d_vocab
    return lambda: model(tokens)


def trainer(model: DemoTransformer, batch: int, length: int) -> Callable[[], object]:
    """Return a function that makes a step of AdamW on `batch` inputs of `length` tokens each."""
    tokens = torch.arange(batch * length).view(batch, length) % model.cfg.d_vocab
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step() -> None:
        logits = model(tokens[:, :-1])
        torch.autograd.backward(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_read(shapes: Shapes, itemsize: int) -> int:
    """Return the number of bytes of the weight in one matrix product.

    `shapes` has the shapes of the product's arguments. The largest argument is the weight.
    `itemsize` is the number of bytes of one element.
    """
    return math.prod(max(shapes, key=math.prod)) * itemsize


def flops(shapes: Shapes) -> float:
    """Return the number of additions and multiplications of a matrix product.

    `shapes` has the shapes of the operation's arguments, in any order. If three arguments are
    matrices, the operation multiplies two of them and adds the third.
    """
    matrices = [shape for shape in shapes if len(shape) > 1]
    # A product of [r i] and [i o] is added to a matrix [r o]. Each of the sizes r, i and o occurs
    # twice in these shapes, so the square root of the product of all six numbers is r · i · o.
    if len(matrices) == 3:
        return 2 * math.sqrt(math.prod(map(math.prod, matrices)))
    x, W = matrices  # for a batched product, both have a batch axis
    return 2 * math.prod(x) * math.prod(W[-2:]) / x[-1]


def operations(events: Any, calls: int, amount: Callable[[Shapes], float]) -> list[Row]:
    """Summarize the profiler's `events` as one row per operation, the slowest operation first.

    The profiler recorded `events` during `calls` calls of the model. The function `amount` takes
    the shapes of a matrix product's arguments, and returns the `Row.amount` of one such product.
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
    training: Annotated[
        bool, typer.Option("--training", help="Train on these inputs, without `optimize()`.")
    ] = False,
    calls: Annotated[int, typer.Option(help="Number of profiled calls.")] = 20,
) -> None:
    """Print how long each operation of an optimized model takes, for one token or forward pass.

    With --training, the model is not optimized, and makes one training step.
    """
    if training and not (length and dtype == "float32" and not compiled):
        raise typer.BadParameter("--training needs --length, and float32 without --compile")
    cfg = Config.gpt2(size)
    weights: Literal["int8"] | None = "int8" if dtype == "int8" else None
    computed = torch.float32 if weights else choose_dtype(dtype)
    itemsize = 1 if weights else computed.itemsize
    model = DemoTransformer.from_state_dict(stress(cfg), cfg).to(computed)
    console = Console()
    with torch.inference_mode(not training):
        if training:
            call = trainer(model, batch, length)
        else:
            console.print(model.requires_grad_(False).optimize(weights, compile=compiled))
            call = reader(model, batch, length) if length else decoder(model, context, 3 * calls)
        for _ in range(calls):
            call()
        taken = statistics.median(seconds(call, "cpu") for _ in range(calls))
        with profile(record_shapes=True) as profiled:
            for _ in range(calls):
                call()
    events = profiled.key_averages(group_by_input_shape=True)
    if length:
        rows = operations(events, calls, flops)
        console.print(table(rows, taken, "GFLOP/s"))
        products = [row for row in rows if row.amount]
        share = sum(row.seconds for row in products) / taken
        rate = sum(row.amount for row in products) / share / taken
        console.print(
            f"{1e3 * taken:.0f} ms per {'step' if training else 'pass'}; the products take "
            f"{share:.0%} of it, at {rate / 1e9:.0f} GFLOP/s"
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
    """Return how many bytes of memory this machine reads per second."""
    buffer = torch.ones(BUFFER // 4)
    use_huge_pages(buffer)
    read = fastest([lambda call=call: call for call in readings(buffer)], "cpu")
    return BUFFER / median_seconds(read, "cpu", at_least=0.5)


def table(rows: list[Row], taken: float, rate: str) -> Table:
    """Return a table of the twelve slowest operations, with one more row for all other operations.

    `taken` is the time of one call of the model in seconds. `rate` is the unit of the last column.
    """
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
