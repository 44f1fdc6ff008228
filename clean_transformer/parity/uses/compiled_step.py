"""Checks the decoding step that `optimize(compile=True)` compiles: the whole model as one graph.

The graph is a black box: it maps one new token of each text, and the KV cache, to logits, and it
writes the new keys and values into the cache. The exact step is computed in float64 on the CPU from
the same tokens and the same cache.
"""

import torch
from torch import Tensor

from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.limits import COPY, PART
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.judge import UseResult
from clean_transformer.parity.uses.parts import ExactParts, block, on_device
from clean_transformer.parity.uses.rows import by_rows, elementwise
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Verdict

# How many times the exact step runs under random rounding.
DRAWS = 6
# The logits, and the keys and values of all layers, each [batch pos …]: the outputs of a step.
Outputs = tuple[Tensor, Tensor]


def compiled_step(n_ctx: int) -> Use:
    """Return the use: three texts, two of them left-padded, are read, then two single tokens."""
    prompt = min(12, max(1, n_ctx - 2))
    reads = (prompt, *(1 for _ in range(min(2, n_ctx - prompt))))
    padding = (0, prompt // 4, prompt - 1)
    return Use("compiled step", "generating text with a compiled step", 3, reads, padding=padding)


@torch.no_grad()
def judge_compiled_step(model: DemoTransformer, exact: ExactParts) -> UseResult:
    """Run the steps of `optimize(compile=True)` for a copy of `model`, and check each of them.

    The copy shares its weights with the model. A step has one result for the logits, one for the
    new keys and values of all layers, and one for the old keys and values, which must not change.
    If an exception is raised, the last row of the result describes it. There is no search for a
    wrong operation, because the operations of a compiled graph cannot be repeated one by one.
    """
    use = compiled_step(exact.cfg.n_ctx)
    rows: list[Isolated] = []
    try:
        with torch.device("meta"):
            copy = DemoTransformer(exact.cfg)
        copy.load_state_dict(model.state_dict(), assign=True)
        with copy.optimize(compile=True):
            _judge_steps(copy, exact, use, rows)
    except Exception as error:
        return UseResult(use, (*rows, failed_check(use.case, error)))
    bad = next((place for place, row in enumerate(rows) if row.verdict is not Verdict.PASS), None)
    return UseResult(use, (*rows,), None if bad is None else use.reads[0] + bad // 3)


def _judge_steps(model: DemoTransformer, exact: ExactParts, use: Use, rows: list[Isolated]) -> None:
    """Append the results of each step to `rows`."""
    prompt, *steps = (call.to(model.device) for call in use.calls(exact.cfg))
    mask = use.is_token[:, : use.reads[0]].int()
    cache = StaticKVCache(exact.cfg.n_layers, use.length, mask)
    on_device(cache, model.device)
    model(prompt, kv_cache=cache)
    u = UNIT_ROUNDOFF[exact.dtype]
    for number, tokens in enumerate(steps, start=1):
        before = _stored(cache)
        logits = model(tokens, kv_cache=cache)
        after = _stored(cache)
        with trusted():
            old, new = after[:, :-1], after[:, -1:]
            wanted = _step(exact, tokens.cpu(), before.double(), mask)
            draws = tokens.cpu().repeat(DRAWS, 1), before.double().repeat(DRAWS, 1, 1, 1)
            with RandomRounding(exact.dtype):
                moved = _step(exact, *draws, mask.repeat(DRAWS, 1))
            for name, got, right, inexact in zip(
                ("logits", "new keys and values"), (logits.cpu(), new), wanted, moved, strict=True
            ):
                changes = inexact.view(DRAWS, *right.shape) - right
                envelope = changes.square().mean(dim=(0, -1))
                title = f"step {number}, {name}"
                rows.append(by_rows(title, use, got, right, envelope, PART, u)[0])
            name = f"step {number}, old keys and values"
            rows.append(elementwise(name, use, old, before.double(), 0 * old.double(), COPY)[0])


def _stored(cache: KVCache) -> Tensor:
    """Return a copy of all keys and values [batch pos layer 2·head·d_head] on the CPU."""
    layers = [
        torch.cat(
            [tensor[:, : cache.length].flatten(2) for tensor in (layer.keys, layer.values)], -1
        )
        for layer in cache.layers
        if layer.keys is not None and layer.values is not None
    ]
    return torch.stack(layers, dim=2).cpu()


def _step(exact: ExactParts, tokens: Tensor, stored: Tensor, mask: Tensor) -> Outputs:
    """Compute a step in float64 from `tokens` [batch 1] and the keys and values from `_stored`.

    `mask` [batch pos] is the attention mask of the prompt. Returns the logits, and the new keys and
    values [batch 1 layer 2·head·d_head].
    """
    batch, length = stored.shape[:2]
    shape = (batch, length, exact.cfg.n_heads, exact.cfg.d_head)

    def cache(layer: int) -> KVCache:
        filled = KVCache(1, length + 1, mask)
        keys, values = (half.reshape(shape) for half in stored[:, :, layer].chunk(2, dim=-1))
        filled.layers[0].append(keys, values)
        filled.advance(length)
        return filled

    residual = sum(exact.embeddings(tokens, cache(0)), torch.zeros(()))
    new = []
    for layer in range(exact.cfg.n_layers):
        filled = cache(layer)
        residual = block(exact.module(f"blocks.{layer}"), residual, filled)
        filled.advance(1)
        new.append(_stored(filled)[:, -1:])
    return exact.logits(exact.module("ln_final")(residual)), torch.cat(new, dim=2)
