"""Counts the faults that the parity suite finds, and its false alarms on a healthy CPU.

The parity suite (`clean_transformer.parity`) checks whether a device computes a model correctly.
First, the script runs the suite on small random models, under settings that change how the CPU
rounds. Each failed check is a false alarm. Then the script plants each fault of `parity.faults` in
PyTorch, so that an operation returns wrong results. It counts how many faults the suite finds, and
how often the suite names the faulty operation. Finally, the script measures the smallest relative
error that the suite finds.

    python -m benchmarks.corpus --runs 400 --json benchmarks/results/corpus.json
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.healthy_settings import SETTINGS
from benchmarks.planted_faults import (
    BF16,
    F16,
    F32,
    calls_of_a_run,
    find_all,
    logits_of,
    model_of,
    seldom_found,
)
from clean_transformer import variants
from clean_transformer.config import Config
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.assertion import assert_parity
from clean_transformer.parity.faults.corruptions import always, own, with_result
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.limits import PART, verdict_of
from clean_transformer.parity.oracle import float64_oracle
from clean_transformer.parity.uses.every import judge_sampling
from clean_transformer.parity.uses.judge import Judge
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.uses.training import judge_training
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.environment import environment
from clean_transformer.reports.plain import plain, write_plain
from clean_transformer.weights import synthetic

# FlexAttention compiles itself, so it does not run in the dispatch mode of "in-order sums".
VARIANTS = [
    getattr(variants, name)
    for name in dir(variants)
    if isinstance(getattr(variants, name), type) and name not in ("FlexAttention", "NoPositions")
]


class Subclass(MLP):
    """A subclass of `MLP` that changes nothing."""


def draw_weights(draw: random.Random, seed: int) -> Weights:
    """Return random weights of a tiny model, whose sizes are drawn with `draw`."""
    heads, d_head = draw.choice((1, 2, 3)), draw.choice((8, 16, 20))
    cfg = Config(
        n_layers=draw.choice((1, 2)),
        n_heads=heads,
        d_model=draw.choice((heads * d_head, 16, 33, 64)),
        d_head=d_head,
        d_mlp=draw.choice((32, 63, 128)),
        d_vocab=draw.choice((101, 256, 500)),
        n_ctx=draw.choice((1, 2, 8, 24, 40, 120)),
        tied_unembed=draw.random() < 0.5,
    )
    return Weights("", cfg, draw.choice((synthetic.plain, synthetic.stress))(cfg, seed))


def healthy_run(seed: int, parts: dict[str, list[float]]) -> Iterator[tuple[str, str]]:
    """Run some checks of the parity suite on a random model or module, without a planted fault.

    Yields a pair for each check: the name of the check, and a description of the false alarm, or ""
    if there is none. Appends the error ratio of each part of a model that is judged as a whole, by
    the limits PART, to `parts[dtype]`.
    """
    draw = random.Random(seed)
    weights, dtype = draw_weights(draw, seed), draw.choice((F32, BF16, F16))
    if seed % 3 == 0:
        kind = draw.choice([*VARIANTS, Subclass])
        cfg = Config(n_layers=1, n_heads=2, d_model=32, d_head=16, d_mlp=64, n_ctx=16)
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))
        try:
            assert_parity(kind(cfg), x, device="cpu", dtype=dtype)
            yield "assert_parity", ""
        except AssertionError as alarm:
            yield "assert_parity", f"{dtype}: {alarm}".splitlines()[0]
        return
    mode = draw.choices(("eager", "autocast", "optimized"), (6, 2, 1))[0]
    if mode == "optimized":  # always the same small model
        cfg = Config(n_layers=1, n_heads=2, d_model=32, d_head=16, d_mlp=64, d_vocab=101, n_ctx=24)
        weights = Weights("", cfg, synthetic.stress(cfg, seed))
    dtype = F32 if mode == "autocast" else dtype
    where = f"{dtype} {mode} {weights.cfg}"
    model = model_of(weights, dtype)
    if mode == "optimized":
        model.optimize()
    autocast = BF16 if mode == "autocast" else None
    generator = torch.Generator().manual_seed(seed)
    judge = Judge(model, ExactParts(weights.cfg, weights.state, dtype), generator, autocast)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        for use in draw.sample(uses(weights.cfg), 3):
            result = judge(use, locates=False)
            ratios = parts.setdefault("autocast" if autocast else str(dtype), [])
            ratios += [row.ratio for row in result.rows if is_part(row)]
            bad = result.first_failure
            yield use.name, f"{where}: {bad}" if bad else ""
    if dtype == F32 and mode == "eager":
        bad = judge_training(judge, locates=False).first_failure
        yield "training", f"{where}: {bad}" if bad else ""
    if mode == "eager":
        oracle, tokens = float64_oracle(model), uses(weights.cfg)[0].calls(weights.cfg)[0]
        rows = [row for path in PATHS for row in isolate(model, oracle, tokens, path=path)]
        alarms = [row for row in rows if row.verdict is not Verdict.PASS]
        yield "hooks", f"{where}: {alarms[0]}" if alarms else ""
        sampled = judge_sampling(weights.cfg, logits_of(weights.cfg.d_vocab, dtype))
        yield "sampling", "" if sampled.verdict is Verdict.PASS else f"{where}: {sampled.rows}"


def is_part(row: object) -> TypeGuard[Isolated]:
    """Whether `row` is the result of a part of a model that is judged as a whole."""
    return isinstance(row, Isolated) and row.operation == PART.name


def judged_healthy(setting: str, seeds: range) -> dict[str, Any]:
    """Run checks without a planted fault for each seed, under one of the settings in `SETTINGS`.

    The result has the number of checks by name, a list of the false alarms, and the error ratios of
    parts of models by dtype.
    """
    judged: Counter[str] = Counter()
    alarms: list[tuple[str, str]] = []
    parts: dict[str, list[float]] = {}
    with SETTINGS[setting][1]():
        for seed in seeds:
            for use, alarm in healthy_run(seed, parts):
                judged[use] += 1
                if alarm:
                    alarms.append((use, f"{setting}, seed {seed}, {alarm}"))
    return {"judged": judged, "alarms": alarms, "parts": parts}


def in_new_process(setting: str, seeds: range) -> dict[str, Any]:
    """Run checks without a planted fault in a new process with the setting's environment."""
    command = [sys.executable, "-m", "benchmarks.corpus", "--worker", setting]
    done = subprocess.run(
        [*command, "--first", str(seeds.start), "--runs", str(len(seeds))],
        env=os.environ | SETTINGS[setting][0],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def threshold(operation: str, dtype: torch.dtype) -> float:
    """Return the smallest relative error of `operation` that the parity suite finds.

    Only powers of two are tried. If the suite finds none of these errors, the result is infinity.
    """
    cfg = Config(n_layers=1, n_heads=2, d_model=64, d_head=32, d_mlp=128, d_vocab=101, n_ctx=24)
    weights = Weights("", cfg, synthetic.stress(cfg))
    model = model_of(weights, dtype)
    oracle, tokens = float64_oracle(model), uses(cfg)[0].calls(cfg)[0]
    for exponent in range(-26, 1):
        off = with_result(lambda result, by=2.0**exponent: (result.double() * (1 + by)).to(result))
        with own("", "", operation, always, off).plant():
            rows = [row for path in PATHS for row in isolate(model, oracle, tokens, path=path)]
        limits = ((row.ratio, row.healthy, row.wrong, row.lower_precision) for row in rows)
        if any(verdict_of(*each) is not Verdict.PASS for each in limits):
            return 2.0**exponent
    return float("inf")


def distribution(ratios: list[float]) -> dict[str, float]:
    """Return the number of the ratios, some quantiles, the largest, and the index of the tail.

    The tail is that of a Pareto distribution: the share of ratios above x falls like x^−α. α is
    estimated from the largest 2% of the ratios (Hill 1975), which are those above `tail from`. So
    the share of ratios above x is about 0.02 (x / `tail from`)^−α.
    """
    ordered = sorted(ratios, reverse=True)
    count, largest = len(ordered), max(10, len(ordered) // 50)
    tail, start = ordered[:largest], ordered[min(largest, count - 1)]
    alpha = 1 / statistics.mean(math.log(ratio / start) for ratio in tail)
    at = {f"{share:g}": ordered[int((1 - share) * count)] for share in (0.5, 0.9, 0.99, 0.999)}
    return {"count": count, **at, "largest": ordered[0], "tail from": start, "α": alpha}


OPERATIONS = (
    "embedding",
    "add",
    "addmm",
    "gelu",
    "native_layer_norm",
    "_softmax",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def main(
    runs: Annotated[int, typer.Option(help="Number of healthy models and modules to judge.")] = 400,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures as JSON.")
    ] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
    first: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Count the planted faults that the suite finds, and the false alarms on a healthy machine."""
    if worker:
        print(json.dumps(judged_healthy(worker, range(first, first + runs))))
        return
    console, each = Console(), -(-runs // len(SETTINGS))
    judged: Counter[str] = Counter()
    alarms: list[tuple[str, str]] = []
    ratios: dict[str, list[float]] = {}
    for number, setting in enumerate(SETTINGS):
        part = in_new_process(setting, range(number * each, (number + 1) * each))
        judged.update(part["judged"])
        alarms += [(use, alarm) for use, alarm in part["alarms"]]
        for dtype, values in part["parts"].items():
            ratios.setdefault(dtype, []).extend(values)
    parts = {dtype: distribution(values) for dtype, values in ratios.items()}
    missed: list[str] = []
    counts: dict[str, Counter[str]] = {}
    for use, name, (caught, attributed) in find_all():
        count = counts.setdefault(use, Counter())
        count.update(planted=1, caught=int(caught), attributed=int(attributed))
        missed += [] if caught and attributed else [name]
    rare = seldom_found(1 / 50, 100) | {"calls of all uses, 12 layers": calls_of_a_run()}
    thresholds = {
        operation: {str(dtype): threshold(operation, dtype) for dtype in (F32, BF16)}
        for operation in OPERATIONS
    }
    table = Table("use", "planted", "caught", "attributed", "judged healthy", "alarms", box=None)
    for use in sorted({*judged, *counts}):
        count, wrong = counts.get(use, Counter()), sum(name == use for name, _ in alarms)
        figures = (count["planted"], count["caught"], count["attributed"], judged[use], wrong)
        table.add_row(use, *map(str, figures))
    console.print(table)
    console.print(f"not caught or not attributed: {', '.join(missed) or 'none'}")
    console.print(f"a fault of 1 call in 50: {rare}")
    for dtype, ratio in parts.items():
        console.print(f"error ratio of parts in {dtype}: {ratio}")
    for operation, by_dtype in thresholds.items():
        smallest = ", ".join(f"{dtype} {value:.1e}" for dtype, value in by_dtype.items())
        console.print(f"smallest error found in {operation}: {smallest}")
    for _, alarm in alarms:
        console.print(alarm)
    if json_file is not None:
        measured = {
            "healthy_runs": each * len(SETTINGS),
            "judged": dict(judged),
            "alarms": alarms,
            "faults": {use: dict(count) for use, count in counts.items()},
            "missed": missed,
            "seldom": rare,
            "parts": parts,
            "thresholds": thresholds,
            "environment": environment(),
        }
        write_plain(plain(measured), json_file)
    raise typer.Exit(1 if alarms else 0)


if __name__ == "__main__":
    typer.run(main)
