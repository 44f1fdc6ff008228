"""What a swap changes is told exactly, for each activation, and the model is left as it was."""

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clean_transformer import MLP, Attention, DemoTransformer, HookPoint
from clean_transformer.swapping.effect_report import Change, Effect, render, said
from clean_transformer.swapping.effects import effect
from clean_transformer.swapping.swaps import Swap, swap

from ..helpers import configs, random_model, random_tokens, tiny, unchecked_types

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Here they are what is tested.
    pytest.mark.filterwarnings("ignore::clean_transformer.swapping.swaps.HookPointsLost"),
]

EVERYWHERE = [
    *("embed", "pos_embed", "blocks.1", "blocks.*.ln1", "blocks.*.attn", "blocks.0.ln2"),
    *("blocks.[0-1].mlp", "ln_final", "unembed"),
]


class Louder(MLP):
    """An MLP whose inner activations are as they were, and whose output is not."""

    def forward(self, normalized_resid_mid: Tensor) -> Tensor:
        return 1.5 * super().forward(normalized_resid_mid)


class Halved(nn.Module):
    """A module without a hook point."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class InPlace(nn.Module):
    """A module that spoils its own input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).clone()


def effect_of(model: DemoTransformer, pattern: str, make, tokens: Tensor) -> Effect:
    with swap(model, pattern, make) as swapped:
        return effect(model, swapped, tokens)


def rows_of(report: Effect) -> dict[str, Change]:
    rows = {row.name: row for row in report.rows}
    assert len(rows) == len(report.rows)
    return rows


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


# --- exactness ---


@pytest.mark.parametrize("pattern", EVERYWHERE)
def test_the_same_module_changes_nothing_at_all(pattern: str) -> None:
    model = random_model()
    report = effect_of(model, pattern, lambda old, path: deepcopy(old), random_tokens())
    for row in report.rows:
        assert (row.total, row.introduced, row.inherited, row.note) == (0, 0, 0, ""), row
        assert row.scale or row.name == "hook_attn_scores"
    assert report.first_change is None
    assert report.most_introduced == []
    felt = report.impact
    assert (felt.top1_flips, felt.kl_divergence, felt.loss_change) == (0, 0, 0)
    assert any(row.module for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_exact_in_every_dtype(dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    report = effect_of(model, "blocks.*.attn", lambda old, path: deepcopy(old), random_tokens())
    assert not [row for row in report.rows if row.total]
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_on_every_device(device: str, dtype: torch.dtype) -> None:
    model, tokens = random_model(dtype=dtype).to(device), random_tokens().to(device)
    report = effect_of(model, "blocks.1.mlp", Louder, tokens)
    assert torch.device(report.device).type == device
    assert rows_of(report)["blocks.1.hook_mlp_out"].introduced == pytest.approx(0.5, rel=1e-6)


def test_rows_are_every_activation_in_the_order_of_the_forward_pass() -> None:
    model = random_model()
    _, cache = model.run_with_cache(random_tokens())
    report = effect_of(model, "blocks.1.mlp", Louder, random_tokens())
    names = [row.name for row in report.rows]
    assert [name for name in names if name in cache] == [*cache]
    norms = [f"blocks.{layer}.{norm}" for layer in (0, 1) for norm in ("ln1", "ln2")]
    assert {*names} - {*cache} == {*norms, "ln_final", "logits"}
    assert names[-1] == "logits"
    assert names.index("blocks.0.ln1") == names.index("blocks.0.ln1.hook_normalized") + 1


def test_block_1_is_not_block_10() -> None:
    model = random_model(tiny(n_layers=11, d_vocab=3, n_ctx=2))
    report = effect_of(
        model, "blocks.1", lambda old, path: Scaled(old), random_tokens(model.cfg, 1, 2)
    )
    made = {row.name for row in report.rows if row.module and row.total is not None}
    assert made == {"blocks.1.hook_resid_post"}
    assert not [row for row in report.rows if row.module and not row.name.startswith("blocks.1.")]


@settings(max_examples=6)
@given(data=st.data(), cfg=configs(n_layers=2, d_vocab=5))
def test_a_change_in_one_layer_begins_there(data: st.DataObject, cfg) -> None:
    layer = data.draw(st.integers(0, 1))
    word, output = data.draw(st.sampled_from([("attn", "attn_out"), ("mlp", "mlp_out")]))
    path, model = f"blocks.{layer}.{word}", random_model(cfg)
    tokens = random_tokens(cfg, 2, cfg.n_ctx)
    rows = effect_of(model, path, lambda old, path: Scaled(old), tokens).rows
    begin = next(at for at, row in enumerate(rows) if row.name == f"blocks.{layer}.hook_{output}")
    assert not any(row.total for row in rows[:begin] if not row.note)
    assert rows[begin].module == path
    assert rows[begin].total == rows[begin].introduced == pytest.approx(0.5)
    assert rows[begin].inherited == 0
    for row in rows[begin + 1 :]:
        if not row.note:
            assert (row.module, row.introduced) == ("", 0)
            assert row.inherited == row.total


class Scaled(nn.Module):
    """Another module, times 1.5."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)


def test_what_is_introduced_and_inherited_by_hand() -> None:
    model, tokens = random_model(tiny(n_layers=3)), random_tokens()
    names = ["blocks.2.hook_mlp_out", "blocks.2.ln2", "blocks.2.mlp.hook_post"]
    _, original = model.run_with_cache(tokens, names_filter=names)
    old = model.blocks[2].mlp
    with swap(model, "blocks.[1-2].mlp", Louder) as swapped:
        _, now = model.run_with_cache(tokens, names_filter=names)
        report = effect(model, swapped, tokens)
    isolated, isolated_cache = old.run_with_cache(now["blocks.2.ln2"])
    isolated = {names[0]: isolated, names[2]: isolated_cache["hook_post"]}
    rows = rows_of(report)
    for name in (names[0], names[2]):
        row, scale = rows[name], rms(original[name])
        assert row.module == "blocks.2.mlp"
        assert row.scale == pytest.approx(scale)
        differences = {
            "total": now[name] - original[name],
            "introduced": now[name] - isolated[name],
            "inherited": isolated[name] - original[name],
        }
        for which, difference in differences.items():
            assert getattr(row, which) == pytest.approx(rms(difference) / scale, abs=1e-14)
        # They telescope: as differences, what is introduced and inherited add up to the total.
        both = (differences["introduced"] * differences["inherited"]).mean().item() / scale**2
        assert row.total**2 == pytest.approx(row.introduced**2 + row.inherited**2 + 2 * both)
    assert rows[names[0]].introduced > 0.1 < rows[names[0]].inherited
    assert rows[names[2]].introduced < 1e-14 < rows[names[2]].inherited
    # What the first of the two changed is all that the second received.
    assert rows["blocks.1.hook_mlp_out"].inherited == 0
    assert rows["blocks.2.ln2"].introduced == 0 < rows["blocks.2.ln2"].inherited


@settings(max_examples=6)
@given(cfg=configs(n_layers=2, d_vocab=5), pattern=st.sampled_from(EVERYWHERE[2:]))
def test_the_whole_is_no_more_than_its_parts(cfg, pattern: str) -> None:
    model, other = random_model(cfg), random_model(cfg, seed=1)
    report = effect_of(model, pattern, other, random_tokens(cfg, 2, cfg.n_ctx))
    for row in report.rows:
        if row.total is None:
            continue
        parts, slack = (row.introduced, row.inherited), 1e-12 * (1 + row.total)
        assert abs(parts[0] - parts[1]) - slack <= row.total <= sum(parts) + slack, row
        assert row.module or row.introduced == 0


def test_masked_scores_that_agree_are_no_change() -> None:
    model, tokens = random_model(), random_tokens()
    _, original = model.run_with_cache(tokens)

    def louder_queries(old: nn.Module, path: str) -> nn.Module:
        new = deepcopy(old)
        new.W_Q.mul_(2)
        new.b_Q.mul_(2)
        return new

    with torch.no_grad():
        report = effect_of(model, "blocks.0.attn", louder_queries, tokens)
    scores = original["blocks.0.attn.hook_attn_scores"]
    row = rows_of(report)["blocks.0.attn.hook_attn_scores"]
    assert row.scale == pytest.approx(rms(scores.masked_fill(scores.isinf(), 0)))
    assert row.total == row.introduced == pytest.approx(1)


def test_an_activation_of_zeros_has_no_size_to_compare_with() -> None:
    model = random_model()
    nn.init.zeros_(model.pos_embed.W_pos)
    report = effect_of(model, "pos_embed", random_model(seed=1), random_tokens())
    row = rows_of(report)["hook_pos_embed"]
    assert (row.scale, row.total, row.introduced, row.inherited) == (0, math.inf, math.inf, 0)


# --- the predictions ---


def test_the_impact_by_hand() -> None:
    model, tokens = random_model(), random_tokens()
    with torch.no_grad():
        original = model(tokens)
        with swap(model, "unembed", random_model(seed=3)) as swapped:
            now = model(tokens)
            felt = effect(model, swapped, tokens).impact
    p, q = original.softmax(-1).tolist(), now.softmax(-1).tolist()
    kls, losses, flips = [], [], 0
    for row, ids in enumerate(tokens.tolist()):
        for at in range(len(ids)):
            before, after = p[row][at], q[row][at]
            kls.append(sum(a * math.log(a / b) for a, b in zip(before, after, strict=True)))
            flips += before.index(max(before)) != after.index(max(after))
            if at + 1 < len(ids):
                losses.append(math.log(before[ids[at + 1]]) - math.log(after[ids[at + 1]]))
    assert felt.positions == tokens.numel()
    assert felt.top1_flips == flips > 0
    assert felt.kl_divergence == pytest.approx(sum(kls) / len(kls), rel=1e-9)
    assert felt.loss_change == pytest.approx(sum(losses) / len(losses), rel=1e-9)


# --- what only one of the two makes ---


class Watched(Halved):
    """A module with a hook point of its own, and none of the old one's."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_mine = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_mine(super().forward(x))


def test_lost_and_new_hook_points_are_rows() -> None:
    report = effect_of(random_model(), "blocks.1.attn", Watched(), random_tokens())
    rows, unlike = rows_of(report), {row.name for row in report.rows if row.note}
    lost = ("q", "k", "v", "attn_scores", "pattern", "z", "result")
    assert unlike >= {f"blocks.1.attn.hook_{point}" for point in (*lost, "mine")}
    for name in unlike:
        row = rows[name]
        assert (row.scale, row.total, row.introduced, row.inherited) == (None,) * 4
        only = "swapped" if name.endswith("mine") else "original"
        assert row.note == f"only the {only} model makes it"
    names = [*rows]
    assert names.index("blocks.1.attn.hook_mine") == names.index("blocks.1.ln1") + 1
    assert rows["blocks.1.hook_attn_out"].introduced > 0


class Plain(MLP):
    """An MLP that inherits hook points, and does not call them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_in + self.b_in) @ self.W_out + self.b_out


def test_hook_points_that_do_not_run_are_rows() -> None:
    model = random_model()
    swap(model, "blocks.0.mlp", Plain)  # an earlier swap that stays
    rows = rows_of(effect_of(model, "blocks.1.mlp", Plain, random_tokens()))
    for point in ("hook_pre", "hook_post"):
        assert rows[f"blocks.1.mlp.{point}"].note == "only the original model makes it"
        assert f"blocks.0.mlp.{point}" not in rows
    assert rows["blocks.1.hook_mlp_out"].introduced > 0


def test_another_shape_is_no_number() -> None:
    model = random_model()

    def with_more_heads(old: nn.Module, path: str) -> nn.Module:
        return Attention(tiny(n_heads=6, d_head=2)).double()

    report = effect_of(model, "blocks.0.attn", with_more_heads, random_tokens())
    row = rows_of(report)["blocks.0.attn.hook_q"]
    assert row.total is None
    assert row.note == "shape [2, 7, 6, 2] instead of [2, 7, 3, 4]"


def test_the_output_of_a_block_without_hook_points() -> None:
    model, tokens = random_model(tiny(n_layers=3)), random_tokens()
    _, original = model.run_with_cache(tokens)
    rows = rows_of(effect_of(model, "blocks.1", lambda old, path: Halved(), tokens))
    row = rows["blocks.1.hook_resid_post"]
    before, after = original["blocks.1.hook_resid_post"], original["blocks.1.hook_resid_pre"] / 2
    assert row.total == row.introduced == pytest.approx(rms(after - before) / rms(before))
    assert (row.inherited, row.module) == (0, "blocks.1")
    assert row.note == "read from the module's output: the new one has no such hook point"
    assert rows["blocks.1.ln1"].note == "only the original model makes it"
    assert rows["blocks.2.hook_resid_pre"].total == row.total


def test_modules_of_another_library_are_called_by_their_own_names() -> None:
    model = random_model()
    theirs = nn.Embedding(model.cfg.n_ctx, model.cfg.d_model, dtype=torch.float64)
    report = effect_of(model, "pos_embed", theirs, random_tokens())
    [swapped] = report.swapped
    assert (swapped.path, swapped.old, swapped.new) == ("pos_embed", "PosEmbed", "Embedding")
    assert rows_of(report)["hook_pos_embed"].introduced > 0


# --- the model is left as it was ---


def n_hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_the_old_module_gets_the_inputs_that_the_new_one_spoils() -> None:
    model, tokens = random_model(), random_tokens()
    _, cache = model.run_with_cache(tokens, names_filter="blocks.1.ln2")
    rows = rows_of(effect_of(model, "blocks.1.mlp", InPlace(), tokens))
    out, ln2 = model.blocks[1].mlp(cache["blocks.1.ln2"]), cache["blocks.1.ln2"]
    row = rows["blocks.1.hook_mlp_out"]
    assert row.introduced == pytest.approx(rms(ln2 / 2 - out) / rms(out))
    assert row.inherited == 0


def test_the_swap_is_still_in_place_and_nothing_is_hooked() -> None:
    model, tokens = random_model(), random_tokens()
    old, new = model.blocks[1].mlp, Louder(model.cfg).double()
    with swap(model, "blocks.1.mlp", new) as swapped:
        effect(model, swapped, tokens)
        assert model.blocks[1].mlp is new
        assert n_hooks(model) == n_hooks(old) == 0
    assert model.blocks[1].mlp is old
    assert [*model.blocks[1]._modules].index("mlp") == 3


@pytest.mark.parametrize("fails_in", ["the swapped model", "the original", "the old module"])
def test_it_is_so_after_an_error_too(fails_in: str) -> None:
    model, calls = random_model(), []
    old, new = model.blocks[1].mlp, Louder(model.cfg).double()
    after = {"the swapped model": 1, "the original": 2, "the old module": 3}[fails_in]

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == after:
            raise KeyError("stop")

    handle = model.ln_final.register_forward_hook(fail)
    with swap(model, "blocks.1.mlp", new) as swapped:
        with pytest.raises(KeyError, match="stop"):
            effect(model, swapped, random_tokens())
        assert model.blocks[1].mlp is new
        handle.remove()
        assert n_hooks(model) == n_hooks(old) == 0
    assert model.blocks[1].mlp is old


def test_a_restored_swap_and_another_model_are_refused() -> None:
    model, other = random_model(), random_model(seed=1)
    with swap(model, "blocks.0.mlp", Louder) as swapped:
        with pytest.raises(ValueError, match=r"swap of blocks\.0\.mlp is not in place in this"):
            effect(other, swapped, random_tokens())
        with unchecked_types(), pytest.raises(TypeError, match="for a DemoTransformer, not MLP"):
            effect(MLP(model.cfg), swapped, random_tokens())
    with pytest.raises(ValueError, match="call effect with the model that was swapped, before"):
        effect(model, swapped, random_tokens())


def test_tokens_that_gpt2_cannot_read_are_refused() -> None:
    model = random_model()
    with swap(model, "blocks.0.mlp", Louder) as swapped:
        with pytest.raises(ValueError, match="this vocabulary has ids 0 to 30"):
            effect(model, swapped, random_tokens() + 31)
        assert swapped.is_in(model)


def test_only_the_given_swap_is_undone() -> None:
    model, tokens = random_model(), random_tokens()
    with swap(model, "blocks.0.mlp", Louder), swap(model, "blocks.1.mlp", Louder) as second:
        rows = rows_of(effect(model, second, tokens))
    assert rows["blocks.0.hook_mlp_out"].total == 0 < rows["blocks.1.hook_mlp_out"].total


# --- undoing a swap for a while ---


def in_places(model: DemoTransformer, swapped: Swap) -> list[nn.Module]:
    return [model.get_submodule(path) for path in swapped.paths]


@pytest.mark.parametrize("leave", [lambda: None, lambda: 1 / 0], ids=["well", "with an error"])
def test_undone_brings_the_very_same_modules_back(leave: Callable[[], object]) -> None:
    model = random_model()
    old = [block.attn for block in model.blocks]
    with swap(model, "blocks.*.attn", Attention) as swapped:
        new = in_places(model, swapped)
        try:
            with swapped.undone():
                assert in_places(model, swapped) == old
                leave()
        except ZeroDivisionError:
            pass
        assert in_places(model, swapped) == new != old
    assert in_places(model, swapped) == old


def test_undone_below_a_later_swap_is_refused() -> None:
    model = random_model()
    with swap(model, "blocks.0.mlp", Louder) as first, swap(model, "blocks.0.mlp", MLP) as second:
        before = in_places(model, second)
        with pytest.raises(RuntimeError, match="'mlp' of TransformerBlock was swapped again"):
            effect(model, first, random_tokens())
        assert in_places(model, second) == before


def test_a_single_token_has_no_loss() -> None:
    report = effect_of(random_model(), "unembed", random_model(seed=1), random_tokens()[:, :1])
    assert report.impact.loss_change is None
    assert said(report)[0].endswith(" nats, no loss, because a single token has none")
    assert "<dd>a single token has none</dd>" in render(report)
