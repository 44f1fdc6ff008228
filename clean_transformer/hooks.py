"""Hook points: named identities in the forward pass where an activation is watched or replaced."""

from torch import Tensor, nn


class HookPoint(nn.Module):
    """Returns its input. A forward hook on it sees the activation, and may return a replacement.

    `name` is the path of the point in the model that last ran it under `run_with_hooks`; it is
    what TransformerLens's hook functions read as `hook.name`.
    """

    name: str | None = None

    def forward(self, activation: Tensor) -> Tensor:
        """Give back `activation`, the very same tensor."""
        return activation


def observed(*points: nn.Module) -> bool:
    """Whether a forward or backward hook sits on any of the points, ours or another library's.

    Modules ask this to choose between a fused kernel and the explicit steps between hook points.
    """
    return any(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        for point in points
    )
