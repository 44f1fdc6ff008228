"""The float64 oracle agrees with NumPy, and a wrong kernel in either is seen."""

import numpy as np
import pytest
import torch

from clean_transformer.model import DemoTransformer
from clean_transformer.parity import numpy_gpt2
from clean_transformer.parity.uses.oracle import check_oracle
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights.processing import process_weights

from ..small import BF16, F32, everywhere, small_weights

WEIGHTS = small_weights()


def checked(dtype: torch.dtype = F32):
    exact = ExactParts(WEIGHTS.cfg, WEIGHTS.state, dtype)
    return check_oracle(exact, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_they_agree(dtype: torch.dtype):
    checks = checked(dtype)
    assert len(checks) == len(uses(WEIGHTS.cfg))
    for check in checks:
        assert check.verdict is Verdict.PASS
        assert 0 < check.measured < 1e-13
        assert f"NumPy {np.__version__}" in check.note


@pytest.mark.parametrize("name", ["softmax", "gelu", "layer_norm"])
def test_a_wrong_function_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(numpy_gpt2, name)
    monkeypatch.setattr(numpy_gpt2, name, lambda *given: right(*given) * (1 + 1e-9))
    assert {check.verdict for check in checked()} == {Verdict.WRONG}


@pytest.mark.parametrize("value", [1 + 1e-9, torch.nan])
def test_a_wrong_kernel_is_named(value: float):
    def wrong(bias, x, weight, *, beta=1, alpha=1):
        return (bias + torch.bmm(x[None], weight[None])[0]) * value

    with everywhere("addmm", wrong):
        checks = checked()
    for check in checks:
        assert check.verdict is Verdict.WRONG
        assert "aten.addmm.default is wrong" in check.note


def test_a_wrong_attention_kernel_is_named():
    def wrong(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        z = q @ k.mT
        return z.softmax(-1) @ v, z.logsumexp(-1)

    with everywhere("_scaled_dot_product_flash_attention_for_cpu", wrong):
        check = checked()[0]
    assert check.verdict is Verdict.WRONG
    assert "_scaled_dot_product_flash_attention_for_cpu" in check.note


@pytest.mark.parametrize("processed", [False, True])
def test_the_whole_model_is_the_same_function(processed: bool):
    cfg, state = WEIGHTS.cfg, {name: w.double() for name, w in WEIGHTS.state.items()}
    if processed:
        cfg, state = process_weights(cfg, state)
    model = DemoTransformer.from_state_dict(state, cfg)
    tokens = torch.arange(20) * 37 % cfg.d_vocab
    with torch.no_grad():
        ours = model(tokens[None])[0].numpy()
    weights = {name: w.numpy() for name, w in model.state_dict().items()}
    theirs = numpy_gpt2.gpt2(tokens.numpy(), weights, cfg.n_layers, cfg.eps)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())
