"""The float64 oracle agrees with NumPy, and a wrong kernel in either is seen."""

import numpy as np
import pytest
import torch

from clean_transformer.model import DemoTransformer
from clean_transformer.parity import numpy_gpt2
from clean_transformer.parity.uses.oracle import check_oracle
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights.processing import process_weights

from ..small import BF16, F32, small_weights

WEIGHTS = small_weights()


def checked(dtype: torch.dtype = F32):
    exact = ExactParts(WEIGHTS.cfg, WEIGHTS.state, dtype)
    return check_oracle(exact, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_they_agree(dtype: torch.dtype):
    check = checked(dtype)
    assert check.verdict is Verdict.PASS
    assert 0 < check.measured < 1e-13


@pytest.mark.parametrize("name", ["softmax", "gelu", "layer_norm"])
def test_a_wrong_function_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(numpy_gpt2, name)
    monkeypatch.setattr(numpy_gpt2, name, lambda *given: right(*given) * (1 + 1e-9))
    assert checked().verdict is Verdict.WRONG


def test_a_float64_kernel_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = torch.nn.functional.gelu
    monkeypatch.setattr(
        torch.nn.functional, "gelu", lambda x, approximate="none": right(x, approximate="none")
    )
    assert checked().verdict is Verdict.WRONG


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
