"""Every operation of a training step has a rule, and a wrong kernel of each is found."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.faults.corruptions import with_result
from clean_transformer.parity.operations.bounds import expected_outputs
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.operations.judgment import judge
from clean_transformer.parity.operations.replay import Call64, computed
from clean_transformer.parity.verdict import Verdict
from clean_transformer.training.loss import cross_entropy

from ...helpers import needs_torch, randomized
from ..small import BF16, F16, F32, F64, broken

CFG = Config(n_layers=1, n_heads=4, d_model=64, d_head=16, d_mlp=256, d_vocab=100, n_ctx=64)
TOKENS = torch.arange(80).reshape(2, 40) * 37 % 100


def step(
    dtype: torch.dtype = F32, loss: Callable[..., Tensor] = F.cross_entropy, **options: bool
) -> Callable[[], None]:
    """One training step, which `check_operations` can run."""
    model = randomized(DemoTransformer(CFG), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def run() -> None:
        logits = model(TOKENS)[:, :-1].flatten(0, 1)
        loss(logits, TOKENS[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def assert_healthy(function: Callable[[], None]) -> None:
    report = check_operations(function)
    assert report.finding is None
    assert not report.not_checked
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("loss", [F.cross_entropy, cross_entropy])
def test_a_healthy_step_passes(dtype: torch.dtype, loss: Callable[..., Tensor]) -> None:
    assert_healthy(step(dtype, loss))


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"foreach": False, "amsgrad": True}], ids=str
)
def test_every_form_of_adamw_is_checked(options: dict[str, bool]) -> None:
    assert_healthy(step(**options))


def test_explicit_attention_is_checked() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert_healthy(step())


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_autocast_is_checked() -> None:
    with torch.autocast("cpu", BF16):
        assert_healthy(step())


def scaled(func, args, options):
    """One number of each result is 1% too large, or 0.01 if it was 0."""
    output = func(*args, **options)
    for result in torch.utils._pytree.tree_leaves(computed(func, args, options, output)):
        if isinstance(result, Tensor) and result.is_floating_point():
            flat = result.view(-1) if result.is_contiguous() else result.flatten()
            worst = flat.abs().argmax()
            flat[worst] *= 1.01
            result.copy_(flat.view(result.shape))
    return output


# The kernels, each with the options of AdamW that call it.
KERNELS = {
    "gelu_backward": {},
    "native_layer_norm_backward": {},
    "_scaled_dot_product_flash_attention_for_cpu_backward": {},
    "_log_softmax_backward_data": {},
    "nll_loss_forward": {},
    "nll_loss_backward": {},
    "embedding_dense_backward": {},
    "sum": {},
    "mm": {},
    "_foreach_norm": {},
    "lerp_": {"foreach": False},
    "addcmul_": {"foreach": False},
    "addcdiv_": {"foreach": False},
    "_foreach_lerp_": {"foreach": True},
    "_foreach_addcmul_": {"foreach": True},
    "_foreach_sqrt": {"foreach": True},
    "_fused_adamw_": {"fused": True},
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_kernel_of_a_training_step_is_named(kernel: str) -> None:
    with broken(kernel, scaled):
        report = check_operations(step(**KERNELS[kernel]))
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert report.finding.call.name == kernel


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_gradient_of_gelu_is_checked_at_all_sizes(dtype: torch.dtype, approximate: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), 10.0 ** torch.linspace(-6, 4, 50)]).to(dtype)
    x = torch.cat([x, -x]).requires_grad_()
    g = sample(len(x)).to(dtype)
    report = check_operations(lambda: F.gelu(x, approximate=approximate).backward(g))
    assert report.verdict is Verdict.PASS
    with broken("gelu_backward", with_result(lambda y: torch.where(x > 100, y * 2, y))):
        report = check_operations(lambda: F.gelu(x, approximate=approximate).backward(g))
    assert report.verdict is Verdict.WRONG


@pytest.mark.parametrize("n_heads", [6, 2])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(9, 9).tril().bool(),
        pytest.param(
            torch.ones(9, 9).tril(-2).bool(),
            marks=needs_torch("2.5", "attention of a query without a key is not 0"),
        ),
        sample(9, 9, seed=9),
    ],
)
def test_the_exact_gradients_of_attention_are_those_of_autograd(
    mask: Tensor | None, n_heads: int
) -> None:
    """Heads of queries may share a head of keys and values."""
    q, k, v, g = (
        sample(2, n_heads if seed in (1, 2) else 6, 9, 8, seed=seed).double() for seed in range(4)
    )
    mask = mask.double() if mask is not None and mask.dtype == F32 else mask
    given = [x.requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(6 // n_heads, dim=1) for x in given[1:])
    out = F.scaled_dot_product_attention(given[0], keys, values, attn_mask=mask)
    wanted = torch.autograd.grad(out, given, g)
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    arguments = (g, *(x.detach() for x in (*given, out)), out[..., 0].detach(), 0.0, False)
    expected = expected_outputs(Call64(func, arguments, {"attn_mask": mask}, F32))
    for one, exact in zip(expected or [], wanted, strict=True):
        torch.testing.assert_close(one.exact, exact, rtol=1e-12, atol=1e-12)


def test_a_gradient_of_a_long_sum_in_order_is_healthy() -> None:
    weight, tokens = torch.zeros(3, 8), torch.zeros(1000, dtype=torch.int64)
    func, gradients = torch.ops.aten.embedding_dense_backward.default, 1 + sample(1000, 8) / 8
    call = Call64(func, (gradients, tokens, 3, -1, False), {}, F32)
    in_order = weight.clone()
    for gradient in gradients:
        in_order[0] += gradient
    expected = expected_outputs(call)
    assert expected is not None
    assert judge(expected, in_order).verdict is Verdict.PASS
    in_order[1] += 1e-9
    assert judge(expected, in_order).verdict is Verdict.WRONG
