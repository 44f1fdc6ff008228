"""Compares our model in float64 on the CPU with NumPy, which does not use PyTorch's kernels.

In all other checks, the results of the float64 model (the oracle) count as exact.
"""

import numpy as np
import torch
from torch import Tensor

from clean_transformer.parity import numpy_gpt2
from clean_transformer.parity.kernels import first_wrong_kernel
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import Use, uses
from clean_transformer.parity.verdict import SAME_FUNCTION, Check, Verdict

# For each use, ROWS positions of a text and COLUMNS columns of W_U are compared.
ROWS, COLUMNS = 16, 512


def check_oracle(exact: ExactParts, generator: torch.Generator) -> list[Check]:
    """Compare our float64 model with NumPy, and return one check for each use of the model.

    In each use, such as generating text, PyTorch and NumPy compute one block, then the last
    LayerNorm, then the unembedding. `generator` chooses the block at random. It also chooses one
    text of the batch, ROWS positions and COLUMNS columns of W_U: only the results for these are
    compared.
    """
    with trusted(), torch.no_grad():
        return [_check(use, exact, generator) for use in uses(exact.cfg)]


def _check(use: Use, exact: ExactParts, generator: torch.Generator) -> Check:
    def drawn(below: int, count: int = 1) -> Tensor:
        return torch.randperm(below, generator=generator)[:count].sort().values

    layer, text = int(drawn(exact.cfg.n_layers)), int(drawn(use.batch))
    start = use.padding[text] if use.padding else 0
    rows = drawn(use.length - start, ROWS)
    W_U, b_U = exact.unembedding(drawn(exact.cfg.d_vocab, COLUMNS))
    tokens = use.in_one(use.calls(exact.cfg))
    x = sum(exact.embeddings(tokens, use.cache(whole=True)), torch.zeros(()))

    def ours() -> tuple[Tensor, Tensor]:
        residual = exact.block(layer)(x, use.cache(whole=True))[text, start:][rows]
        normalized = exact.module("ln_final")(residual)
        return residual, normalized @ W_U + b_U

    weights = {
        name: exact.weight(name).numpy()
        for name in exact.state
        if name.startswith((f"blocks.{layer}.", "ln_final."))
    }
    inner = numpy_gpt2.within(weights, f"blocks.{layer}")
    residual = numpy_gpt2.block(x[text, start:].numpy(), inner, exact.cfg.eps, rows.numpy())
    normalized = numpy_gpt2.layer_norm(
        residual, numpy_gpt2.within(weights, "ln_final"), exact.cfg.eps
    )
    theirs = residual, numpy_gpt2.linear(normalized, W_U.numpy(), b_U.numpy())
    errors = [
        np.abs(one.numpy() - other).max() / np.abs(other).max()
        for one, other in zip(ours(), theirs, strict=True)
    ]
    measured = float(np.max(errors))  # NaN if an error is NaN
    if measured <= SAME_FUNCTION:
        verdict, found = Verdict.PASS, f"{numpy_build()} agrees"
    else:  # also if `measured` is NaN
        wrong = first_wrong_kernel(ours) or "no single operation differs"
        verdict, found = Verdict.WRONG, f"{wrong}; {numpy_build()} differs"
    name, note = f"oracle beside NumPy, {use.case}", f"block {layer}; {found}"
    return Check(name, verdict, measured, SAME_FUNCTION, note)


def numpy_build() -> str:
    """Return the version of NumPy, and the BLAS library that computes its matrix products."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"NumPy {np.__version__} ({blas['name']} {blas['version']})"
