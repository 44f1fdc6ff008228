"""`require_finite`: stops generation at logits that are NaN, and says where the NaN began."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clean_transformer.hooks import HookedModule
from clean_transformer.text.sampling import Logits, Rows


def require_finite(model: Any, logits: Logits, prompts: Rows, new: Rows) -> None:
    """Raise `RuntimeError` if a row of `logits` has NaN, +inf, or nothing but −inf.

    `prompts` and `new` hold the token ids that led to each row: its prompt, and the tokens
    generated so far. The message names the first activation with NaN or infinity (see
    `first_not_finite`), and the weights that contain NaN or infinity.
    """
    # NaN and +inf propagate to the largest logit.
    bad = ~logits.amax(dim=-1).isfinite()
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    where = "the model's second run, without a KV cache, has none"
    if isinstance(model, HookedModule):
        where = first_not_finite(model, [*prompts[row], *new[row]]) or where
    weights = [
        name
        for name, weight in getattr(model, "named_parameters", dict)()
        if not weight.isfinite().all()
    ]
    advice = f"; the weights {', '.join(weights[:3])} are not finite" if weights else ""
    if not weights and logits.dtype == torch.float32 and model.cfg.dtype == torch.float16:
        advice = "; float16 ends at 65504: use bfloat16 or float32"
    raise RuntimeError(
        f"the logits of prompt {row} are NaN or infinite after {len(new[row])} new tokens. The "
        f"first NaN or infinity: {where}{advice}"
    )


@torch.no_grad()
def first_not_finite(model: HookedModule, tokens: Sequence[int]) -> str | None:
    """Return the first activation with NaN or infinity, and its first position, as a text.

    The model runs once more on `tokens`. Returns None if all activations are finite. The −inf of
    masked attention scores does not count.
    """
    found: list[str] = []

    def look(activation: Tensor, hook: Any) -> None:
        bad = ~activation.isfinite()
        if hook.name.endswith("hook_attn_scores"):
            bad &= activation != -torch.inf
        if not found and bad.any():
            # Scores and patterns have the axes batch, head, query, key. The others have batch, pos.
            axis = 2 if hook.name.endswith(("hook_attn_scores", "hook_pattern")) else 1
            position = int(bad.nonzero()[:, axis].min())
            found.append(f"{hook.name} at position {position}")

    device = next(model.parameters()).device
    names = model.default_points()
    # A function selects the hook points, because a module of the user may not run all its points.
    model.run_with_hooks(
        torch.tensor([[*tokens]], device=device), fwd_hooks=[(names.__contains__, look)]
    )
    return found[0] if found else None
