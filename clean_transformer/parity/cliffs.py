"""Chooses inputs for one block at which kernels are known to fail on some devices."""

import torch
from torch import Tensor

from clean_transformer.parity.inputs import LENGTH, suite_tokens
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.parts import ExactParts

# Sequence lengths at which kernels are known to switch to another algorithm. One block runs at
# these lengths.
CLIFFS = (1, 2, 8, 9, 31, 32, 1023, 1024)
# One run of a module alone: the module's path, a description of its input, a path of `PATHS` or
# BLACK_BOX, and its input [batch pos d_model].
Run = tuple[str, str, str, Tensor]


@torch.no_grad()
def cliff_runs(exact: ExactParts, like: Tensor) -> list[Run]:
    """Return runs of one block, and of modules in this block, alone.

    The inputs have lengths and memory layouts at which kernels are known to fail on some devices.
    They are computed in float64 on the CPU, because wrong values from the device could hide a
    fault, and are then moved to the device and the dtype of `like`.
    """
    # The fourth block, because GPT-2's residual stream has its largest entries from there on.
    layer, n_ctx = min(3, exact.cfg.n_layers - 1), exact.cfg.n_ctx
    name = f"blocks.{layer}"
    with trusted():
        residual = sum(exact.embeddings(suite_tokens(exact.cfg, 1, n_ctx), None), torch.zeros(()))
        for before in range(layer):
            residual = exact.block(before)(residual, None)
        normalized = exact.module(name).get_submodule("ln1")(residual)
        residual, normalized = residual.to(like.dtype), normalized.to(like.dtype)
    residual, normalized = residual.to(like.device), normalized.to(like.device)
    lengths = sorted({min(length, n_ctx) for length in CLIFFS})
    cases = {f"1 × {length} tokens": residual[:, :length].clone() for length in lengths}
    texts = torch.cat([residual, residual.flip(1)])  # a batch of two different texts
    both = texts[:, :LENGTH].clone()
    cases["permuted input"] = both.transpose(0, 1).contiguous().transpose(0, 1)
    cases["transposed input"] = both.mT.contiguous().mT
    cases["sliced input"] = texts[:, -both.shape[1] :]
    runs: list[Run] = []
    for case, x in cases.items():
        runs.append((name, case, "fused", x))
        if (length := x.shape[1]) <= LENGTH:
            runs.append((name, case, "explicit", x))
        else:
            # To save time, only these modules run: the others call the same kernels on both paths.
            runs.append((f"{name}.ln1", case, "explicit", x))
            given = normalized[:, :length].clone()
            runs.append((f"{name}.attn", case, "explicit", given))
    return runs
