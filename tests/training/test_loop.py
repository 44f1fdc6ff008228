"""Training in one process: what a step does, what a run leaves, and how it goes on."""

import math
import os
import random
import warnings
import zipfile
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.inference import NotOptimized
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.swapping.swaps import swap
from clean_transformer.training import WeightsReplaced, checkpoint
from clean_transformer.training.loop import adamw, train, update
from clean_transformer.training.settings import Training
from clean_transformer.training.temporary import recomputed_blocks
from clean_transformer.training.windows import window
from clean_transformer.variants import SlidingWindowAttention

from .. import processes
from ..helpers import (
    TINY,
    assert_equal_states,
    assert_same_function,
    random_model,
    random_tokens,
    tiny,
    unchecked_types,
)
from .runs import CFG, RUN, TOKENS, Stopped, read_metrics, run

# What a step does.


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from([None, 0.0, 0.02, 1.0]))
def test_the_learning_rate_rises_then_falls(steps: int, warmup: int, share: float | None):
    end = {} if share is None else {"final_share": share}
    training = Training(steps=steps, batch=1, warmup=warmup, learning_rate=0.5, **end)
    rates = [training.rate(step) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([0.5 * (n + 1) / warmup for n in range(len(rising))])
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[0] == 0.5
        assert training.rate(steps) == pytest.approx(0.05 if share is None else 0.5 * share)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else_does(tied: bool):
    model = DemoTransformer(tiny(tied_unembed=tied))
    decaying, others = adamw(model, Training(steps=1, batch=1, weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_matrices = {names[id(parameter)] for parameter in decaying["params"]}
    assert of_matrices == {name for name in names.values() if ".W_" in name}
    assert len(of_matrices) + len(others["params"]) == len(names)


def test_a_step_is_adamw_on_the_clipped_gradient():
    model, theirs = random_model(), random_model()
    training = Training(steps=5, batch=3, clip=0.1, warmup=2, learning_rate=0.01, weight_decay=0.0)
    windows = random_tokens(batch=3, length=10)
    loss, norm = update(model, adamw(model, training), windows, training, step=0)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.005, betas=(0.9, 0.95), weight_decay=0)
    logits = theirs(windows[:, :-1])
    # Cross-entropy, written out: the next token's logit against the sum over the vocabulary.
    chosen = logits.gather(-1, windows[:, 1:, None]).squeeze(-1)
    their_loss = (logits.logsumexp(-1) - chosen).mean()
    their_loss.backward()
    gradients = [parameter.grad for parameter in theirs.parameters()]
    their_norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert (loss, norm) == pytest.approx((their_loss.item(), their_norm), rel=1e-12)
    assert norm > 0.1
    for parameter in theirs.parameters():
        parameter.grad *= 0.1 / their_norm
    optimizer.step()
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        # clip_grad_norm_ adds 1e-6 to the norm, which moves an element of 0.1/norm·g by 1e-5 of it.
        if not name.endswith("b_K"):  # its gradient is 0, but for rounding
            torch.testing.assert_close(ours, other, rtol=0, atol=0.005 * 1e-4)


def test_a_batch_in_parts_is_the_same_batch():
    windows = random_tokens(batch=6, length=10)
    measured = []
    for accumulation in (1, 3):
        training = Training(steps=1, batch=6, accumulation=accumulation)
        model, calls = random_model(), []
        model.embed.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
        measured.append(update(model, adamw(model, training), windows, training, 0))
        assert [len(part) for part in calls] == [6 // accumulation] * accumulation
    assert measured[0] == pytest.approx(measured[1], rel=1e-12)


def test_blocks_are_computed_again_to_the_same_bits():
    states, calls = [], []
    for again in (False, True):
        model, training = random_model(), Training(steps=1, batch=2)
        model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(0))
        calls.clear()
        if again:
            with recomputed_blocks(model):
                update(model, adamw(model, training), random_tokens(), training, 0)
            assert "forward" not in vars(model.blocks[0])
        else:
            update(model, adamw(model, training), random_tokens(), training, 0)
        assert len(calls) == 1 + again
        states.append(model.state_dict())
    assert_equal_states(*states)


class Dtypes(TorchDispatchMode):
    """Records the dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.mm.default:
            self.seen |= {args[0].dtype}
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocast_multiplies_in_bfloat16(autocast: bool, dtype: torch.dtype):
    model = random_model(dtype=torch.float32)
    training = Training(steps=1, batch=2, autocast=autocast)
    with Dtypes() as dtypes:
        update(model, adamw(model, training), random_tokens(), training, 0)
    assert dtypes.seen == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# What a run leaves.


def test_it_learns(tmp_path: Path):
    cycle = np.arange(400, dtype=np.uint16) % 7
    training = Training(steps=60, batch=8, learning_rate=0.03, warmup=10, save_every=60)
    model = DemoTransformer(CFG)
    train(model, cycle, tmp_path, training, device="cpu")
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[0] > 3  # log 31 is 3.4
    assert losses[-1] < 0.5
    assert model(torch.tensor([[2, 3, 4, 5]])).argmax(-1).tolist() == [[3, 4, 5, 6]]


def test_the_same_seed_gives_the_same_bits_and_another_others(tmp_path: Path):
    first = run(tmp_path / "1").state_dict()
    assert_equal_states(first, run(tmp_path / "2").state_dict())
    other = run(tmp_path / "3", replace(RUN, seed=1)).state_dict()
    assert not torch.equal(first["embed.W_E"], other["embed.W_E"])


def test_a_line_for_each_step_and_the_held_out_loss(tmp_path: Path):
    training = replace(RUN, held_out_every=3, held_out_batches=2)
    model = run(tmp_path, training)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["learning_rate"] for line in lines] == [training.rate(step) for step in range(5)]
    assert [line["held_out_loss"] is not None for line in lines] == [
        False,
        False,
        True,
        False,
        True,
    ]

    held_out = TOKENS[:100]
    windows = torch.stack([window(held_out, n, CFG.n_ctx, training.seed) for n in range(8)])
    expected = F.cross_entropy(model(windows[:, :-1]).transpose(1, 2), windows[:, 1:])
    assert lines[-1]["held_out_loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_what_is_trained_can_be_saved_and_loaded(tmp_path: Path):
    model = run(tmp_path)
    began = random_model(CFG)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, began.get_parameter(name)) == (name == "unembed.b_U"), name
    model.save_pretrained(tmp_path / "model")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_equal_states(saved["model"], model.state_dict())


def global_state() -> dict[str, Any]:
    """Settings and random states that the whole process shares."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("breaks_off", [False, True])
@pytest.mark.parametrize("cublas", [None, ":16:8"])
def test_everything_but_the_weights_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks_off: bool, cublas: str | None
):
    if cublas is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    else:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", cublas)
    model = random_model(CFG).train()
    model.blocks[0].mlp.eval()
    model.embed.W_E.requires_grad_(False)
    model(torch.tensor([[1, 2]])).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    assert gradients["unembed.b_U"] is not None
    copies = deepcopy(gradients)
    modes = {name: module.training for name, module in model.named_modules()}
    required = {name: each.requires_grad for name, each in model.named_parameters()}
    torch.rand(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = global_state()

    def on_step(measured):
        assert global_state() != before
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        if breaks_off:
            raise Stopped

    # The type checks of the tests use Python's random numbers.
    with unchecked_types(), pytest.raises(Stopped) if breaks_off else nullcontext():
        train(model, TOKENS, tmp_path, RUN, held_out=TOKENS[:100], device="cpu", on_step=on_step)
    after = global_state()
    torch.use_deterministic_algorithms(False)

    assert after == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: each.requires_grad for name, each in model.named_parameters()} == required
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert copies[name] is None or torch.equal(parameter.grad, copies[name])


def test_gradients_from_before_are_not_part_of_the_first_step(tmp_path: Path):
    model = random_model(CFG)
    model(torch.tensor([[1, 2]])).sum().backward()
    train(model, TOKENS, tmp_path / "1", RUN, device="cpu")
    clean = random_model(CFG)
    train(clean, TOKENS, tmp_path / "2", RUN, device="cpu")
    assert_equal_states(model.state_dict(), clean.state_dict())


def test_the_random_state_of_the_device_is_left_as_it_was(tmp_path: Path, device: str):
    model = random_model(CFG, dtype=torch.float32).to(device)
    torch.manual_seed(3)
    torch.rand(2, device=device)
    expected = torch.rand(2, device=device)
    torch.manual_seed(3)
    torch.rand(2, device=device)
    train(model, TOKENS, tmp_path, RUN, device=device)
    assert torch.equal(torch.rand(2, device=device), expected)


def test_recomputing_leaves_an_optimized_model_optimized(tmp_path: Path):
    model = random_model(CFG)
    optimized = model.optimize()
    fast = {name: vars(part).get("forward") for name, part in model.named_modules()}
    assert fast["blocks.0"] is not None
    training = replace(RUN, recompute=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotOptimized)  # training steps need gradients
        train(model, TOKENS, tmp_path / "1", training, device="cpu")
    assert {name: vars(part).get("forward") for name, part in model.named_modules()} == fast
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))  # NotOptimized would be an error
    optimized.undo()
    clean = random_model(CFG)
    train(clean, TOKENS, tmp_path / "2", training, device="cpu")
    assert_equal_states(model.state_dict(), clean.state_dict())
    assert_same_function(logits, clean(torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize("undo_first", [True, False])
def test_a_recomputing_model_can_be_optimized_and_undone_in_any_order(undo_first: bool):
    model, tokens = random_model(CFG), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = model(tokens)
    calls: list[int] = []
    with ExitStack() as recomputing:
        recomputing.enter_context(recomputed_blocks(model))
        optimized = model.optimize()
        with torch.no_grad():
            assert_same_function(model(tokens), logits)
        model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(0))
        with pytest.warns(NotOptimized, match="gradients are on"):
            model(tokens).sum().backward()
        assert len(calls) == 2
        if undo_first:
            optimized.undo()
            model(tokens).sum().backward()
            assert len(calls) == 4
    if not undo_first:
        with pytest.warns(NotOptimized, match="gradients are on"):
            model(tokens).sum().backward()
        assert len(calls) == 3
        optimized.undo()
    assert not {"forward", "_stand_ins"} & vars(model.blocks[0]).keys()


# How it goes on.


def without_speed(folder: Path) -> list[dict]:
    return [line | {"tokens_per_second": None} for line in read_metrics(folder)]


@pytest.mark.filterwarnings("ignore::clean_transformer.training.WeightsReplaced")
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, stop_at: int):
    whole = run(tmp_path / "whole").state_dict()
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop_at=stop_at)
    # Whatever the model held, if there is a checkpoint to take the place of it.
    seed = 9 if (tmp_path / "parts/checkpoint.pt").exists() else 0
    assert_equal_states(run(tmp_path / "parts", seed=seed).state_dict(), whole)
    assert without_speed(tmp_path / "parts") == without_speed(tmp_path / "whole")
    # Once it is finished, there is nothing more to do.
    assert_equal_states(run(tmp_path / "parts", seed=9, stop_at=5).state_dict(), whole)


def test_other_weights_are_not_replaced_in_silence(tmp_path: Path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=3)
    unfinished = "began with other weights than this model has. .* after 2 of 5 steps$"
    with pytest.warns(WeightsReplaced, match=unfinished):
        model = run(tmp_path, seed=9)
    with pytest.warns(WeightsReplaced, match="5 of 5 steps; the run is finished, so nothing"):
        run(tmp_path, seed=9)
    train(model, TOKENS, tmp_path, RUN, held_out=TOKENS[:100], device="cpu")
    run(tmp_path)


class Dropping(MLP):
    """An MLP with dropout: a resumed run has to draw the same random numbers."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class NoPosEmbed(PosEmbed):
    """A module with a parameter that nothing reads."""

    def forward(self, tokens):
        return torch.zeros_like(super().forward(tokens))


def test_swapped_modules_are_trained_and_go_on(tmp_path: Path):
    def varied(folder: Path, stop_at: int | None = None):
        def on_step(measured):
            if measured.step == stop_at:
                raise Stopped

        model = random_model(CFG)
        swap(model, "blocks.*.mlp", Dropping)
        swap(model, "pos_embed", NoPosEmbed)
        train(model, TOKENS, folder, RUN, device="cpu", on_step=on_step)
        return model.state_dict()

    whole = varied(tmp_path / "whole")
    assert not torch.equal(whole["blocks.0.mlp.W_in"], random_model(CFG).blocks[0].mlp.W_in)
    assert not torch.equal(whole["blocks.0.mlp.W_in"], run(tmp_path / "gelu").blocks[0].mlp.W_in)
    with pytest.raises(Stopped):
        varied(tmp_path / "parts", stop_at=3)
    assert_equal_states(varied(tmp_path / "parts"), whole)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp was 'Dropping' and is now 'MLP'"):
        run(tmp_path / "parts")


def killed_run(folder: Path, events: int) -> None:
    processes.kill_after(events)
    run(folder)


def counted_run(folder: Path) -> None:
    with processes.counting() as count:
        run(folder)
    (folder / "events").write_text(str(count()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::clean_transformer.training.WeightsReplaced")
def test_killed_at_20_random_moments_it_goes_on_to_the_same_bits(tmp_path: Path):
    assert processes.run(counted_run, tmp_path / "whole") == 0
    whole = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)
    events = int((tmp_path / "whole/events").read_text())
    # Not the very last, as no two processes make quite as many.
    moments = torch.randint(events * 99 // 100, (20,)).tolist()
    reached = set()
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        assert processes.run(killed_run, folder, moment) == -processes.KILLED
        reached.add(len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0)
        model = run(folder, seed=9 if (folder / "checkpoint.pt").exists() else 0)
        assert_equal_states(model.state_dict(), whole["model"])
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert_equal_states(flat(saved["optimizer"]), flat(whole["optimizer"]))
        assert without_speed(folder) == without_speed(tmp_path / "whole")
        assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
    assert len(reached) > 3  # so that it was killed early and late


def flat(optimizer: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, state in optimizer["state"].items()
        for key, value in state.items()
    }


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"Training\.steps is 0; it must be 1 or more"),
        ({"clip": 0.0}, r"Training\.clip is 0\.0; it must be more than 0"),
        ({"final_share": 1.5}, r"Training\.final_share is 1\.5; it must be from 0 to 1"),
        ({"seed": -1}, r"Training\.seed is -1; it must be 0 or more"),
        ({"accumulation": 3}, r"Training\.batch is 4; it must be a multiple of accumulation"),
    ],
)
def test_impossible_settings_are_refused(changes, message: str):
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS[:10]}, "the tokens are only 10; .* need 11"),
        ({"tokens": TOKENS + 1}, "the tokens have ids from 1 to 31"),
        ({"held_out": TOKENS[:10]}, "the held-out tokens are only 10"),
        ({"training": replace(RUN, sharded=True)}, "sharded .* torchrun"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_and_nothing_is_written(
    tmp_path: Path, arguments, message: str
):
    given = {"tokens": TOKENS, "training": RUN} | arguments
    with pytest.raises(ValueError, match=message):
        train(random_model(CFG), folder=tmp_path / "new", device="cpu", **given)
    assert not (tmp_path / "new").exists()


def test_another_run_in_the_folder_is_refused_by_what_differs(tmp_path: Path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="n_ctx was 10 and is now 8; n_tokens was 500 and is"):
        train(random_model(replace(CFG, n_ctx=8)), TOKENS[:90], tmp_path, RUN, device="cpu")
    with pytest.raises(
        ValueError, match=r"has a different run: learning_rate was 0\.0006 and is now 1\.0"
    ):
        run(tmp_path, replace(RUN, learning_rate=1.0))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.N",
        {},
        [],
        5,
        {"about": 5},
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: object):
    file = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of a training run"):
        run(tmp_path)


@pytest.mark.parametrize("about", [{5: 5}, {"batch": torch.zeros(3)}, {"seed": False}])
def test_a_checkpoint_about_something_else_is_refused(tmp_path: Path, about: dict):
    run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"about": saved["about"] | about}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"has a different run: {next(iter(about))} was"):
        run(tmp_path)


@pytest.mark.parametrize("part", ["model", "exp_avg"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_checkpoint_with_another_content_of_a_record_is_refused(
    tmp_path: Path, part: str, cut: bool
):
    run(tmp_path)
    file = tmp_path / "checkpoint.pt"
    saved = torch.load(file, weights_only=True)
    moments = saved["optimizer"]["state"]["embed.W_E"]
    data = (saved["model"]["embed.W_E"] if part == "model" else moments[part]).numpy().tobytes()
    if cut:
        with zipfile.ZipFile(file) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, content[:8] if content == data else content)
    else:
        raw = bytearray(file.read_bytes())
        raw[raw.index(data) + 7] ^= 64
        file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        run(tmp_path)


def test_it_stops_before_a_gradient_that_is_not_finite_spoils_the_weights(tmp_path: Path):
    def spoil(measured):
        if measured.step == 3:
            with torch.no_grad():
                model.ln_final.w.fill_(torch.inf)

    model = random_model(CFG)
    with pytest.raises(RuntimeError, match="the gradient norm is nan in step 4"):
        train(model, TOKENS, tmp_path, RUN, device="cpu", on_step=spoil)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_an_embedding_that_would_stay_untrained_is_refused(tmp_path: Path):
    model = random_model(TINY)
    swap(model, "embed", type(model.embed))
    with pytest.raises(ValueError, match=r"tied to an embedding that was swapped out"):
        train(model, TOKENS, tmp_path / "new", RUN, device="cpu")
    assert not (tmp_path / "new").exists()


def other(tokens: np.ndarray) -> np.ndarray:
    changed = tokens.copy()
    changed[7] = (changed[7] + 1) % CFG.d_vocab
    return changed


def test_modules_with_other_settings_are_refused(tmp_path: Path):
    def with_window(window: int) -> None:
        model = random_model(CFG)
        swap(model, "blocks.0.attn", lambda old, path: windowed(window).double())
        train(model, TOKENS, tmp_path, RUN, device="cpu")

    windowed = partial(SlidingWindowAttention, CFG)
    torch.manual_seed(0)
    with_window(2)
    with pytest.raises(ValueError, match=r"attn was '.*window=2.*' and is now '.*window=8"):
        with_window(8)


def test_other_held_out_tokens_are_refused(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"run: hash of the held-out tokens was '\w+' and is now"):
        train(random_model(CFG), TOKENS, tmp_path, RUN, held_out=TOKENS[:99], device="cpu")


@pytest.mark.parametrize(("lines", "has"), [(None, 0), (3, 3)])
def test_a_checkpoint_without_its_metrics_is_refused(tmp_path: Path, lines: int | None, has: int):
    run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    written = metrics.read_text().splitlines(keepends=True)
    metrics.unlink()
    if lines is not None:
        metrics.write_text("".join(written[:lines]))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl has {has} of the checkpoint's 5 steps"):
        run(tmp_path)


def test_other_tokens_of_the_same_length_are_refused(tmp_path: Path):
    train(random_model(CFG), TOKENS, tmp_path, RUN, device="cpu")
    train(random_model(CFG), TOKENS.astype(np.int64), tmp_path, RUN, device="cpu")
    with pytest.raises(ValueError, match=r"different run: hash of the tokens was '\w+' and is now"):
        train(random_model(CFG), other(TOKENS), tmp_path, RUN, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(step=6), "step 6, and the run has 5"),
        (lambda saved: saved.update(step="5"), "step '5'"),
        (lambda saved: saved.update(step=torch.rand(9, 9)), "step tensor"),
        (lambda saved: saved.pop("step"), "KeyError: 'step'"),
        (lambda saved: saved.pop("optimizer"), "KeyError: 'optimizer'"),
        (lambda saved: saved.update(optimizer=3), "TypeError"),
        (lambda saved: saved.update(optimizer=torch.rand(2, 2)), "IndexError"),
        (lambda saved: saved["model"].pop("embed.W_E"), "embed.W_E is in only one of"),
        (lambda saved: saved["model"].update(x=torch.zeros(1)), "x is in only one of"),
        (lambda saved: saved["model"].update({"\x1b": torch.zeros(1)}), r"\\x1b is in only one of"),
        (lambda saved: saved["model"].update({"embed.W_E": 5}), "AttributeError"),
        (
            lambda saved: saved["model"].update({"embed.W_E": saved["model"]["embed.W_E"].half()}),
            r"embed.W_E is torch.float16 \[31, 12\], not torch.float64",
        ),
        (
            lambda saved: saved["optimizer"]["state"]["embed.W_E"].update(exp_avg=torch.zeros(2)),
            r"exp_avg of embed.W_E is torch.float32 \[2\]",
        ),
    ],
)
def test_a_changed_checkpoint_is_refused(change, message: str, tmp_path: Path):
    run(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"is damaged: .*{message}") as refused:
        run(tmp_path)
    assert len(str(refused.value)) < 1000


def test_a_folder_of_other_files_is_refused(tmp_path: Path):
    (tmp_path / "novel.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not the folder of a training run: it has 'novel"):
        run(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"novel.txt' is a file"):
        run(tmp_path / "novel.txt")
    assert [*tmp_path.iterdir()] == [tmp_path / "novel.txt"]


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path):
    with (
        checkpoint.claimed(tmp_path),
        pytest.raises(BlockingIOError, match="another process is writing to"),
    ):
        run(tmp_path)
    run(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1.5},
        {"steps": True},
        {"batch": "4"},
        {"seed": 2**70},
        {"learning_rate": float("inf")},
        {"learning_rate": "fast"},
        {"weight_decay": float("inf")},
        {"clip": float("nan")},
        {"autocast": 1},
    ],
)
def test_a_setting_of_another_kind_is_refused_at_once(changes):
    with unchecked_types(), pytest.raises(ValueError, match=f"Training.{min(changes)} is "):
        Training(**{"steps": 4, "batch": 4} | changes)


def test_no_clipping_is_a_setting():
    assert Training(steps=4, batch=4, clip=float("inf"), learning_rate=1.0).clip == math.inf
