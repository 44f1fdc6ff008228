"""Device faults that affect only a backward pass."""

from typing import Any

import torch

from clean_transformer.parity.faults.corruptions import always, own, with_arguments, with_result
from clean_transformer.parity.operations.attention import ATTENTIONS
from clean_transformer.parity.operations.call import Call


def sums_rows(call: Call) -> bool:
    """Whether the argument of `sum` is a floating-point matrix with several rows."""
    rows = call.operands[0]
    return rows.dtype.is_floating_point and len(rows.shape) == 2 and rows.shape[0] > 1


def repeats_dropped(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute an embedding's gradient, but use only the first occurrence of each token id."""
    gradient, ids, *rest = args
    flat = ids.flatten()
    first = (flat[:, None] == flat).int().argmax(-1) == torch.arange(len(flat), device=flat.device)
    kept = gradient * first.view(*ids.shape, 1)
    return func(kept, ids, *rest, **options)


def half_of_gains(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run the backward pass of LayerNorm, and set half of the gradients of gain and bias to 0."""
    gradient, *others = func(*args, **options)
    for each in others:
        if each is not None:
            each[len(each) // 2 :] = 0
    return gradient, *others


GRADIENT_FAULTS = (
    own(
        "gelu-gradient",
        "the gradient of GELU is that of the identity",
        "gelu_backward",
        always,
        lambda func, args, options: args[0].clone(),
        "training",
    ),
    own(
        "layer-norm-gradient",
        "the gradient of LayerNorm ignores that the mean depends on the input",
        "native_layer_norm_backward",
        always,
        with_result(lambda gradient: gradient + gradient.abs().mean(-1, keepdim=True)),
        "training",
    ),
    own(
        "sdpa-gradient",
        "the gradient of attention's queries is twice as large",
        " ".join(f"{name}_backward" for name in ATTENTIONS),
        always,
        with_result(lambda gradient: 2 * gradient),
        "training",
    ),
    own(
        "embedding-gradient-repeated",
        "the gradient of a token that occurs twice is that of one occurrence",
        "embedding_dense_backward",
        always,
        repeats_dropped,
        "training",
    ),
    own(
        "cross-entropy-gradient",
        "the gradient of cross entropy does not subtract the right token",
        "_log_softmax_backward_data",
        always,
        with_result(lambda gradient: gradient.clamp(min=0)),
        "training",
    ),
    own(
        "bias-gradient-last-row",
        "the sum over rows leaves out the last row",
        "sum",
        sums_rows,
        with_arguments(lambda rows: rows[:-1], 0),
        "training",
    ),
)
