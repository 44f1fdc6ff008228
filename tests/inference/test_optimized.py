import copy
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from clean_transformer import DemoTransformer, HookPoint
from clean_transformer.config import Config
from clean_transformer.inference import NotOptimized, SlowDtype, fast_modules, matmuls, optimize
from clean_transformer.inference.int8 import Int8
from clean_transformer.inference.matmuls import Matmul, OneDNNGelu, ThroughFloat32, has_instructions
from clean_transformer.parity import invariants
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.suite import check_device
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants.mlp import ReluMLP
from clean_transformer.weights.synthetic import stress

from ..helpers import (
    TINY,
    assert_same_function,
    configs,
    random_model,
    random_tokens,
    tiny,
    unchecked_types,
)

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def use(monkeypatch: pytest.MonkeyPatch, kernel: Matmul) -> None:
    monkeypatch.setattr(fast_modules, "kernel_for", lambda *_: kernel)


class ColumnMajor(Matmul):
    column_major = True


@pytest.fixture
def model() -> Iterator[DemoTransformer]:
    with torch.no_grad():
        yield random_model()


@pytest.mark.parametrize("kernel", [Matmul(), ColumnMajor()])
@given(cfg=configs(tied_unembed=True) | configs(normalization_type="LNPre", tied_unembed=False))
@torch.no_grad()
def test_both_memory_orders_compute_the_same(kernel: Matmul, cfg: Config):
    model = random_model(cfg, dtype=torch.float64)
    tokens = torch.arange(2 * cfg.n_ctx).view(2, -1) % cfg.d_vocab
    before, logits = copy.deepcopy(model.state_dict()), model(tokens)

    with pytest.MonkeyPatch.context() as patch:
        use(patch, kernel)
        optimized = model.optimize()

    assert optimized.modules == (*(f"blocks.{n}" for n in range(cfg.n_layers)), "unembed")
    assert_same_function(model(tokens), logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [OneDNNGelu(), ThroughFloat32()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_for_half_precision_pass_the_parity_suite(
    monkeypatch, kernel: Matmul, dtype: torch.dtype
):
    if isinstance(kernel, OneDNNGelu) and not has_instructions(dtype):
        pytest.skip("the kernel needs the processor's instructions")
    use(monkeypatch, kernel)
    monkeypatch.setattr(invariants, "INVARIANTS", ())
    cfg = tiny(n_ctx=33)

    run = check_device(Weights("", cfg, stress(cfg)), "cpu", dtype, mode="optimized")

    assert run.verdict.value == "PASS", run


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(
            pytest.param(dtype, marks=pytest.mark.slow)
            for dtype in (torch.float64, torch.bfloat16, torch.float16)
        ),
    ],
)
def test_the_parity_suite_passes(monkeypatch, dtype: torch.dtype):
    monkeypatch.setattr(invariants, "INVARIANTS", ())
    cfg = tiny(n_ctx=33)

    run = check_device(Weights("", cfg, stress(cfg)), "cpu", dtype, mode="optimized")

    assert run.verdict.value == "PASS", run
    names = {row.name for row in run.isolated}
    assert names == {"blocks.0", "blocks.1", "ln_final"}


@pytest.mark.slow
def test_with_weights_that_8_bits_hold_exactly_the_parity_suite_passes(monkeypatch):
    """Rounding weights that are rounded changes nothing, so the bounds of float32 apply."""
    monkeypatch.setattr(invariants, "INVARIANTS", ())
    in_float32 = DemoTransformer.optimize
    monkeypatch.setattr(DemoTransformer, "optimize", lambda self: in_float32(self, "int8"))
    cfg = tiny(n_ctx=33)
    state = {name: rounded(name, W) for name, W in stress(cfg).items()}

    run = check_device(Weights("", cfg, state), "cpu", torch.float32, mode="optimized")

    assert run.verdict.value == "PASS", run


def rounded(name: str, W: torch.Tensor) -> torch.Tensor:
    """W as an 8-bit copy holds it, if it is the weight of a product."""
    leaf = name.rpartition(".")[2]
    if leaf == "W_pos" or not leaf.startswith("W_"):
        return W
    if leaf == "W_E":
        return rounded("W_U", W.T.contiguous()).T.contiguous()
    if leaf in ("W_Q", "W_K", "W_V"):
        return torch.stack([rounded("W_U", head) for head in W])
    flat = W.flatten(end_dim=-2)
    copied = Int8().prepare(flat, torch.zeros(flat.shape[1])).floats(len(flat))
    return copied[:, : flat.shape[1]].reshape(W.shape)


@pytest.mark.slow
def test_the_parity_suite_sees_a_wrong_kernel(monkeypatch):
    class Wrong(Matmul):
        def gelu(self, x, weight):
            return nn.functional.gelu(self(x, weight))  # the exact one

    use(monkeypatch, Wrong())
    monkeypatch.setattr(invariants, "INVARIANTS", ())
    cfg = tiny(n_ctx=33)

    run = check_device(Weights("", cfg, stress(cfg)), "cpu", torch.float32, mode="optimized")

    assert run.first_failure is not None
    assert run.first_failure.name == "blocks.0"


def test_half_precision_without_instructions_advises_float32(monkeypatch, model):
    monkeypatch.setattr(matmuls, "has_instructions", lambda _: False)
    with pytest.warns(SlowDtype, match=r"no instructions for torch.bfloat16.*dtype=torch.float32"):
        optimized = model.to(torch.bfloat16).optimize()
    assert repr(optimized) == "Optimized(3 modules; kernels: ThroughFloat32)"


def test_no_stopwatch_chooses_the_kernels(monkeypatch, model):
    def refuse() -> float:
        raise AssertionError("a stopwatch was read")

    for clock in ("perf_counter", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, clock, refuse)
    kernel = type(matmuls.kernel_for(torch.float32, torch.device("cpu"))).__name__
    assert repr(model.to(torch.float32).optimize()) == f"Optimized(3 modules; kernels: {kernel})"


SAME_BITS = """
import hashlib, random, time
clock = time.perf_counter
time.perf_counter = lambda: clock() * random.random()
import torch
from clean_transformer import DemoTransformer
model = DemoTransformer.from_pretrained("demo", device="cpu", dtype=torch.{})
with torch.no_grad():
    print(model.optimize(), [
        hashlib.sha256(model(torch.arange(2 * n).view(2, n)).float().numpy().tobytes()).hexdigest()
        for n in (1, 8, 33)
    ])
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_with_other_stopwatches_give_the_same_bits(dtype: str):
    command = [sys.executable, "-c", SAME_BITS.format(dtype)]
    first, second = (subprocess.check_output(command, text=True) for _ in range(2))
    assert "kernels" in first
    assert first == second


def test_undone_everything_is_as_it_was(model):
    logits = model(TOKENS)

    with model.optimize() as optimized:
        assert "forward" in vars(model.blocks[0])
    optimized.undo()

    assert not any("forward" in vars(part) for part in model.modules())
    assert torch.equal(model(TOKENS), logits)


def test_a_second_call_replaces_the_first(model):
    first = model.optimize()
    second = model.optimize("int8")
    fast = vars(model.blocks[0])["forward"]

    first.undo()

    assert vars(model.blocks[0])["forward"] is fast
    second.undo()
    assert not {"forward", "_stand_ins"} & vars(model.blocks[0]).keys()


def test_what_somebody_else_put_on_a_block_runs_when_it_steps_aside(model):
    logits, own = model(TOKENS), model.blocks[0].forward
    model.blocks[0].forward = lambda *inputs, **cache: 2 * own(*inputs, **cache)
    doubled = model(TOKENS)

    with model.optimize(), torch.enable_grad(), runs_as_written(model, "gradients are on"):
        assert_same_function(model(TOKENS), doubled)

    assert_same_function(model(TOKENS), doubled)
    assert not torch.equal(doubled, logits)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    untied=st.booleans(),
)
@settings(max_examples=20)
@torch.no_grad()
def test_generation_is_the_same(lengths: list[int], untied: bool):
    model = random_model(tiny(tied_unembed=not untied))
    prompts = [[(7 * n + length) % 31 for n in range(length)] for length in lengths]
    new = model.generate(prompts, 5)

    with pytest.MonkeyPatch.context() as patch:
        use(patch, ColumnMajor())
        model.optimize()

    assert model.generate(prompts, 5) == new


# Where it steps aside.


def runs_as_written(model: DemoTransformer, why: str):
    return pytest.warns(NotOptimized, match=why)


def test_what_is_watched_is_what_the_modules_compute(model):
    logits, cache = model.run_with_cache(TOKENS)

    model.optimize()
    with runs_as_written(model, "a submodule has a hook"):
        again, watched = model.run_with_cache(TOKENS)

    assert torch.equal(again, logits)
    assert [*watched] == [*cache]
    assert all(torch.equal(watched[name], cache[name]) for name in cache)


@pytest.mark.parametrize(
    "point", ["blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", "blocks.0.mlp"]
)
def test_a_patch_inside_takes_effect(model, point: str):
    hooks = [(point, lambda activation, hook: activation * 0)]
    patched = model.run_with_hooks(TOKENS, fwd_hooks=hooks)

    model.optimize()
    with runs_as_written(model, "a submodule has a hook"):
        again = model.run_with_hooks(TOKENS, fwd_hooks=hooks)

    assert_same_function(again, patched)


def twice(output):
    return 2 * output


def patched_method(path: str):
    """Return a function that patches a method of one module, and a function that undoes it."""

    def patch(model: DemoTransformer) -> Callable[[], None]:
        owner, _, method = path.rpartition(".")
        module = model.get_submodule(owner)
        own = getattr(module, method)
        setattr(module, method, lambda *given, **more: twice(own(*given, **more)))
        return lambda: delattr(module, method)

    return patch


def two_streams(model: DemoTransformer) -> Callable[[], None]:
    own = model.blocks[0].attn_inputs
    model.blocks[0].attn_inputs = lambda resid_pre: tuple(map(twice, own(resid_pre)))
    return lambda: delattr(model.blocks[0], "attn_inputs")


def global_hook(model: DemoTransformer) -> Callable[[], None]:
    def edit(module: nn.Module, given: object, output: Tensor) -> Tensor | None:
        return twice(output) if module is model.blocks[1].hook_resid_mid else None

    return register_module_forward_hook(edit).remove


PATCHES = {
    path: patched_method(path)
    for path in (
        "blocks.0.mlp.forward",
        "blocks.1.attn.mix",
        "blocks.1.hook_mlp_out.forward",
        "blocks.0.ln2.forward",
        "blocks.0.forward",
        "unembed.forward",
    )
} | {"attn_inputs": two_streams, "global hook": global_hook}


@pytest.mark.filterwarnings("ignore::clean_transformer.inference.NotOptimized")
@pytest.mark.parametrize("optimize_first", [True, False])
@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_a_patched_method_and_a_global_hook_take_effect(model, patch, optimize_first: bool):
    plain = model(TOKENS)
    undo = patch(model)
    patched = model(TOKENS)
    assert not torch.allclose(patched, plain)
    if optimize_first:
        undo()
        model.optimize()
        assert_same_function(model(TOKENS), plain)
        undo = patch(model)
    else:
        model.optimize()
    try:
        assert_same_function(model(TOKENS), patched)
    finally:
        undo()


def test_a_second_call_keeps_a_forward_that_was_patched_in_between(model):
    model.optimize()
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *given, **more: twice(own(*given, **more))
    patched = model(TOKENS)
    with model.optimize() as optimized:
        assert optimized.modules == ("blocks.1", "unembed")
        assert_same_function(model(TOKENS), patched)


def test_the_outputs_of_blocks_are_watched_without_leaving_the_fast_path(model):
    model.optimize()

    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.0", "hook_embed", "ln_final"])

    assert len(cache) == 3


def test_gradients_are_those_of_the_modules():
    model = random_model()
    model(TOKENS).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    model.optimize()
    with runs_as_written(model, "gradients are on"):
        model(TOKENS).sum().backward()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-12, atol=1e-12)


def test_under_autocast_it_runs_as_written():
    model = random_model(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(TOKENS)
        model.optimize()
        with runs_as_written(model, "autocast"):
            assert torch.equal(model(TOKENS), logits)


def every_weight_changed(model: DemoTransformer) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.5)


def replaced_weight(model: DemoTransformer) -> None:
    model.blocks[1].attn.W_K = nn.Parameter(model.blocks[1].attn.W_K * 2)


def replaced_data(model: DemoTransformer) -> None:
    model.blocks[1].attn.W_V.data = model.blocks[1].attn.W_V * 2


def loaded_weights(model: DemoTransformer) -> None:
    model.load_state_dict(random_model(seed=1).state_dict(), assign=True)


def another_embedding(model: DemoTransformer) -> None:
    model.embed.W_E = nn.Parameter(model.embed.W_E * 2)


def another_module(model: DemoTransformer) -> None:
    swap(model, "blocks.1.mlp", ReluMLP)


def another_dtype(model: DemoTransformer) -> None:
    model.float()


CHANGES = [replaced_weight, replaced_data, loaded_weights, another_embedding, another_module]


@pytest.mark.parametrize("change", [*CHANGES, another_dtype])
def test_a_changed_module_is_never_computed_from_what_was_prepared(model, change):
    expected = copy.deepcopy(model)
    change(expected)

    model.optimize()
    change(model)
    with runs_as_written(model, "call optimize"):
        logits = model(TOKENS)

    assert_same_function(logits, expected(TOKENS))
    model.optimize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_function(model(TOKENS), logits)


def test_weights_changed_in_place_are_read_as_they_are(model):
    expected = copy.deepcopy(model)
    every_weight_changed(expected)

    model.optimize()
    every_weight_changed(model)

    assert_same_function(model(TOKENS), expected(TOKENS))


def every_weight_changed_unseen(model: DemoTransformer) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # version counters do not count this change


def one_weight_changed_unseen(model: DemoTransformer) -> None:
    model.blocks[1].mlp.W_out.data[3, 2] += 0.01


def unembedding_changed_unseen(model: DemoTransformer) -> None:
    model.embed.W_E.data.neg_()


@pytest.mark.parametrize("change", [one_weight_changed_unseen, unembedding_changed_unseen])
def test_8_bit_copies_notice_which_module_has_changed(model, change):
    model.optimize("int8")
    change(model)

    with runs_as_written(model, "number of threads have changed"):
        model(TOKENS)


@pytest.mark.parametrize("change", [every_weight_changed, every_weight_changed_unseen])
def test_8_bit_copies_notice_a_change_in_place(model, change):
    expected = copy.deepcopy(model)
    change(expected)

    model.optimize("int8")
    change(model)
    with runs_as_written(model, "call optimize"):
        logits = model(TOKENS)

    assert_same_function(logits, expected(TOKENS))


def test_other_hook_points_than_it_knew_are_seen(model):
    model.optimize()
    seen = []
    point = HookPoint()
    point.register_forward_hook(lambda *_: seen.append(True))
    model.blocks[0].attn.hook_q = point

    with runs_as_written(model, "call optimize"):
        model(TOKENS)

    assert seen


def test_a_copy_computes_from_its_own_weights(model):
    model.optimize()
    copied = copy.deepcopy(model)
    every_weight_changed(copied)
    plain = copy.deepcopy(random_model())
    every_weight_changed(plain)

    with runs_as_written(model, "call optimize"):
        assert_same_function(copied(TOKENS), plain(TOKENS))


def test_modules_of_other_classes_stay_as_they_are(model):
    swap(model, "blocks.0.mlp", ReluMLP)
    logits = model(TOKENS)

    optimized = model.optimize()

    assert optimized.modules == ("blocks.1", "unembed")
    assert_same_function(model(TOKENS), logits)


@pytest.mark.parametrize("weights", ["int4", "bfloat16"])
def test_unknown_weights_are_refused(model, weights: str):
    with unchecked_types(), pytest.raises(ValueError, match=f"weights is '{weights}'; it must be"):
        model.optimize(weights)


def test_8_bits_need_a_processor():
    with torch.device("meta"):
        model = DemoTransformer(TINY)

    with pytest.raises(
        ValueError, match="8-bit weights run on the cpu only, and the model is on meta"
    ):
        model.optimize("int8")


def test_8_bits_need_weights_that_count_their_changes():
    with torch.inference_mode():
        model = random_model()

    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        model.optimize("int8")


COMPILED = """
import copy
import torch
from clean_transformer import Config, DemoTransformer

torch.manual_seed(0)
cfg = Config(n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=32, d_vocab=50, n_ctx=20,
             initializer_range=0.5)
model = DemoTransformer(cfg)
prompts = [[3, 1, 4], [1, 5]]

def continuations():
    return [model.generate(prompts, new, beams=beams) for new in (12, 9) for beams in (1, 2)]

def without_attention():
    silence = model.blocks[0].attn.hook_z.register_forward_hook(lambda *args: 0 * args[-1])
    silent = continuations()
    silence.remove()
    return silent

for weights in (None, "int8"):
    with model.optimize(weights):
        written = [continuations(), without_attention()]
    torch.compiler.reset()  # what was compiled before counts, too
    torch._dynamo.utils.counters.clear()
    with model.optimize(weights, compile=True), torch._dynamo.config.patch(error_on_recompile=True):
        assert [continuations(), without_attention()] == written
        assert continuations() == written[0] != written[1]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        changed = copy.deepcopy(model.blocks[0].mlp)
        changed.b_out.data.normal_(std=9.0)
        model.blocks[0].mlp, mlp = changed, model.blocks[0].mlp
        assert continuations() != written[0]
        model.blocks[0].mlp = mlp
    assert not vars(model).keys() & {"read_one", "cache_class"}
    model.optimize(compile=True)
    model.optimize()
    assert not vars(model).keys() & {"read_one", "cache_class"}

with model.optimize():  # and compiled by somebody else: what is wanted then stays
    tokens = torch.tensor(prompts[:1])
    torch.compile(model, backend="eager")(tokens).sum().backward()
    assert model.embed.W_E.grad.any() and model.blocks[0].mlp.W_in.grad.any()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_step_is_the_same_is_compiled_once_and_steps_aside():
    """In its own process, because torch.compile cannot trace the type checks of the tests."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )


def test_only_our_models_have_a_step_to_compile():
    with pytest.raises(TypeError, match="a Sequential has no decoding step to compile"):
        optimize(nn.Sequential(nn.Linear(1, 1)), compile=True)


def test_optimizing_under_inference_mode_keeps_weights_trainable():
    model = random_model()
    with torch.inference_mode():
        model.optimize().undo()
    model(random_tokens()).sum().backward()
    assert model.blocks[0].attn.W_Q.grad.any()
