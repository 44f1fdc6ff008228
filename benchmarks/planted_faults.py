"""Plants the faults of `clean_transformer.parity.faults`, for `benchmarks.corpus`."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.parity import inputs
from clean_transformer.parity.activations.black_box import compiled_leaves
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.faults.corruptions import DeviceFault
from clean_transformer.parity.faults.device import DEVICE_FAULTS
from clean_transformer.parity.faults.loader import LOADER_FAULTS
from clean_transformer.parity.faults.modes import MODE_FAULTS, ModeFault
from clean_transformer.parity.faults.seldom import seldom
from clean_transformer.parity.faults.semantic import CACHE_FAULTS
from clean_transformer.parity.faults.semantic.edits import SemanticFault
from clean_transformer.parity.inputs import Weights, choose_weights, suite_tokens
from clean_transformer.parity.invariants import cached_decoding, padded_batch, row_difference
from clean_transformer.parity.locate import Located
from clean_transformer.parity.measurements import (
    Subject,
    end_to_end,
    isolated_errors,
    probe_operations,
    record_run,
)
from clean_transformer.parity.suite import same_function
from clean_transformer.parity.uses.compiled_step import judge_compiled_step
from clean_transformer.parity.uses.every import judge_sampling
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.uses.training import judge_training
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights import synthetic
from clean_transformer.weights.load import read_pretrained

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Sizes and a dtype with which GPT-2 makes calls that the fault affects. The other faults need no
# sizes of their own.
MEETS: dict[str, dict[str, Any]] = {
    "sdpa-many-keys-half": {"dtype": BF16, "n_ctx": 1024},
    "sdpa-bf16-mask": {"dtype": BF16},
    "sdpa-bf16-arm": {"dtype": BF16},
    "sdpa-mask-rocm": {"dtype": F16},
    "sdpa-strided-values-rocm": {"dtype": BF16},
    "half-product-xpu": {"dtype": BF16},
    "half-product-alpha-ignored": {"dtype": F16},
    "sdpa-causal-leak": {"dtype": BF16},
    "matmul-columns-past-1024": {"d_vocab": 33000},
    "matmul-1024-rows": {"n_ctx": 1024},
    "embedding-ids-past-32767": {"d_vocab": 33000},
    "matmul-half-accumulator": {"dtype": BF16, "d_mlp": 2048},
    "layer-norm-half-statistics": {"dtype": F16},
}
# Whether the suite finds a fault, and whether it names the faulty operation or part.
Found = tuple[bool, bool]


def model_of(weights: Weights, dtype: torch.dtype) -> DemoTransformer:
    """Return a model with these weights, converted to `dtype`."""
    state = {name: value.to(dtype) for name, value in weights.state.items()}
    return DemoTransformer.from_state_dict(state, weights.cfg)


def logits_of(d_vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random logits [4 d_vocab] for four positions."""
    return torch.randn(4, d_vocab, generator=torch.Generator().manual_seed(0)).to(dtype)


def small_weights(**changes: int) -> Weights:
    """Return random weights of a small model, in whose architecture `changes` replaces fields."""
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 128, "d_head": 64, "d_mlp": 256}
    cfg = Config(**(sizes | {"d_vocab": 1500, "n_ctx": 104} | changes))  # type: ignore[arg-type]
    return Weights("", cfg, synthetic.stress(cfg))


def judge_of(weights: Weights, dtype: torch.dtype, seed: int = 0) -> Judge:
    """Return a judge of a model with these weights."""
    exact = ExactParts(weights.cfg, weights.state, dtype)
    return Judge(model_of(weights, dtype), exact, torch.Generator().manual_seed(seed))


def find_device_fault(fault: DeviceFault) -> Found:
    """Plant `fault`, run a model that it affects, and return whether it is found and named."""
    changes = dict(MEETS.get(fault.name, {}))
    dtype = changes.pop("dtype", F32)
    weights = small_weights(**changes)
    with torch.no_grad(), fault.plant():
        for located, is_bad in _steps(fault.use, weights, dtype):
            if is_bad:
                name = located.operation.split(".")[1] if located else ""
                return True, name in fault.operations
    return False, False


def _steps(use: str, weights: Weights, dtype: torch.dtype) -> Iterator[tuple[Located | None, bool]]:
    """Check a model in the use `use`. Yield each check's (wrong operation, whether it fails)."""
    if use == "sampling":
        result = judge_sampling(weights.cfg, logits_of(weights.cfg.d_vocab, dtype))
        yield result.located, result.verdict.is_bad
    judge = judge_of(weights, dtype)
    if use in ("forward", "hooks"):
        tokens = suite_tokens(weights.cfg, 2, min(33, weights.cfg.n_ctx))
        subject = Subject(judge.model, judge.exact, tokens, None)
        record = record_run(subject)
        rows, located = isolated_errors(subject, record, Attempts(), lambda step: None)
        yield located, any(row.verdict.is_bad for row in rows)
    if use == "training":
        result = judge_training(judge, locates=True)
        yield result.located, result.verdict.is_bad
    for each in uses(weights.cfg):
        if each.name in (use, "long text" if use == "forward" else use):
            result = judge(each, locates=True)
            yield result.located, result.verdict.is_bad
    checks, located = probe_operations("cpu", dtype)
    yield located, any(check.verdict.is_bad for check in checks)


def find_cache_fault(fault: SemanticFault) -> Found:
    """Plant a mistake in the KV cache or in padding, and check the invariants."""
    weights = small_weights()
    judge, tokens = judge_of(weights, F32), suite_tokens(weights.cfg, 2, 33)
    subject = Subject(judge.model, judge.exact, tokens, None)
    with torch.no_grad():
        record = record_run(subject)
        allowed = end_to_end(subject, record, None)[2]
        with fault.plant():
            broken = [
                row_difference(*invariant(judge.model, tokens, record.logits)) > allowed
                for invariant in (padded_batch, cached_decoding)
            ]
    return any(broken), any(broken)


def find_mode_fault(fault: ModeFault | None, mode: str) -> Found:
    """Plant a fault of an optimized or compiled model. Nothing is really compiled.

    Without a fault, a healthy model runs.
    """
    weights = small_weights(d_model=32, d_head=16, d_mlp=64, d_vocab=101, n_ctx=24)
    judge = judge_of(weights, F32)

    def uncompiled(function: Any, **options: Any) -> Any:
        return function

    results: list[UseResult] = []
    with ExitStack() as entered, torch.no_grad():
        entered.enter_context(patch.object(torch, "compile", uncompiled))
        entered.enter_context(fault.plant() if fault else nullcontext())
        if mode == "optimized-compiled":
            results = [judge_compiled_step(judge.model, judge.exact)]
        else:
            if mode == "optimized":
                judge.model.optimize()
            else:
                entered.enter_context(compiled_leaves(judge.model))
            cache = KVCache if mode == "optimized" else StaticKVCache
            judge = Judge(judge.model, judge.exact, judge.generator, None, cache)
            results = [judge(use, locates=False) for use in uses(weights.cfg)]
    bad = [each.first_failure for each in results if each.verdict.is_bad]
    first = bad[0].name if bad and bad[0] else ""
    return bool(bad), bool(bad) and fault is not None and fnmatch(first, fault.part)


def find_loader_faults() -> Iterator[tuple[str, Found]]:
    """Plant each mistake of a loader, for a model that transformers has written."""
    import transformers

    fields = {"n_layer": 2, "n_head": 3, "n_embd": 12, "vocab_size": 31, "n_positions": 40}
    config = transformers.GPT2Config(**fields, bos_token_id=30, eos_token_id=30)
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        for parameter, edit in LOADER_FAULTS.items():

            def faulty(*args: Any, parameter: str = parameter, edit: Any = edit) -> Any:
                cfg, state = read_pretrained(*args)
                return cfg, state | {parameter: edit(state[parameter])}

            with patch.object(inputs, "read_pretrained", faulty):
                report = same_function(choose_weights(str(Path(folder))), "huggingface")
            wrong = {row.name for row in report.rows if row.verdict is Verdict.WRONG}
            kind, *rest = parameter.split(".")
            part = {"embed": "hook_embed", "pos_embed": "hook_pos_embed", "unembed": "logits"}
            named = part.get(kind) or (f"{kind}.{rest[0]}." if kind == "blocks" else kind)
            yield f"loader: {parameter}", (bool(wrong), any(x.startswith(named) for x in wrong))


def find_all() -> Iterator[tuple[str, str, Found]]:
    """Plant every fault. Yields (use, name of the fault, whether it is found and named)."""
    for fault in DEVICE_FAULTS:
        yield fault.use, fault.name, find_device_fault(fault)
    for mistake in CACHE_FAULTS:
        yield "cache and padding", mistake.name, find_cache_fault(mistake)
    for each in MODE_FAULTS:
        yield each.mode, each.name, find_mode_fault(each, each.mode)
    for name, found in find_loader_faults():
        yield "loader", name, found


def seldom_found(probability: float, runs: int) -> dict[str, float]:
    """Plant a fault that strikes a call of `addmm` with this probability, in `runs` runs.

    A run judges the use `forward`. Returns the number of runs, the calls in one run, the share of
    the runs in which the fault is expected to strike, the number of runs in which it has struck,
    and the number of these in which it was found.
    """
    weights, counts = small_weights(d_vocab=300, n_ctx=24), Counter[str]()
    use, calls = uses(weights.cfg)[0], 0
    for seed in range(runs):
        judge, (fault, condition) = judge_of(weights, F32), seldom(probability, seed)
        with torch.no_grad(), fault.plant():
            result = judge(use, locates=False)
        calls = condition.calls
        counts["struck"] += condition.strikes > 0
        counts["found"] += result.verdict.is_bad
        assert result.verdict.is_bad is (condition.strikes > 0)
    expected = 1 - (1 - probability) ** calls
    return {"runs": runs, "calls": calls, "expected": expected, **counts}


def calls_of_a_run(layers: int = 12) -> int:
    """Return how many calls of `addmm` all uses judge in one model with as many layers as GPT-2."""
    judge = judge_of(small_weights(n_layers=layers, d_vocab=300), F32)
    fault, condition = seldom(0.0, 0)
    with torch.no_grad(), fault.plant():
        for use in uses(judge.model.cfg):
            judge(use, locates=False)
    return condition.calls
