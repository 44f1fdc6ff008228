"""Training is the same function too: every gradient, and ten steps of AdamW, as the references'."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.training.loop import adamw, update
from clean_transformer.training.settings import Training
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from clean_transformer.weights.formats.transformer_lens import (
    HOOKED_TRANSFORMER,
    TRANSFORMER_BRIDGE,
)

from ..helpers import Rounding, needs, quietly, random_model, random_tokens, reference_model, tiny

FORMATS = {
    "bridge": TRANSFORMER_BRIDGE,
    "hooked": HOOKED_TRANSFORMER,
    "huggingface": HUGGINGFACE,
}
# HookedTransformer has an unembedding of its own, and the bridge splits what Hugging Face ties.
CASES = [("huggingface", True), ("huggingface", False), ("bridge", False), ("hooked", False)]


class Pair:
    """Our model and a reference with the same weights, and the same names for its parameters."""

    def __init__(self, kind: str, tied: bool):
        self.ours = random_model(tiny(tied_unembed=tied))
        reference = quietly(REFERENCES[kind], self.ours.cfg, self.ours.state_dict())
        self.theirs: nn.Module = reference_model(reference)
        self.format = FORMATS[kind]
        state = self.theirs.state_dict(keep_vars=True)
        self.parameters = {name: value for name, value in state.items() if value.requires_grad}

    def logits(self, tokens: Tensor) -> Tensor:
        output = self.theirs(tokens)
        return output if isinstance(output, Tensor) else output.logits

    def under_our_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Theirs, without those that they do not train."""
        rows = self.format.rows(self.ours.cfg)
        like = self.theirs.state_dict()
        read = self.format.read(self.ours.cfg, like | tensors)
        return {row.ours: read[row.ours] for row in rows if row.theirs in tensors}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'tied' if case[1] else 'untied'}")
def pair(request: pytest.FixtureRequest, installed: str) -> Pair:
    kind, tied = request.param
    needs(kind, installed)
    return Pair(kind, tied)


def loss(logits: Tensor, windows: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def trained(model: DemoTransformer) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_every_gradient(pair: Pair):
    windows = random_tokens(pair.ours.cfg, batch=3, length=10)
    loss(pair.ours(windows[:, :-1]), windows).backward()
    loss(pair.logits(windows[:, :-1]), windows).backward()
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters()}
    theirs = pair.under_our_names({name: p.grad for name, p in pair.parameters.items()})

    # Theirs is the zero that Hugging Face has in the place of b_U, or a parameter.
    untrained = set() if pair.format is HOOKED_TRANSFORMER else {"unembed.b_U"}
    assert ours.keys() - theirs.keys() == untrained
    for name, gradient in theirs.items():
        # b_K moves all scores of a query alike, which no softmax sees: its gradient is 0 but for
        # rounding. Those of b_Q are sums of the same kind that do not cancel.
        scale = theirs[name.replace("b_K", "b_Q")].abs().max()
        assert scale > 1e-6
        assert (ours[name] - gradient).abs().max() <= 1e-10 * scale, name


def test_ten_steps_of_adamw(pair: Pair):
    """Each parameter ends where theirs does, up to rounding, and far from where it began."""
    training = Training(steps=10, batch=3, learning_rate=1e-2, warmup=3, weight_decay=0.1, clip=0.1)
    pair.ours.unembed.b_U.requires_grad_(False)
    pair.parameters.pop("unembed.b_U", None)  # of HookedTransformer
    began = {name: parameter.detach().clone() for name, parameter in trained(pair.ours).items()}
    ours = adamw(pair.ours, training)
    once = {parameter: name for name, parameter in pair.parameters.items()}  # if tied
    matrices = [p for p, name in once.items() if p.ndim >= 2 and ".b_" not in name]
    others = [p for p, name in once.items() if p.ndim < 2 or ".b_" in name]
    theirs = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    rounding = Rounding()
    for step in range(10):
        windows = random_tokens(pair.ours.cfg, batch=3, length=11, seed=step)
        our_loss, our_norm = update(pair.ours, ours, windows, training, step)

        their_loss = loss(pair.logits(windows[:, :-1]), windows)
        their_loss.backward()
        their_norm = nn.utils.clip_grad_norm_([*matrices, *others], 0.1)
        for group in theirs.param_groups:
            group["lr"] = training.rate(step)
        theirs.step()
        theirs.zero_grad()

        assert our_loss == pytest.approx(their_loss.item(), rel=1e-12)
        assert our_norm == pytest.approx(their_norm.item(), rel=1e-10)
        assert our_norm > 0.1  # so that clipping was seen to be the same
        squares = {name: ours.state[p]["exp_avg_sq"] for name, p in trained(pair.ours).items()}
        rounding.add(step, training.rate(step), gradient=0.1, exp_avg_sq=squares)

    now = pair.under_our_names({name: p.detach() for name, p in pair.parameters.items()})
    assert now.keys() == began.keys()
    for name, parameter in trained(pair.ours).items():
        assert ((parameter - now[name]).abs() <= rounding.allowed[name]).all(), name
        moved = (parameter - began[name]).abs().max()
        assert (moved < 1e-9) if name.endswith("b_K") else (moved > 1e-3), name
