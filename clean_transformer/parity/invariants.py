"""Invariants: if a model runs on a device in two equivalent ways, both must give the same logits.

Each invariant is a function that returns the logits of both ways as a pair. They are compared with
each other, so no exact logits are needed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.inputs import spread_ids
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.verdict import Check, Verdict
from clean_transformer.support.devices import IMPORTED, import_packages
from clean_transformer.support.numerics import upcast
from clean_transformer.weights.synthetic import plain

Tokens = Int[Tensor, "batch pos"]
Logits = Float[Tensor, "... _d_vocab"]


def causality(model: DemoTransformer, tokens: Tokens, logits: Logits) -> tuple[Logits, Logits]:
    """Invariant: changing a token does not change the logits of earlier positions.

    The model runs twice. In the first run, the last token is changed. In the second run, the last
    token and the middle token are changed. Each run is compared with the argument `logits`, at the
    positions before the first changed token.
    """
    last, middle = tokens.clone(), tokens.shape[1] // 2
    last[:, -1] = (last[:, -1] + 1) % model.cfg.d_vocab
    both = last.clone()
    both[:, middle] = (both[:, middle] + 1) % model.cfg.d_vocab
    return (
        torch.cat([logits[:, :-1], logits[:, :middle]], dim=1),
        torch.cat([model(last)[:, :-1], model(both)[:, :middle]], dim=1),
    )


def prefix_consistency(
    model: DemoTransformer, tokens: Tokens, logits: Logits
) -> tuple[Logits, Logits]:
    """Invariant: leaving out the last of n_ctx tokens does not change the other logits.

    The token ids are spread over the vocabulary, and on the device of `tokens`. Only the
    embeddings, the last block, the last LayerNorm and the unembedding run.
    """
    full = spread_ids(model.cfg, 1, model.cfg.n_ctx).to(tokens.device)

    # The other blocks would call the same kernels with the same shapes, and would take minutes in a
    # dtype without fast kernels.
    def one_block(tokens: Tokens) -> Logits:
        residual = model.blocks[-1](model.embed(tokens) + model.pos_embed(tokens))
        return model.unembed(model.ln_final(residual))

    return one_block(full)[:, :-1], one_block(full[:, :-1])


def batch_permutation(
    model: DemoTransformer, tokens: Tokens, logits: Logits
) -> tuple[Logits, Logits]:
    """Invariant: reversing the order of the texts in a batch reverses the order of the logits."""
    return logits, model(tokens.flip(0)).flip(0)


def batch_size(model: DemoTransformer, tokens: Tokens, logits: Logits) -> tuple[Logits, Logits]:
    """Invariant: the logits of a text stay the same if the model runs on this text alone."""
    return logits, torch.cat([model(row[None]) for row in tokens])


def cached_decoding(
    model: DemoTransformer, tokens: Tokens, logits: Logits
) -> tuple[Logits, Logits]:
    """Invariant: three calls with a KV cache give the same logits as one call with all tokens.

    The first call reads the first half of the tokens. The second call reads all other tokens except
    the last token, and the third call reads the last token.
    """
    cache = KVCache(len(model.blocks), model.cfg.n_ctx)
    half = tokens.shape[1] // 2
    parts = (tokens[:, :half], tokens[:, half:-1], tokens[:, -1:])
    read = [model(part, kv_cache=cache) for part in parts if part.numel()]
    return torch.cat(read, dim=1), logits


def padded_batch(model: DemoTransformer, tokens: Tokens, logits: Logits) -> tuple[Logits, Logits]:
    """Invariant: a left-padded text has the same logits as the text alone, at all its tokens.

    The last text of the batch is padded by a third of its length, and loses as many of its last
    tokens. The padding has token ids of the text, so a model that sees the padding is found. All
    tokens except the last token are read in one call with a KV cache. Then the order of the texts
    in the cache is reversed, and the last token is read.
    """
    batch, length = tokens.shape
    padding = max(0, length - 1) // 3
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[-1], mask[-1, :padding] = tokens[-1].roll(padding), 0
    cache = KVCache(len(model.blocks), length, mask[:, :-1])
    start = [model(padded[:, :-1], kv_cache=cache)] if length > 1 else []
    cache.select(torch.arange(batch, device=tokens.device).flip(0))
    end = model(padded[:, -1:].flip(0), kv_cache=cache).flip(0)
    read = torch.cat([*start, end], dim=1)
    # Compare texts of unequal length as one text.
    alone = torch.cat([*logits[:-1], logits[-1, : length - padding]])
    return torch.cat([*read[:-1], read[-1, padding:]])[None], alone[None]


def second_call(model: DemoTransformer, tokens: Tokens, logits: Logits) -> tuple[Logits, Logits]:
    """Invariant: two calls with the same tokens give the same logits."""
    return logits, model(tokens)


def fresh_process(model: DemoTransformer, tokens: Tokens, logits: Logits) -> tuple[Logits, Logits]:
    """Invariant: a small model gives the same logits in this process and in a new process.

    In the new process, every operation runs for the first time.
    """
    weight = model.embed.W_E
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "logits.pt")
        code = (
            f"import sys; sys.path = {sys.path!r}; from {__name__} import write_small_logits; "
            f"write_small_logits({str(weight.device)!r}, {str(weight.dtype)!r}, {str(file)!r}, "
            f"{IMPORTED!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
            raise RuntimeError(f"a new process failed: {said[-1]}")
        theirs = torch.load(file, weights_only=True)
    return small_logits(str(weight.device), str(weight.dtype)), theirs


# Each function takes the model, tokens, and the model's logits for these tokens.
INVARIANTS: tuple[Callable[[DemoTransformer, Tokens, Logits], tuple[Logits, Logits]], ...] = (
    causality,
    prefix_consistency,
    batch_permutation,
    batch_size,
    cached_decoding,
    padded_batch,
    second_call,
    fresh_process,
)


@torch.no_grad()
def small_logits(device: str, dtype: str) -> Logits:
    """Return the logits of a small model with seeded weights, which runs on `device` in `dtype`.

    The logits are moved to the CPU.
    """
    cfg = Config(n_layers=2, n_heads=2, d_model=64, d_head=32, d_mlp=256, d_vocab=512, n_ctx=64)
    model = DemoTransformer.from_state_dict(plain(cfg), cfg)
    model.to(device, getattr(torch, dtype.removeprefix("torch.")))
    return model((torch.arange(64, device=device) * 37 % 512)[None]).cpu()


def write_small_logits(device: str, dtype: str, file: str, packages: list[str]) -> None:
    """Import the packages, and save the logits of a small model with seeded weights to `file`."""
    import_packages(packages)
    torch.save(small_logits(device, dtype), file)


@torch.no_grad()
def check_invariants(
    model: DemoTransformer, tokens: Tokens, allowed: float, first: Logits
) -> list[Check]:
    """Check every invariant for the model on its device.

    `first` holds the logits of the model's first call on the device, with the same `tokens`. A new
    call must give the same logits. In all checks, two logits count as the same if their relative
    difference (see `row_difference`) is at most `allowed`. If an invariant raises an exception, its
    `Check` describes the exception.
    """
    again = model(tokens)
    checks = [_judge("first call", first, again, allowed)]
    for invariant in INVARIANTS:
        name = invariant.__name__.replace("_", " ")
        try:
            checks.append(_judge(name, *invariant(model, tokens, again), allowed))
        except Exception as error:
            checks.append(failed_check(name, error))
    return checks


def _judge(name: str, one: Logits, other: Logits, allowed: float) -> Check:
    with trusted():
        measured = row_difference(one.cpu(), other.cpu())
    verdict = Verdict.PASS if measured <= allowed else Verdict.WRONG
    return Check(name, verdict, measured, allowed, "bit-identical" if measured == 0 else "")


def row_difference(one: Logits, other: Logits) -> float:
    """Return the largest relative difference between a row of `one` and the same row of `other`.

    A row holds the logits at one position. The relative difference of two rows is RMS(one − other)
    / RMS(other). The result is infinite if a logit is NaN or infinite.
    """
    worst = 0.0
    for row, wanted in zip(one.flatten(0, 1), other.flatten(0, 1), strict=True):
        difference = (upcast(row) - upcast(wanted)).square().mean().sqrt()
        relative = difference / upcast(wanted).square().mean().sqrt()
        if difference != 0:
            # `max` could ignore NaN, so replace NaN by infinity.
            worst = max(worst, float(relative.nan_to_num(torch.inf, torch.inf)))
    return worst
