import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer import Config, DemoTransformer
from clean_transformer.hooks import PER_HEAD, HookPoint
from clean_transformer.modules.layer_norm import LayerNormPre
from clean_transformer.parity.faults import DEVICE_FAULTS, SEMANTIC_FAULTS, inject
from clean_transformer.parity.operations.call import Call, Operand
from clean_transformer.parity.operations.known_issues import KNOWN_ISSUES
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.references.choose import REFERENCES

from ...helpers import random_model
from ..small import IN_A_SHORT_TEXT, PROBE_ONLY, no_float64, weight_changed

SEMANTIC = {fault.name: fault for fault in SEMANTIC_FAULTS}
DEVICE = {fault.name: fault for fault in DEVICE_FAULTS}
KNOWN = {fault.name: fault for fault in KNOWN_ISSUES}

# These mistakes cancel out: the logits differ by rounding only.
CANCELS = {"key-bias-missing", "mask-finite"}

# Above the rounding of float64, far below what any mistake makes.
ROUNDING = 1e-12


def three_blocks(dtype: torch.dtype = torch.float64, **changes: int | bool) -> DemoTransformer:
    shape = {"n_layers": 3, "n_heads": 3, "d_model": 12, "d_head": 4, "d_mlp": 20, "d_vocab": 30}
    return random_model(Config(**(shape | {"n_ctx": 16} | changes)), dtype=dtype, b_U=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> DemoTransformer:
    return three_blocks(tied_unembed=request.param)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def activations(model: DemoTransformer, tokens: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The logits with everything watched, and every hook point and LayerNorm output."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, HookPoint | LayerNormPre) and name.split(".")[-1] not in PER_HEAD
    ]
    seen: dict[str, Tensor] = {}
    with ExitStack() as watched:
        for name in names:  # a fault can keep a module from running
            handle = model.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: seen.update({name: output})
            )
            watched.callback(handle.remove)
        return model(tokens), seen


@torch.no_grad()
def unobserved(model: DemoTransformer, tokens: Tensor) -> Tensor:
    return model(tokens)


def differ(ours: Tensor, theirs: Tensor) -> bool:
    scale = theirs[theirs.isfinite()].square().mean().sqrt()
    return bool(((ours != theirs) & ~((ours - theirs).abs() <= ROUNDING * scale)).any())


def first_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    return next(
        (name for name in theirs if name not in ours or differ(ours[name], theirs[name])), None
    )


@pytest.mark.parametrize("fault", SEMANTIC_FAULTS, ids=lambda fault: fault.name)
def test_semantic_fault_is_first_seen_where_its_row_says(
    model: DemoTransformer, tokens: Tensor, fault
) -> None:
    right_logits, right = activations(model, tokens)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    with inject(fault.name):
        wrong_logits, wrong = activations(model, tokens)
        fused_logits = unobserved(model, tokens)
        made_within = three_blocks(tied_unembed=model.cfg.tied_unembed)
        assert torch.equal(unobserved(made_within, tokens), fused_logits)

    first = first_difference(wrong, right)
    assert first is not None
    assert fnmatch(first, fault.first), first
    if fault.first.startswith("blocks.*"):
        assert first.startswith(f"blocks.{model.cfg.n_layers - 1}.")
    assert differ(wrong_logits, right_logits) is (fault.name not in CANCELS)
    assert differ(fused_logits, right_logits) is (fault.name not in CANCELS)
    assert fused_logits.isfinite().all()
    assert torch.allclose(fused_logits, wrong_logits, rtol=0, atol=1e-6), "the paths differ"

    restored_logits, restored = activations(model, tokens)
    assert torch.equal(restored_logits, right_logits)
    assert all(torch.equal(restored[name], right[name]) for name in right)
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("fault", SEMANTIC_FAULTS, ids=lambda fault: fault.name)
def test_semantic_fault_restores_every_attribute(fault) -> None:
    def attributes() -> list[object]:
        return [vars(owner)[attribute] for owner, attribute, _ in fault.changes]

    right = attributes()
    with suppress(KeyboardInterrupt), inject(fault.name):
        wrong = attributes()
        raise KeyboardInterrupt
    assert all(faulty is not original for faulty, original in zip(wrong, right, strict=True))
    assert all(now is original for now, original in zip(attributes(), right, strict=True))


def test_semantic_faults_nest(model: DemoTransformer, tokens: Tensor) -> None:
    right = unobserved(model, tokens)
    with inject("output-bias-missing"):
        one = unobserved(model, tokens)
        with inject("one-head-scaled"):
            both = unobserved(model, tokens)
            assert differ(both, one)
        assert torch.equal(unobserved(model, tokens), one)
    assert torch.equal(unobserved(model, tokens), right)


def test_the_one_missing_block_is_not_the_models(model: DemoTransformer, tokens: Tensor) -> None:
    blocks = model.blocks
    with inject("last-block-missing"), pytest.raises(ValueError, match="token ids run"):
        model(tokens + 1000)
    assert model.blocks is blocks
    assert len(blocks) == 3


@pytest.mark.parametrize("relative", [1e-3, 1e-6, 2**-23])
def test_weight_changed_scales_with_the_change(tokens: Tensor, relative: float) -> None:
    model = three_blocks()
    _, right = activations(model, tokens)
    with weight_changed(relative):
        _, wrong = activations(model, tokens)
    assert first_difference(wrong, right) == "blocks.0.mlp.hook_pre"
    pre = "blocks.0.mlp.hook_pre"
    change = (wrong[pre] - right[pre])[..., 0] / right["blocks.0.ln2"][..., 0]
    weight = model.blocks[0].mlp.W_in[0, 0].detach()
    assert torch.allclose(change, relative * weight, rtol=1e-6, atol=0)


def test_weight_changed_reaches_any_parameter(tokens: Tensor) -> None:
    model = three_blocks()
    _, right = activations(model, tokens)
    with weight_changed(0.01, "blocks.1.attn.W_O", (2, 3, 11)):
        _, wrong = activations(model, tokens)
    assert first_difference(wrong, right) == "blocks.1.hook_attn_out"


def test_last_bit_is_one_unit_of_float32(tokens: Tensor) -> None:
    model = three_blocks(torch.float32)
    with inject("one-weight-last-bit"):
        seen = []
        handle = model.blocks[0].mlp.hook_pre.register_forward_hook(
            lambda *_: seen.append(model.blocks[0].mlp.W_in.detach().clone())
        )
        unobserved(model, tokens)
        handle.remove()
    right = model.blocks[0].mlp.W_in.detach()
    distance = (seen[0].view(torch.int32) - right.view(torch.int32)).abs()
    assert distance[0, 0] == 1
    assert distance.sum() == 1


@dataclass(frozen=True)
class Situation:
    """A small computation that a device fault spoils, and one beside it that it does not touch."""

    touched: Callable[[torch.dtype], Tensor]
    spared: Callable[[], Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attend(n: int, d: int, dtype: torch.dtype, *, permuted: bool = False, **options) -> Tensor:
    q, k, v = normal(3, 1, n, 2, d, dtype=dtype)
    q, k, v = (x.transpose(1, 2) if permuted else x.transpose(1, 2).contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options)


def attend_with_values(values: Tensor) -> Tensor:
    q = normal(*values.shape, dtype=values.dtype)
    return F.scaled_dot_product_attention(q, q, values)


def scaled_row(matrix: Tensor, **options: float) -> Tensor:
    bias, row = normal(1, 4, dtype=matrix.dtype), normal(1, 5, dtype=matrix.dtype)
    return torch.addmm(bias, row, matrix, **({"alpha": 0.5, "beta": 0} | options))


def lower(n: int) -> Tensor:
    return torch.ones(n, n).tril().bool()


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SITUATIONS = {
    "sdpa-short-transposed-query": Situation(
        lambda t: attend(8, 64, t, permuted=True), lambda: attend(9, 64, F32, permuted=True)
    ),
    "sdpa-many-keys-half": Situation(
        lambda t: attend(1024, 4, t, is_causal=True), lambda: attend(1023, 4, BF16, is_causal=True)
    ),
    "sdpa-bf16-mask": Situation(
        lambda t: attend(5, 4, t, attn_mask=lower(5)), lambda: attend(5, 4, F32, attn_mask=lower(5))
    ),
    "sdpa-mask-rocm": Situation(
        lambda t: attend(5, 4, t, attn_mask=lower(5)), lambda: attend(5, 4, F32, attn_mask=lower(5))
    ),
    "sdpa-strided-values-rocm": Situation(
        lambda t: attend_with_values(normal(1, 5, 2, 8, dtype=t).transpose(1, 2)),
        lambda: attend_with_values(normal(1, 2, 5, 8, dtype=BF16)),
    ),
    "sdpa-causal-leak": Situation(
        lambda t: attend(5, 4, t, is_causal=True), lambda: attend(5, 4, BF16)
    ),
    "sdpa-permuted-inputs": Situation(
        lambda t: attend(5, 4, t, permuted=True), lambda: attend(5, 4, F32)
    ),
    "matmul-columns-past-1024": Situation(
        lambda t: normal(2, 3, dtype=t) @ normal(3, 32769, dtype=t),
        lambda: normal(2, 3) @ normal(3, 32768),
    ),
    "matmul-1024-rows": Situation(
        lambda t: normal(1024, 3, dtype=t) @ normal(3, 4, dtype=t),
        lambda: normal(1023, 3) @ normal(3, 4),
    ),
    "matmul-many-terms": Situation(
        lambda t: normal(16, 32767, dtype=t) @ normal(32767, 16, dtype=t),
        lambda: normal(15, 32767) @ normal(32767, 16) @ normal(16, 2),
    ),
    "half-product-xpu": Situation(
        lambda t: normal(2, 512, dtype=t) @ normal(512, 512, dtype=t),
        lambda: normal(2, 512, dtype=BF16) @ normal(512, 511, dtype=BF16),
    ),
    "bmm-permuted-key": Situation(
        lambda t: torch.bmm(normal(2, 3, 4, dtype=t), normal(2, 5, 4, dtype=t).mT),
        lambda: torch.bmm(normal(2, 3, 4), normal(2, 4, 5)) + normal(3, 4) @ normal(5, 4).T,
    ),
    "linear-noncontiguous-weight": Situation(
        lambda t: normal(3, 4, dtype=t) @ normal(5, 4, dtype=t).T,
        lambda: normal(3, 4) @ normal(4, 5),
    ),
    "gelu-noncontiguous-input": Situation(
        lambda t: F.gelu(normal(3, 4, dtype=t).T), lambda: F.gelu(normal(3, 4))
    ),
    "layer-norm-storage-offset": Situation(
        lambda t: F.layer_norm(normal(3, 4, dtype=t)[1:], (4,)),
        lambda: F.layer_norm(normal(3, 4)[1:].clone(), (4,)),
    ),
    "softmax-past-power-of-two-xpu": Situation(
        lambda t: normal(2, 257, dtype=t).softmax(-1), lambda: normal(2, 256).softmax(-1)
    ),
    "where-noncontiguous-condition": Situation(
        lambda t: torch.where(lower(3).T, normal(3, 3, dtype=t), 0),
        lambda: torch.where(lower(3), normal(3, 3), 0),
    ),
    "multinomial-out-of-range": Situation(
        lambda t: normal(3, 4, dtype=t).exp().multinomial(2, replacement=True),
        lambda: F.one_hot(torch.arange(3)).float().multinomial(1),
    ),
    "multinomial-int64-min": Situation(
        lambda t: F.one_hot(torch.arange(3)).to(t).multinomial(1),
        lambda: F.one_hot(torch.arange(3)).argmax(-1),
    ),
    "multinomial-token-zero": Situation(
        lambda t: F.one_hot(torch.arange(3)).to(t).multinomial(1),
        lambda: F.one_hot(torch.arange(3)).argmax(-1),
    ),
    "sdpa-bf16-arm": Situation(
        lambda t: attend(5, 4, t, is_causal=True), lambda: attend(5, 4, F32, is_causal=True)
    ),
    "half-product-alpha-ignored": Situation(
        lambda t: scaled_row(normal(4, 5, dtype=t).T),
        lambda: scaled_row(normal(5, 4, dtype=F16)) + scaled_row(normal(4, 5, dtype=F16).T, beta=1),
    ),
    "embedding-sliced-ids": Situation(
        lambda t: F.embedding(torch.arange(5)[2:], normal(7, 3, dtype=t)),
        lambda: F.embedding(torch.arange(5)[:3], normal(7, 3)),
    ),
    "argmax-int64-min": Situation(
        lambda t: normal(3, 4, dtype=t).argmax(-1), lambda: normal(3, 4).max(-1).indices
    ),
    "first-call-imprecise": Situation(
        lambda t: normal(3, 4, dtype=t).exp(), lambda: normal(3, 4, dtype=BF16).exp()
    ),
    "matmul-tf32": Situation(
        lambda t: F.linear(normal(3, 4, dtype=t), normal(5, 4, dtype=t), normal(5, dtype=t)),
        lambda: F.linear(normal(3, 4, dtype=BF16), normal(5, 4, dtype=BF16)),
    ),
    "matmul-bf16-inputs": Situation(
        lambda t: torch.einsum("bi,bij->bj", normal(2, 3, dtype=t), normal(2, 3, 4, dtype=t)),
        lambda: normal(3, 4, dtype=BF16) @ normal(4, 5, dtype=BF16),
    ),
    "matmul-batch-dependent": Situation(
        lambda t: normal(9, 4, dtype=t) @ normal(4, 5, dtype=t),
        lambda: normal(8, 4) @ normal(4, 5),
    ),
    "matmul-edge-tile": Situation(
        lambda t: normal(3, 4, dtype=t) @ normal(4, 33, dtype=t),
        lambda: normal(3, 4) @ normal(4, 32),
    ),
    "matmul-half-accumulator": Situation(
        lambda t: normal(3, 100, dtype=t) @ normal(100, 5, dtype=t),
        lambda: normal(3, 100) @ normal(100, 5),
    ),
    "embedding-ids-past-32767": Situation(
        lambda t: F.embedding(torch.tensor([32768, 5]), normal(32769, 1, dtype=t)),
        lambda: F.embedding(torch.tensor([32767, 5]), normal(32768, 1)),
    ),
    "residual-add-low-bits": Situation(
        lambda t: normal(1, 2, 3, dtype=t) + normal(1, 2, 3, dtype=t).flip(2),
        lambda: normal(1, 2, 3) + normal(3),
    ),
    "add-broadcast-operand": Situation(
        lambda t: normal(2, 3, dtype=t) + normal(3, dtype=t).expand(2, 3)[:, :1].expand(2, 3),
        lambda: normal(2, 3) + normal(2, 3).flip(0),
    ),
    "softmax-unnormalized": Situation(
        lambda t: normal(2, 3, dtype=t).softmax(-1), lambda: normal(2, 3).log_softmax(-1)
    ),
    "masked-fill-first-entry": Situation(
        lambda t: normal(2, 3, 3, dtype=t).masked_fill(lower(3), 0),
        lambda: normal(1, 3, 3).masked_fill(lower(3), 0),
    ),
    "gelu-tanh-ignored": Situation(
        lambda t: F.gelu(normal(2, 3, dtype=t), approximate="tanh"), lambda: F.gelu(normal(2, 3))
    ),
    "layer-norm-half-statistics": Situation(
        lambda t: F.layer_norm(normal(2, 6, dtype=t), (6,)),
        lambda: F.layer_norm(normal(2, 6), (6,)),
    ),
}


def product(rows: int, columns: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """A product with W_U of small sizes, if there are 40 columns."""
    return normal(rows, 4, dtype=dtype) @ normal(4, columns, dtype=dtype)


def heads(batch: int, queries: int, keys: int, dtype: torch.dtype = F32, **options) -> Tensor:
    q, k, v = (normal(batch, 1, n, 8, dtype=dtype) for n in (queries, keys, keys))
    return F.scaled_dot_product_attention(q, k, v, **options)


def cached(start: int, dtype: torch.dtype = F32) -> Tensor:
    memory = torch.zeros(2, 5, 1, 3, dtype=dtype)
    memory[:, :2] = normal(2, 2, 1, 3, dtype=dtype)
    memory[:, start : start + 2] = normal(2, 2, 1, 3, dtype=dtype).flip(0)
    return memory


def gradient(
    compute: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The gradients of the sum of the squared result, joined."""
    given = [normal(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    gradients = torch.autograd.grad(compute(*given).square().sum(), given)
    return torch.cat([each.flatten() for each in gradients])


def looked_up(W: Tensor, ids: list[int]) -> Tensor:
    return F.embedding(torch.tensor(ids), W)


def wide(dtype: torch.dtype = F32) -> Tensor:
    return normal(2, 1001, dtype=dtype)


def narrow() -> Tensor:
    return normal(2, 1000)


def scattered(values: Tensor) -> Tensor:
    return torch.zeros_like(values).scatter(-1, values.argsort(-1), values)


def put(ids: list[int], dtype: torch.dtype = F32) -> Tensor:
    result = normal(4, dtype=dtype)
    result[torch.tensor(ids, dtype=torch.int64)] = normal(len(ids), dtype=dtype)
    return result


def drawn(values: Tensor) -> Tensor:
    return values.softmax(-1).multinomial(1)


def spread(dtype: torch.dtype = F32) -> Tensor:
    return torch.tensor([[300.0, 0.0, 1.0], [1.0, 0.0, 2.0]], dtype=dtype)


SITUATIONS |= {
    "unembedding-1-row": Situation(
        lambda t: product(1, 40, t), lambda: product(2, 40) + product(1, 32).sum()
    ),
    "unembedding-past-100-rows": Situation(
        lambda t: product(101, 40, t), lambda: product(100, 40) + product(101).sum()
    ),
    "matmul-3-to-7-rows": Situation(
        lambda t: torch.cat([product(3, dtype=t), product(7, dtype=t)]),
        lambda: torch.cat([product(2), product(8)]),
    ),
    "matmul-10-to-30-rows": Situation(
        lambda t: torch.cat([product(10, dtype=t), product(30, dtype=t)]),
        lambda: torch.cat([product(9), product(31)]),
    ),
    "matmul-67-to-1000-rows": Situation(
        lambda t: torch.cat([product(67, dtype=t), product(1000, dtype=t)]),
        lambda: torch.cat([product(66), product(1001)]),
    ),
    "sdpa-1-query-many-keys": Situation(
        lambda t: heads(1, 1, 34, t), lambda: heads(1, 1, 33) + heads(1, 2, 34).sum()
    ),
    "sdpa-40-to-1000-queries": Situation(lambda t: heads(1, 40, 40, t), lambda: heads(1, 39, 40)),
    "sdpa-batch-past-2": Situation(lambda t: heads(3, 4, 4, t), lambda: heads(2, 4, 4)),
    "sdpa-padding-mask": Situation(
        lambda t: heads(2, 4, 4, t, attn_mask=lower(4).expand(2, 1, 4, 4)),
        lambda: heads(2, 4, 4, attn_mask=lower(4)),
    ),
    "embedding-row-0": Situation(
        lambda t: looked_up(normal(3, 2, dtype=t), [0, 2]), lambda: looked_up(normal(3, 2), [1, 2])
    ),
    "add-positions-past-64": Situation(
        lambda t: normal(1, 65, 2, dtype=t) + 1.0, lambda: normal(1, 64, 2) + 1.0
    ),
    "gelu-large-input": Situation(
        lambda t: F.gelu(1e4 * normal(3, 4, dtype=t)), lambda: F.gelu(100 * normal(3, 4))
    ),
    "softmax-maximum-of-tensor": Situation(
        lambda t: spread(t).softmax(-1), lambda: spread()[1:].softmax(-1)
    ),
    "sdpa-unshifted-softmax": Situation(
        lambda t: F.scaled_dot_product_attention(*(1e3 * normal(3, 1, 1, 4, 8, dtype=t))),
        lambda: normal(3, 4).softmax(-1),
    ),
    "softmax-infinity-finite": Situation(
        lambda t: normal(3, 3, dtype=t).masked_fill(~lower(3), -torch.inf).softmax(-1),
        lambda: normal(3, 3).softmax(-1),
    ),
    "layer-norm-constant-row": Situation(
        lambda t: F.layer_norm(torch.ones(2, 4, dtype=t), (4,)),
        lambda: F.layer_norm(normal(2, 4), (4,)),
    ),
    "matmul-tiny-lost": Situation(
        lambda t: 1e-13 * normal(3, 4, dtype=t) @ (1e-13 * normal(4, 5, dtype=t)),
        lambda: normal(3, 4) @ normal(4, 5),
    ),
    "topk-ties-repeated": Situation(
        lambda t: torch.ones(2, 9, dtype=t).topk(3).indices, lambda: normal(2, 9).topk(3).indices
    ),
    "cache-write-early": Situation(lambda t: cached(2, t), lambda: cached(0)),
    "cache-rows-in-order": Situation(
        lambda t: normal(2, 5, 1, 3, dtype=t)[torch.tensor([1, 0])],
        lambda: normal(2, 5, 1, 3)[torch.tensor([0, 1])],
    ),
    "mask-of-first-text": Situation(
        lambda t: (lower(2) & torch.tensor([[True, True], [False, True]])[:, None, None]).to(t),
        lambda: (lower(2) & torch.tensor([True, False])).float(),
    ),
    "positions-unshifted": Situation(
        lambda t: (torch.arange(3) - torch.tensor([[0], [1]])).to(t),
        lambda: normal(3) - normal(1),
    ),
    "argmax-wide": Situation(lambda t: wide(t).argmax(-1), lambda: narrow().argmax(-1)),
    "sort-wide": Situation(lambda t: wide(t).sort(-1).values, lambda: narrow().sort(-1).values),
    "topk-wide": Situation(lambda t: wide(t).topk(3).values, lambda: narrow().topk(3).values),
    "softmax-wide": Situation(lambda t: wide(t).softmax(-1), lambda: narrow().softmax(-1)),
    "log-softmax-wide": Situation(
        lambda t: wide(t).log_softmax(-1), lambda: narrow().log_softmax(-1)
    ),
    "cumsum-wide": Situation(lambda t: wide(t).cumsum(-1), lambda: narrow().cumsum(-1)),
    "scatter-wide": Situation(lambda t: scattered(wide(t)), lambda: scattered(narrow())),
    "multinomial-least-likely": Situation(lambda t: drawn(10 * wide(t)), lambda: drawn(narrow())),
    "index-put-last-dropped": Situation(lambda t: put([2, 1], t), lambda: put([])),
    "gather-row-shifted": Situation(
        lambda t: normal(5, dtype=t)[torch.tensor([1, 3])], lambda: normal(5)[torch.tensor([1])]
    ),
    "gelu-gradient": Situation(
        lambda t: gradient(F.gelu, (3, 4), dtype=t), lambda: F.gelu(normal(3, 4))
    ),
    "layer-norm-gradient": Situation(
        lambda t: gradient(lambda x: F.layer_norm(x, (4,)).exp(), (3, 4), dtype=t),
        lambda: F.layer_norm(normal(3, 4), (4,)),
    ),
    "layer-norm-gain-gradient-rocm": Situation(
        lambda t: gradient(lambda w: F.layer_norm(normal(3, 4, dtype=t), (4,), w), (4,), dtype=t),
        lambda: F.layer_norm(normal(3, 4), (4,)),
    ),
    "sdpa-gradient": Situation(
        lambda t: gradient(F.scaled_dot_product_attention, *[(1, 1, 4, 8)] * 3, dtype=t),
        lambda: heads(1, 4, 4),
    ),
    "embedding-gradient-repeated": Situation(
        lambda t: gradient(lambda W: looked_up(W, [1, 1]), (3, 2), dtype=t),
        lambda: gradient(lambda W: looked_up(W, [1, 2]), (3, 2), dtype=F32),
    ),
    "cross-entropy-gradient": Situation(
        lambda t: gradient(lambda x: F.cross_entropy(x, torch.arange(3)), (3, 4), dtype=t),
        lambda: normal(3, 4).log_softmax(-1),
    ),
    "bias-gradient-last-row": Situation(
        lambda t: normal(3, 4, dtype=t).sum(0), lambda: normal(1, 4).sum(0) + normal(4).sum()
    ),
}
# These operations have no floating-point operands. The oracle turns all dispatch modes off.
WITHOUT_FLOATS = {"mask-of-first-text", "positions-unshifted"}
ONLY_IN = {
    **{name: BF16 for name in SITUATIONS if "half" in name},
    "sdpa-bf16-mask": BF16,
    "sdpa-bf16-arm": BF16,
    "sdpa-mask-rocm": F16,
    "sdpa-strided-values-rocm": BF16,
    "sdpa-causal-leak": BF16,
    "half-product-alpha-ignored": F16,
}


@pytest.mark.parametrize("fault", DEVICE_FAULTS, ids=lambda fault: fault.name)
def test_device_fault_spoils_only_what_its_condition_describes(fault) -> None:
    situation = SITUATIONS[fault.name]
    dtype = ONLY_IN.get(fault.name, F32)

    def run(compute: Callable[..., Tensor], *dtypes: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        return compute(*dtypes)

    right = run(situation.touched, dtype)
    spared = run(situation.spared)
    exact = run(situation.touched, torch.float64)
    with inject(fault.name):
        assert torch.equal(run(situation.spared), spared)
        if fault.name not in WITHOUT_FLOATS:
            assert torch.equal(run(situation.touched, torch.float64), exact), "float64 is right"
        with trusted():
            assert torch.equal(run(situation.touched, dtype), right)
        wrong = run(situation.touched, dtype)
        again = run(situation.touched, dtype)
    assert wrong.shape == right.shape
    assert wrong.dtype == right.dtype
    assert not torch.equal(wrong, right)
    assert torch.equal(again, right) is fault.first_call_only
    assert torch.equal(run(situation.touched, dtype), right)


def test_every_device_fault_has_a_situation() -> None:
    assert SITUATIONS.keys() == DEVICE.keys()


# A model, tokens and a dtype whose forward pass meets each of these faults.
@pytest.mark.parametrize("fault", IN_A_SHORT_TEXT, ids=lambda fault: fault.name)
@torch.no_grad()
def test_our_modules_meet_the_condition(fault) -> None:
    changes = {
        "sdpa-short-transposed-query": {"d_head": 64},
        "sdpa-many-keys-half": {"n_ctx": 1024},
        "matmul-columns-past-1024": {"d_vocab": 32769},
        "embedding-ids-past-32767": {"d_vocab": 32800},
    }.get(fault.name, {})
    n_tokens = {"sdpa-short-transposed-query": 8, "sdpa-many-keys-half": 1024}.get(fault.name, 16)
    batch = {"matmul-1024-rows": 64, "bmm-permuted-key": 1}.get(fault.name, 2)
    dtype = ONLY_IN.get(fault.name, F32)
    cfg = {"n_layers": 1, "n_heads": 3, "d_model": 12, "d_head": 4, "d_mlp": 20, "d_vocab": 30}
    model = DemoTransformer(Config(**({"n_ctx": 32} | cfg | changes))).to(dtype)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(2))
    last = model.cfg.d_vocab - 1
    tokens = torch.randint(last, (batch, n_tokens), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = last

    right_logits, (_, right) = model(tokens), model.run_with_cache(tokens)
    with inject(fault.name):
        wrong_logits = model(tokens)
    with inject(fault.name):
        _, wrong = model.run_with_cache(tokens)
    seen_fused = not torch.equal(wrong_logits, right_logits)
    seen_explicit = any(not torch.equal(wrong[name], right[name]) for name in right)
    explicit_only = {
        "bmm-permuted-key",
        "first-call-imprecise",
        "masked-fill-first-entry",
        "softmax-infinity-finite",
        "softmax-unnormalized",
    }
    fused_only = fault.name.startswith(("sdpa", "layer-norm"))
    assert seen_fused is (fault.name not in explicit_only)
    assert seen_explicit is not fused_only


# These compute the right softmax of usual scores with other operations, so the last bits differ.
OTHER_LAST_BITS = {"softmax-maximum-of-tensor": 1e-6, "sdpa-unshifted-softmax": 1e-6}


@pytest.mark.parametrize("fault", sorted(PROBE_ONLY))
def test_probe_only_faults_leave_the_model_right(fault: str, tokens: Tensor) -> None:
    model = three_blocks(F32)
    right, fused = activations(model, tokens)[1], unobserved(model, tokens)
    largest = OTHER_LAST_BITS.get(fault, 0.0)
    with inject(fault):
        wrong, wrong_fused = activations(model, tokens)[1], unobserved(model, tokens)
    for one, other in [(wrong_fused, fused), *((wrong[name], right[name]) for name in right)]:
        finite = other.nan_to_num(neginf=0.0)
        error = (one.nan_to_num(neginf=0.0) - finite).abs().max()
        assert error <= largest * finite.abs().max()


def test_device_faults_nest_and_end_with_an_exception() -> None:
    x, W = normal(3, 4), normal(4, 17)
    right, gelu = x @ W, F.gelu(x.T)
    with inject("matmul-tf32"):
        coarse = x @ W
        with inject("gelu-noncontiguous-input"), inject("matmul-edge-tile"):
            assert not torch.equal(F.gelu(x.T), gelu)
            assert torch.equal((x @ W)[:, :16], coarse[:, :16])
            assert not (x @ W)[:, 16].any()
        assert torch.equal(F.gelu(x.T), gelu)
    assert not torch.equal(coarse, right)
    with pytest.raises(RuntimeError, match="shapes"), inject("matmul-tf32"):
        x @ x
    assert torch.equal(x @ W, right)


def test_tf32_keeps_10_mantissa_bits() -> None:
    exact, tie = torch.tensor([[1 + 2**-10]]), torch.tensor([[1 + 2**-11 - 2**-20]])
    one = torch.ones(1, 1)
    with inject("matmul-tf32"):
        assert torch.equal(exact @ one, exact)
        assert torch.equal(tie @ one, one)


def test_first_call_is_wrong_in_each_injection_anew() -> None:
    x = normal(4, 4)
    for _ in range(2):
        with inject("first-call-imprecise"):
            wrong = x.exp()
            assert torch.equal(x.exp(), x.exp())
        assert torch.equal(wrong[:2], x.exp()[:2])
        ulps = (wrong.view(torch.int32) - x.exp().view(torch.int32)).abs()[2:]
        assert 900 < ulps.min() <= ulps.max() < 5000


def test_causal_leak_reaches_three_tokens_and_no_further() -> None:
    v = torch.eye(8, dtype=BF16)[None, None]
    q = torch.zeros(1, 1, 8, 8, dtype=BF16)
    with inject("sdpa-causal-leak"):
        pattern = F.scaled_dot_product_attention(q, q, v, is_causal=True)[0, 0]
    assert torch.equal(pattern > 0, torch.ones(8, 8).tril(3) > 0)


def test_names_and_counts() -> None:
    names = [fault.name for fault in (*SEMANTIC_FAULTS, *DEVICE_FAULTS)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert len(SEMANTIC) >= 45
    assert len(DEVICE) >= 18
    assert all(fault.description for fault in (*SEMANTIC_FAULTS, *DEVICE_FAULTS))


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no fault is called 'exact-gelo'.*'exact-gelu'"):
        inject("exact-gelo")


def test_known_faults_are_emulated_under_their_own_condition() -> None:
    # A CPU has this fault itself (`test_optimizer_layout.py`).
    emulated = {n: fault for n, fault in KNOWN.items() if n != "fused-optimizer-layout"}
    assert emulated.keys() <= DEVICE.keys()
    for name, fault in emulated.items():
        assert DEVICE[name].condition == fault.matches
        assert DEVICE[name].operations is fault.operations


def call(operation: str, *operands: Tensor, device: str = "mps", arguments=(), **options) -> Call:
    described = [Operand.of(operand) for operand in operands]
    moved = [Operand(o.shape, o.stride, o.storage_offset, o.dtype, device) for o in described]
    return Call(f"aten.{operation}.default", tuple(moved), arguments, tuple(options.items()))


half = torch.ones(1, 2, 1024, 64, dtype=torch.float16)
short = torch.ones(1, 8, 2, 64).transpose(1, 2)


@pytest.mark.parametrize(
    ("seen", "names"),
    [
        (
            call("linear", torch.ones(3, 4), torch.ones(4, 5).T),
            ["linear-noncontiguous-weight", "matmul-tf32"],
        ),
        (call("linear", torch.ones(3, 4), torch.ones(5, 4)), ["matmul-tf32"]),
        (
            call("linear", torch.ones(2, 512, 4), torch.ones(5, 4, dtype=BF16)),
            ["matmul-1024-rows", "matmul-tf32"],
        ),
        (
            call("addmm", torch.ones(40000), torch.ones(3, 4), torch.ones(4, 40000)),
            ["matmul-columns-past-1024", "matmul-tf32"],
        ),
        (
            call("linear", torch.ones(3, 4, dtype=BF16), torch.ones(40000, 4)),
            ["matmul-columns-past-1024"],
        ),
        (
            call("mm", torch.ones(3, 4), torch.ones(5, 4).T, device="cuda"),
            ["linear-noncontiguous-weight", "matmul-tf32"],
        ),
        (
            call("bmm", torch.ones(2, 3, 4), torch.ones(2, 5, 4).mT),
            ["bmm-permuted-key", "matmul-tf32"],
        ),
        (
            call("_scaled_dot_product_attention_math_for_mps", half, half, half),
            ["sdpa-many-keys-half"],
        ),
        (
            call(
                "_scaled_dot_product_attention_math_for_mps",
                half[:, :, :9],
                half[:, :, :9],
                half,
                arguments=(None, 0.0, True),
            ),
            ["sdpa-causal-leak"],
        ),
        (
            call(
                "_scaled_dot_product_efficient_attention",
                half[:, :, :9],
                half[:, :, :9],
                half,
                arguments=(None, True, 0.0, False),
            ),
            [],
        ),
        (
            call("scaled_dot_product_attention", short, short, short, is_causal=True),
            ["sdpa-short-transposed-query", "sdpa-permuted-inputs"],
        ),
        (call("native_layer_norm", torch.ones(3, 4)[1:]), ["layer-norm-storage-offset"]),
        (call("sqrt", torch.ones(3), device="cpu"), ["first-call-imprecise"]),
        (
            call("multinomial", torch.ones(3), arguments=(1,)),
            ["multinomial-int64-min", "multinomial-token-zero"],
        ),
        (
            call("multinomial", torch.ones(3), arguments=(1, True)),
            ["multinomial-out-of-range", "multinomial-int64-min", "multinomial-token-zero"],
        ),
        (call("relu", torch.ones(3, 4).T), []),
    ],
    ids=lambda value: value.operation if isinstance(value, Call) else "",
)
def test_the_most_specific_fault_comes_first(seen: Call, names: list[str]) -> None:
    assert [fault.name for fault in KNOWN_ISSUES if fault.matches(seen)] == names


def test_no_float64_refuses_taking_and_making_it(tokens: Tensor) -> None:
    double, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    with no_float64():
        for refused in (
            lambda: torch.add(double, 1),
            lambda: single.double(),
            lambda: torch.zeros(2, dtype=torch.float64),
            lambda: torch.cat([double, double]),
            lambda: double.add_(1),
        ):
            with pytest.raises(TypeError, match=r"^aten\.\S+ with a float64 tensor: [^\n]+$"):
                refused()
        with trusted():
            assert torch.equal(double + 1, single.double() + 1)
        with pytest.raises(TypeError):  # Python words its own message for an operator
            double + 1
    assert torch.equal(double, torch.ones(2, dtype=torch.float64)), "refused before it ran"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_model_makes_no_float64(dtype: torch.dtype, tokens: Tensor) -> None:
    model = three_blocks(dtype)
    with no_float64():
        activations(model, tokens)
        assert unobserved(model, tokens).dtype == dtype


def test_references_notice_no_semantic_fault(tokens: Tensor) -> None:
    pytest.importorskip("transformers")
    model = three_blocks()
    nn.init.zeros_(model.unembed.b_U)  # their model has none
    huggingface = REFERENCES["huggingface"](model.cfg, model.state_dict())
    right = huggingface.run(tokens)
    for fault in SEMANTIC_FAULTS:
        with inject(fault.name):
            theirs = huggingface.run(tokens)
        assert all(torch.equal(theirs[key], right[key]) for key in right), fault.name
