"""Measures the largest rounding errors on a healthy machine, which the parity suite must accept.

Each run draws a small model, a batch of tokens and a number of threads at random. The parity suite
checks every activation of this model three times. Each time, other hook points have hooks, so that
the model runs other kernels. The script prints the largest error ratio of each kind of operation in
each dtype. An error ratio is an error divided by the size of one rounding error (see
`parity/limits.py`). The script also prints the number of activations that fail the check. On a
healthy machine, this number should be 0.

    python -m benchmarks.sensitivity --runs 200 --json benchmarks/results/healthy_ratios.json
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.healthy_settings import threads
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.oracle import float64_oracle
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.environment import environment
from clean_transformer.reports.plain import plain, write_plain
from clean_transformer.support.dtypes import DTYPES, choose_dtype
from clean_transformer.weights import synthetic


def draw_config(draw: random.Random) -> Config:
    """Return the architecture of a small GPT-2 whose sizes are drawn with `draw`."""
    n_heads, d_head = draw.choice((1, 2, 3, 4)), draw.choice((8, 16, 32, 64))
    return Config(
        n_layers=draw.choice((1, 2, 3, 4)),
        n_heads=n_heads,
        d_model=draw.choice((n_heads * d_head, 32, 96, 256)),
        d_head=d_head,
        d_mlp=draw.choice((64, 256, 1024, 3072)),
        d_vocab=draw.choice((50, 1025, 5000)),
        n_ctx=draw.choice((33, 64, 257)),
        tied_unembed=draw.random() < 0.5,
    )


def healthy_run(seed: int, dtype: torch.dtype) -> Iterator[Isolated]:
    """Draw a model and tokens with `seed`, and yield the result of checking each activation.

    `dtype` is the dtype of the model.
    """
    draw = random.Random(seed)
    cfg = draw_config(draw)
    weights = draw.choice((synthetic.plain, synthetic.stress))(cfg, seed)
    model = DemoTransformer.from_state_dict(weights, cfg).to(dtype)
    oracle = float64_oracle(model)
    length = draw.choice([n for n in (1, 2, 8, 9, 33, 64, 257) if n <= cfg.n_ctx])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(cfg.d_vocab, (draw.choice((1, 2, 3)), length), generator=generator)
    with threads(draw.choice((1, 2))):
        for path in PATHS:
            yield from isolate(model, oracle, tokens, path=path)


def main(
    runs: Annotated[int, typer.Option(help="Number of models to draw in each dtype.")] = 50,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Print the largest error ratio of each kind of operation in each dtype."""
    largest: dict[str, dict[str, float]] = {}
    alarms, rows = 0, 0
    progress = Console(stderr=True)
    for name in DTYPES:
        for seed in track(range(runs), f"{name}", console=progress, transient=True):
            for row in healthy_run(seed, choose_dtype(name)):
                by_dtype = largest.setdefault(row.operation, {})
                by_dtype[name] = max(by_dtype.get(name, 0.0), row.ratio)
                alarms += row.verdict is not Verdict.PASS
                rows += 1
    table = Table("largest healthy ratio", *DTYPES, box=None)
    for operation, by_dtype in largest.items():
        table.add_row(operation, *(f"{by_dtype[name]:.2g}" for name in DTYPES))
    console = Console()
    console.print(table)
    total = runs * len(DTYPES)
    console.print(f"{alarms} false alarms in {total} runs, {rows:,} activations judged")
    if json_file is not None:
        figures = {
            "runs": total,
            "rows": rows,
            "false_alarms": alarms,
            "largest_ratio": largest,
            "environment": environment(),
        }
        write_plain(plain(figures), json_file)
    raise typer.Exit(1 if alarms else 0)


if __name__ == "__main__":
    typer.run(main)
