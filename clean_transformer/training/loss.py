"""`cross_entropy`: the training loss, with less memory than PyTorch's own cross-entropy."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clean_transformer.support.numerics import at_least_float32

# The number of logits that are converted to float32 at a time. In float32, they take 16 MB. PyTorch
# can reuse a buffer of this size for the next logits.
AT_ONCE = 2**22


def cross_entropy(
    logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, "row"]
) -> Float[Tensor, ""]:
    """Return the mean of log Σ exp(z) − z[target], in nats, over all rows z of `logits`.

    The result is in float32, or in float64 for float64 logits. The logits are by far the largest
    tensor of a training step. PyTorch's own cross-entropy allocates three more tensors of this size
    for the backward pass. This function allocates only one: the gradient of the loss, which is
    (softmax(z) − onehot(target)) / (number of rows). It does not support second derivatives.
    """
    loss: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.rows = max(1, AT_ONCE // logits.shape[1])
        parts = (at_least_float32(part) for part in torch.split(logits, ctx.rows))
        log_sums = torch.cat([part.logsumexp(dim=1) for part in parts])
        ctx.save_for_backward(logits, targets, log_sums)
        return (log_sums - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        gradient = torch.empty_like(saved[0])
        parts = (torch.split(tensor, ctx.rows) for tensor in (gradient, *saved))
        for out, logits, targets, log_sums in zip(*parts, strict=True):
            p = (logits.to(log_sums.dtype) - log_sums[:, None]).exp_()
            p[torch.arange(len(p), device=p.device), targets] -= 1
            out.copy_(p.mul_(of_loss / len(gradient)))
        return gradient, None
