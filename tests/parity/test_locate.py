"""From the first bad activation to its operation."""

import pytest
import torch

from clean_transformer.parity.faults import inject
from clean_transformer.parity.locate import locate

from .small import corrupted, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300)
TOKENS = torch.arange(10).view(2, 5)


def test_nothing_is_found_on_a_healthy_device() -> None:
    model = small_model(WEIGHTS)
    assert locate(model, "blocks.0.mlp", "explicit", TOKENS) is None


@pytest.mark.parametrize(
    ("fault", "name", "path", "operation"),
    [
        ("gelu-tanh-ignored", "blocks.1.mlp.hook_post", "fused", "aten.gelu.default"),
        ("softmax-unnormalized", "blocks.0.attn.hook_pattern", "explicit", "aten._softmax.default"),
        ("residual-add-low-bits", "blocks.0.hook_resid_mid", "fused", "aten.add.Tensor"),
        # The sum of token and position embedding is made by no part of the model.
        ("residual-add-low-bits", "", "fused", "aten.add.Tensor"),
    ],
)
def test_the_operation_of_an_activation(fault: str, name: str, path: str, operation: str) -> None:
    model = small_model(WEIGHTS)
    with inject(fault):
        located = locate(model, name, path, TOKENS)
    assert located is not None
    assert (located.operation, located.where) == (operation, name or "logits")
    assert located.ratio > 1
    assert all("float32 [2, " in operand and "cpu" in operand for operand in located.operands)


def test_a_part_that_is_right_alone_leads_to_the_whole() -> None:
    """The MLP is blamed, the addition after it is guilty."""
    block = small_model(WEIGHTS).blocks[0]
    with inject("residual-add-low-bits"):
        located = locate(block, "mlp.hook_post", "fused", torch.randn(1, 5, 128))
    assert located is not None
    assert located.operation == "aten.add.Tensor"


def test_a_fault_outside_every_operation_is_not_found() -> None:
    model = small_model(WEIGHTS)
    with corrupted(model, "blocks.0.mlp.hook_pre", lambda pre: pre):
        assert locate(model, "blocks.0.mlp.hook_pre", "fused", TOKENS) is None
