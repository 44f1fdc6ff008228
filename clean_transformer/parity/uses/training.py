"""Checks training: the loss, the gradients, and a step of AdamW.

The device runs one backward pass of the whole model. Then the gradients of each checked part, such
as a block, are computed in float64 on the CPU. This computation starts from two tensors of the
device: the input of the part, and the gradient of its output. So an error in one part does not make
other parts fail.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.inference.fast_modules import NotOptimized
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.limits import SOFTMAX, SUM
from clean_transformer.parity.locate import Located, in_words
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted
from clean_transformer.parity.scales import Size, softmax_scale, sum_scale
from clean_transformer.parity.uses.adamw import judge_adamw
from clean_transformer.parity.uses.backward import Backward, Flow, gradients_of, run_backward
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.module_gradients import judge_module
from clean_transformer.parity.uses.rows import elementwise
from clean_transformer.parity.uses.table import Use, uses
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.training.loss import cross_entropy

# The gradients of W_U and W_E are judged only for the tokens of the texts, and for OTHERS random
# tokens.
OTHERS = 32

Rows = list[Isolated | Check]
# The judgments of a part, and a function that computes its gradients on the device once more.
Judged = tuple[Rows, Callable[[], Any]]


def judge_training(judge: Judge, *, locates: bool) -> UseResult:
    """Check a backward pass and a step of AdamW.

    The result has rows for the loss, for the gradients of each checked part of the model, and for
    AdamW. If `locates` is True and a part does not pass, also search for the first wrong operation.
    If an exception is raised, the last row describes it.
    """
    use = replace(uses(judge.model.cfg)[0], name="training", means="training")
    parts: list[Judged] = []
    attempts = Attempts()
    with warnings.catch_warnings():
        # Optimized modules run their normal `forward` when gradients are enabled.
        warnings.simplefilter("ignore", NotOptimized)
        attempts.run(use.case, lambda: parts.extend(_judged_parts(judge, use)), None)
        rows = [row for some, _ in parts for row in some]
        bad = [again for some, again in parts if worst(row.verdict for row in some).is_bad]
        located = None
        if bad and locates:
            name = f"the search for the first wrong operation, {use.case}"
            located = attempts.run(name, lambda: _locate(bad, use.case), None)
    return UseResult(use, (*rows, *attempts.failed), located=located)


def _judged_parts(judge: Judge, use: Use) -> Iterator[Judged]:
    model = judge.model
    tokens = use.calls(model.cfg)[0].to(model.device)
    targets = tokens.roll(-1, dims=1)
    # All blocks run the same operations in the same shapes, so one block is judged, to save time.
    layer = int(torch.randint(len(model.blocks), (1,), generator=judge.generator))
    drawn = torch.randint(model.cfg.d_vocab, (OTHERS,), generator=judge.generator)
    ids = torch.unique(torch.cat([tokens.flatten().cpu(), drawn]))
    some = ids.to(model.device)

    def kept(name: str) -> Any:
        if name.startswith("blocks.") and not name.startswith(f"blocks.{layer}."):
            return None
        return {"embed.W_E": some, "unembed.W_U": (slice(None), some)}.get(name, slice(None))

    backward = run_backward(model, tokens, targets, kept)
    yield from TrainingJudge(judge, use, tokens, targets, ids, backward).parts(layer)


def _locate(bad: list[Callable[[], Any]], case: str) -> Located | None:
    """Return the first wrong operation that the functions in `bad` call, or None."""
    with torch.enable_grad():
        findings = (check_operations(again).finding for again in bad)
        finding = next((each for each in findings if each is not None), None)
    return in_words(finding, case) if finding else None


@dataclass(frozen=True)
class TrainingJudge:
    """Checks the loss, the gradients and a step of AdamW after a backward pass.

    `tokens` [batch pos] are the texts, on the device. `targets` [batch pos] has the token that the
    model must predict at each position. `ids` has the token ids for which the gradients of W_E and
    W_U are checked.
    """

    judge: Judge
    use: Use
    tokens: Tensor
    targets: Tensor
    ids: Tensor
    backward: Backward

    @property
    def u(self) -> float:
        """The unit roundoff of the dtype in which the device multiplies matrices."""
        return UNIT_ROUNDOFF[self.judge.products or self.judge.exact.dtype]

    def parts(self, layer: int) -> Iterator[Judged]:
        """Check the loss and the parts of the model, in the order of the backward pass, then AdamW.

        Yields the results of each part, and a function that computes the gradients of the part
        again. Only one block is checked: the block with the index `layer`.
        """
        model, backward = self.judge.model, self.backward
        connected: Rows = [
            _none("parameters without a gradient", backward.missing),
            _none("gradients lost or changed between parts", backward.cut),
        ]
        yield connected, lambda: None
        if "unembed" in backward.flows:
            flow = backward.flows["unembed"]
            theirs = self._torch_loss(flow)
            yield self._rows(self._losses, flow, *theirs), partial(self._losses_again, flow)
            again = partial(gradients_of, model.unembed, flow.given, flow.of_output)
            yield self._rows(self._unembedding, flow), again
        for name in ("ln_final", f"blocks.{layer}"):
            if name in backward.flows:
                flow, part = backward.flows[name], model.get_submodule(name)
                again = partial(gradients_of, part, flow.given, flow.of_output)
                yield self._rows(self._module, flow, name), again
        if "blocks.0" in backward.flows:
            g = backward.flows["blocks.0"].of_given
            yield self._rows(self._embeddings, g), partial(self._embeddings_again, g)
        yield from judge_adamw(
            self.use,
            [
                (model.get_parameter(name), gradient)
                for name, gradient in backward.gradients.items()
                if name.startswith("blocks.")
            ],
        )

    def _rows(self, judged: Callable[..., Rows], *given: Any) -> Rows:
        with trusted(), torch.no_grad():
            return judged(*given)

    def _element(
        self, name: str, got: Tensor, exact: Tensor, scale: Tensor, *limits: Any
    ) -> Isolated:
        return elementwise(name, self.use, got.cpu(), exact, scale, *limits)[0]

    def _unembedding(self, flow: Flow) -> Rows:
        """Check the gradients of the unembedding's parameters and of its input."""
        exact, g = self.judge.exact, flow.of_output.flatten(0, 1).cpu().double()

        def of_input(size: Size) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for tokens in exact.vocabulary():
                W_U, _ = exact.unembedding(tokens)
                total = total + size(g[:, tokens]) @ size(W_U).T
            return total

        wanted = of_input(lambda each: each)
        scale = sum_scale(wanted, of_input, self.u)
        got, name = flow.of_given.flatten(0, 1), "gradient of the input of unembed"
        rows: Rows = [self._element(name, got, wanted, scale, SUM, g.shape[-1], self.u)]
        wanted = g.sum(dim=0)
        scale = sum_scale(wanted, lambda size: size(g).sum(dim=0), self.u)
        rows += self._parameter("unembed.b_U", wanted, scale)
        if not exact.is_tied:
            rows += self._parameter("unembed.W_U", *self._of_W_U(flow))
        return rows

    def _losses(self, flow: Flow, theirs: Tensor, of_theirs: Tensor) -> Rows:
        """Check our cross entropy, PyTorch's cross entropy, and the gradients of both.

        The exact gradient with respect to the logits z is softmax(z) − onehot(target). `theirs` is
        PyTorch's loss on the device, and `of_theirs` is its gradient with respect to z.
        """
        z, targets = flow.output.flatten(0, 1).cpu().double(), self.targets.flatten().cpu()
        n_tokens, texts = z.shape[-1], torch.arange(len(z))
        log_sums, chosen = z.logsumexp(dim=-1), z[texts, targets]
        loss, loss_scale = (log_sums - chosen).mean(), (1 + log_sums.abs() + chosen.abs()).mean()
        exact = z.softmax(dim=-1)
        # The device subtracts log Σ exp z, and the rounding error of this number counts, too.
        scale = softmax_scale(exact, z, -1) + exact * log_sums[:, None].abs()
        exact[texts, targets] -= 1
        scale[texts, targets] += 1
        rows: Rows = []
        for name, value, gradient in (
            ("cross entropy", self.backward.loss, flow.of_output),
            ("PyTorch's cross entropy", theirs, of_theirs),
        ):
            rows.append(self._element(name, value, loss, loss_scale, SOFTMAX, n_tokens))
            got, title = gradient.flatten(0, 1), f"gradient of {name}"
            rows.append(self._element(title, got, exact, scale, SOFTMAX, n_tokens))
        return rows

    def _torch_loss(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """Return PyTorch's mean loss on the device, and the gradient of the sum of losses."""
        with torch.enable_grad(), torch.autocast(self.tokens.device.type, enabled=False):
            z = flow.output.detach().requires_grad_()
            loss = nn.functional.cross_entropy(z.flatten(0, 1), self.targets.flatten())
            (gradient,) = torch.autograd.grad(loss, z, torch.full_like(loss, self.targets.numel()))
        return loss.detach(), gradient

    def _losses_again(self, flow: Flow) -> None:
        targets = self.targets.flatten()
        gradients_of(lambda z: cross_entropy(z.flatten(0, 1), targets), flow.output)
        self._torch_loss(flow)

    def _of_W_U(self, flow: Flow) -> tuple[Tensor, Tensor]:
        """Return the exact gradient of the columns `self.ids` of W_U, and its G (see `sum_scale`).

        The allowed error of each element is proportional to its G.
        """
        x, g = (each.flatten(0, 1).cpu().double() for each in (flow.given, flow.of_output))
        g = g[:, self.ids]
        exact = x.T @ g
        return exact, sum_scale(exact, lambda size: size(x).T @ size(g), self.u)

    def _embeddings(self, of_residual: Tensor) -> Rows:
        """Check the gradient of W_pos, and that of W_E for the texts' tokens and random tokens."""
        g = of_residual.cpu().double()
        W_pos = self.judge.exact.weight("pos_embed.W_pos")

        def of_position(size: Size) -> Tensor:
            summed = torch.zeros_like(W_pos)
            summed[: g.shape[1]] = size(g).sum(dim=0)
            return summed

        exact = of_position(lambda each: each)
        scale = sum_scale(exact, of_position, self.u)
        rows = self._parameter("pos_embed.W_pos", exact, scale)
        texts = self.tokens.flatten().cpu()

        def of_token(size: Size) -> Tensor:
            is_token = (texts == self.ids[:, None]).double()
            return is_token @ size(g.flatten(0, 1))

        exact = of_token(lambda each: each)
        scale = sum_scale(exact, of_token, self.u)
        if self.judge.exact.is_tied:
            of_W_U, size = self._of_W_U(self.backward.flows["unembed"])
            exact, scale = exact + of_W_U.T, scale + size.T
        return rows + self._parameter("embed.W_E", exact, scale)

    def _embeddings_again(self, of_residual: Tensor) -> None:
        model = self.judge.model
        with torch.enable_grad():
            embedded = model.embed(self.tokens) + model.pos_embed(self.tokens)
            torch.autograd.grad(embedded, [model.embed.W_E, model.pos_embed.W_pos], of_residual)

    def _parameter(self, name: str, exact: Tensor, scale: Tensor) -> Rows:
        """Check the elements of the gradient of the parameter `name` that `self.backward` has.

        `exact` has the exact values of these elements. The allowed error of each element is
        proportional to its value in `scale`.
        """
        if name not in self.backward.gradients:
            return []
        n_terms, got = 2 * self.tokens.numel(), self.backward.gradients[name]
        return [self._element(f"gradient of {name}", got, exact, scale, SUM, n_terms, self.u)]

    def _module(self, flow: Flow, name: str) -> Rows:
        gradients, products = self.backward.gradients, self.judge.products
        module, dtype = self.judge.exact.module(name), self.judge.exact.dtype
        return judge_module(name, self.use, flow, gradients, module, dtype, products)


def _none(name: str, bad: list[str]) -> Check:
    verdict = Verdict.WRONG if bad else Verdict.PASS
    return Check(name, verdict, float(len(bad)), 0.0, ", ".join(bad[:3]) + ", …" * bool(bad[3:]))
