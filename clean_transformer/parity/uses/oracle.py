"""Checks a block of the float64 oracle against NumPy, which shares no kernel with PyTorch."""

import numpy as np
import torch

from clean_transformer.parity import numpy_gpt2
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.verdict import SAME_FUNCTION, Check, Verdict


def check_oracle(exact: ExactParts, generator: torch.Generator) -> Check:
    """Compare the output of one block of the oracle with the same block in NumPy, in float64.

    `generator` chooses the block at random. The input is the residual stream before the first
    block, for the first text of the first use. In the result, `measured` is the largest
    |oracle − NumPy| of all elements, divided by the largest |NumPy|.
    """
    layer = int(torch.randint(exact.cfg.n_layers, (1,), generator=generator))
    tokens = uses(exact.cfg)[0].calls(exact.cfg)[0][:1]
    with trusted(), torch.no_grad():
        x = sum(exact.embeddings(tokens, None), torch.zeros(()))
        ours = exact.block(layer)(x, None)[0].numpy()
        weights = {
            name: exact.weight(name).numpy()
            for name in exact.state
            if name.startswith(f"blocks.{layer}.")
        }
        inner = numpy_gpt2.within(weights, f"blocks.{layer}")
        theirs = numpy_gpt2.block(x[0].numpy(), inner, exact.cfg.eps)
        measured = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    verdict = Verdict.PASS if measured <= SAME_FUNCTION else Verdict.WRONG
    note = f"block {layer}, NumPy {np.__version__}"
    return Check("oracle beside NumPy", verdict, measured, SAME_FUNCTION, note)
