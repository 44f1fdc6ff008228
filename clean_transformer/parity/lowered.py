"""Judges a run whose matrix products are computed in a lower precision, such as TF32."""

from collections import Counter
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from clean_transformer.modules.contract import kind
from clean_transformer.parity.activations.black_box import BLACK_BOX
from clean_transformer.parity.activations.bounds import PRODUCTS
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import ALONE, GRADIENT, PART, SELDOM_EXCEEDED, SUM
from clean_transformer.parity.operations import bounds
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.oracle import ACCUMULATOR, LOWER_PRECISION
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.verdict import Check, Verdict

Row = TypeVar("Row")

# The kinds of operations and parts of a model whose errors come from matrix products.
WITH_PRODUCTS = {each.name for each in (*PRODUCTS, SUM, PART, GRADIENT, ALONE)}

# The kinds of modules that multiply no matrices.
WITHOUT_PRODUCTS = {"embed", "pos_embed", "ln1", "ln2", "ln_final"}


def in_lower_precision(run: DeviceRun) -> DeviceRun:
    """Return the run, in which errors that a lower precision explains are DEGRADED, not WRONG.

    If the errors of an activation are those of TF32 or bfloat16, the device multiplies matrices in
    this precision. Then all products of the run have such errors, in every use. An error is
    explained if it is at most 8 roundings in the lower precision. The difference of an invariant is
    explained if it is as many times larger than allowed as a rounding is in the lower precision.
    If the activations name both precisions, the one that more of them name counts. An optimized or
    compiled run has no such activations, so a product of random matrices is computed on the device.
    If no precision is named, the result is the run as it is.
    """
    named = Counter(row.lower_precision for row in run.isolated if row.lower_precision)
    name = next((name for name, _ in named.most_common(1)), "")
    is_black_box = any(row.path == BLACK_BOX for row in run.isolated)
    if not name and is_black_box and run.dtype == "float32":
        name = precision_of_products(run.device)
    if not name:
        return run
    factor = {name: u for u, name in LOWER_PRECISION.items()}[name] / ACCUMULATOR

    def explain(row: Row) -> Row:
        if not isinstance(row, Isolated) or row.operation not in WITH_PRODUCTS:
            return row
        is_explained = row.healthy < row.ratio <= SELDOM_EXCEEDED * factor
        return replace(row, lower_precision=name) if is_explained else row

    def degrade(check: Check, largest: float) -> Check:
        measured = check.measured
        if check.verdict is not Verdict.WRONG or measured is None or measured > largest:
            return check
        return replace(check, verdict=Verdict.DEGRADED, note=f"explained by {name} precision")

    return replace(
        run,
        isolated=[
            row if row.path != BLACK_BOX or kind(row.name) in WITHOUT_PRODUCTS else explain(row)
            for row in run.isolated
        ],
        uses=[replace(use, rows=tuple(map(explain, use.rows))) for use in run.uses],
        invariants=[degrade(each, factor * (each.allowed or 0.0)) for each in run.invariants],
        probes=[
            degrade(probe, SELDOM_EXCEEDED * factor)
            if probe.name.replace(",", " ").split()[0] in bounds.PRODUCTS
            else probe
            for probe in run.probes
        ],
    )


def precision_of_products(device: str) -> str:
    """Return the lower precision in which the device multiplies float32 matrices, such as "TF32".

    The result is "" if it multiplies them in float32.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 256, 256, generator=generator).to(device)
    finding = check_operations(F.linear, x, weight).finding
    return finding.judgment.precision if finding else ""
