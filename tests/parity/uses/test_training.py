"""The training use: gradients of every part, cross entropy and AdamW."""

import pytest
import torch
from torch import Tensor

from clean_transformer.modules import mlp
from clean_transformer.modules.layer_norm import LayerNorm
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.faults.corruptions import with_result
from clean_transformer.parity.faults.gradients import GRADIENT_FAULTS
from clean_transformer.parity.uses import adamw
from clean_transformer.parity.uses.adamw import judge_adamw
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.uses.training import judge_training
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights.processing import process_weights

from ..small import BF16, F16, F32, F64, broken, corrupted, small_model, small_weights

WEIGHTS = small_weights()


def judge_of(dtype: torch.dtype = F32, products: torch.dtype | None = None, **changes) -> Judge:
    weights = small_weights(**changes) if changes else WEIGHTS
    exact = ExactParts(weights.cfg, weights.state, dtype)
    return Judge(small_model(weights, dtype), exact, torch.Generator(), products)


def judged(dtype: torch.dtype = F32, **changes) -> UseResult:
    return judge_training(judge_of(dtype, **changes), locates=True)


def failures(result: UseResult) -> list[str]:
    return [row.name for row in result.rows if row.verdict is not Verdict.PASS]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        *((F32, {}), (BF16, {}), (F16, {}), (F64, {})),
        *((F32, {"n_layers": 1, "n_ctx": 1}), (BF16, {"d_vocab": 53, "n_ctx": 5})),
    ],
    ids=str,
)
def test_a_healthy_backward_pass_passes(dtype: torch.dtype, changes: dict[str, int]):
    result = judged(dtype, **changes)
    assert result.verdict is Verdict.PASS, result.first_failure
    names = {row.name for row in result.rows}
    assert {"cross entropy", "gradient of embed.W_E", "fused AdamW, parameter"} <= names
    assert any(name.endswith(".attn.b_K") for name in names)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_autocast_passes():
    judge = judge_of(F32, BF16)
    with torch.autocast("cpu", BF16):
        result = judge_training(judge, locates=True)
    assert result.verdict is Verdict.PASS, result.first_failure


def test_an_optimized_model_trains_with_its_own_forward():
    judge = judge_of()
    judge.model.optimize()
    assert judge_training(judge, locates=True).verdict is Verdict.PASS


def test_weights_without_a_tie_pass():
    cfg, state = process_weights(WEIGHTS.cfg, WEIGHTS.state)
    weights = type(WEIGHTS)("processed", cfg, state)
    exact = ExactParts(cfg, state, F32)
    result = judge_training(Judge(small_model(weights), exact, torch.Generator()), locates=True)
    assert result.verdict is Verdict.PASS, result.first_failure
    assert "gradient of unembed.W_U" in {row.name for row in result.rows}


@pytest.mark.parametrize("fault", GRADIENT_FAULTS, ids=lambda fault: fault.name)
def test_a_wrong_gradient_kernel_is_found_and_located(fault):
    with fault.plant():
        result = judged()
    assert result.verdict is Verdict.WRONG
    assert result.located is not None
    assert result.located.operation.split(".")[1] in fault.operations


@pytest.mark.parametrize("kernel", ["gelu_backward", "embedding_dense_backward", "logsumexp"])
def test_a_gradient_that_is_two_percent_off_is_found(kernel: str):
    with broken(kernel, with_result(lambda y: y * 1.02)):
        result = judged()
    assert result.verdict is Verdict.WRONG
    assert result.located is not None
    assert result.located.operation.split(".")[1] == kernel


def test_a_gradient_that_is_cut_between_blocks_is_found():
    judge = judge_of()
    with corrupted(judge.model, "blocks.0", Tensor.detach):
        result = judge_training(judge, locates=True)
    assert result.verdict is Verdict.WRONG
    missing, cut, *_ = result.rows
    assert missing.note.startswith("pos_embed.W_pos, blocks.0.")
    assert cut.note == "blocks.1 to blocks.0"


def test_a_gradient_that_is_doubled_between_blocks_is_found():
    def doubled(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (2 * args[0] - args[0].detach(),)

    judge = judge_of()
    judge.model.blocks[1].register_forward_pre_hook(doubled)
    result = judge_training(judge, locates=True)
    assert failures(result)[0] == "gradients lost or changed between parts"


def test_a_wrong_step_of_adamw_is_found_and_located():
    def corrupt(func, args, options):
        func(*args, **options)
        args[0][0].mul_(1.001)

    with broken("_fused_adamw_", corrupt):
        result = judged()
    assert failures(result) == ["fused AdamW, parameter"]
    assert result.located is not None
    assert result.located.operation == "aten._fused_adamw_.default"


@pytest.mark.parametrize(
    ("device", "verdict"), [("meta", Verdict.NOT_CHECKED), ("cpu", Verdict.ERROR)]
)
def test_an_exception_in_adamw_is_no_missing_kernel(
    device: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
):
    """PyTorch says itself that the device "meta" has no fused step. The other error is a fault."""
    if device == "cpu":

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(adamw, "_second_step", fail)
    pairs = [(torch.zeros(2, device=device), torch.ones(2, device=device))]
    results = judge_adamw(Use("training", "training", 1, (1,)), pairs)
    fused = next(rows for rows, _ in results if rows[0].name == "fused AdamW")
    assert [(row.verdict, row.measured) for row in fused] == [(verdict, None)]


@pytest.mark.parametrize("name", ["b_in", "W_out"])
def test_a_parameter_without_a_gradient_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    """Our code cuts the gradient, so the oracle has the same fault."""
    right = MLP.forward

    def cut(self: MLP, x: Tensor) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        with torch.no_grad():
            frozen = parameter.detach()
        self._parameters[name] = frozen
        try:
            return right(self, x)
        finally:
            self._parameters[name] = parameter

    monkeypatch.setattr(mlp.MLP, "forward", cut)
    result = judged()
    assert result.verdict is Verdict.WRONG
    assert f"blocks.0.mlp.{name}" in str(result.rows[0])


def test_a_gradient_path_that_our_code_cuts_is_found(monkeypatch: pytest.MonkeyPatch):
    """As if σ were a constant in the gradient of LayerNorm, in the oracle too."""

    def constant_scale(self: LayerNorm, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + self.cfg.eps).sqrt()
        return centered / scale.detach() * self.w + self.b

    monkeypatch.setattr(LayerNorm, "forward", constant_scale)
    assert any(name.endswith("beside differences") for name in failures(judged()))
