"""Wrong GPT-2s: mistakes that people make in writing one, planted in our classes.

Each fault replaces methods of classes, or a function of a module, for as long as it is planted. So
it acts on every model, made before or after, on the explicit path and on the fused one; no stored
weight changes, and no other implementation of GPT-2 notices.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.func import functional_call

from clean_transformer.kv_cache import LayerCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules import attention
from clean_transformer.modules.attention import Attention
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.unembed import TiedUnembed, Unembed

Edit = Callable[[Tensor], Tensor]


# An owner, the name of its attribute, and what makes the faulty one of the right one.
Change = tuple[Any, str, Callable[[Any], Any]]


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class SemanticFault:
    """A model that computes another function.

    `first` is the earliest activation that differs, as a pattern for `fnmatch`: a hook point, or
    the output of a LayerNorm, which has no hook point. One that is never computed differs too.
    `in_logits` is False where the mistake cancels, and the logits differ by rounding at most.
    """

    name: str
    description: str
    first: str
    changes: Changes
    in_logits: bool = True

    def plant(self) -> AbstractContextManager[Any]:
        """Within it, the fault."""
        return planted(self.changes)


@contextmanager
def planted(changes: Changes) -> Iterator[None]:
    """Within it, the changed attributes; after it, the right ones."""
    with ExitStack() as stack:
        for owner, attribute, change in changes:
            faulty = change(getattr(owner, attribute))
            stack.enter_context(replaced(owner, attribute, faulty))
        yield


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Within it, `owner` has another value for an attribute of its own."""
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def weight_changed(
    relative: float, parameter: str = "blocks.0.mlp.W_in", index: tuple[int, ...] = (0, 0)
) -> AbstractContextManager[Any]:
    """Within it, every model computes with one weight element made 1 + `relative` times as large.

    For measuring how small a change is still found.
    """
    return planted(
        edited(DemoTransformer, {parameter: element(lambda w: w * (1 + relative), *index)})
    )


class _Bound(nn.Module):
    """A module that runs another one's original `forward`, so that parameters can be replaced."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returned before it was faulty."""
        return self.original(self.module, *args, **kwargs)


def parameters(owner: type, edit: Callable[[Any], dict[str, Tensor]]) -> Changes:
    """Run with the parameters, by name, that `edit` makes from the module."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = {f"module.{name}": value for name, value in edit(self).items()}
            return functional_call(_Bound(self, forward), values, args, kwargs)

        return faulty

    return ((owner, "forward", change),)


def edited(owner: type, edits: dict[str, Edit]) -> Changes:
    """Run with some parameters edited."""
    return parameters(
        owner, lambda module: {n: edit(module.get_parameter(n)) for n, edit in edits.items()}
    )


def mistaken(owner: type, others: dict[str, str]) -> Changes:
    """Run with some parameters taken for others."""
    return parameters(
        owner, lambda module: {name: module.get_parameter(n) for name, n in others.items()}
    )


def arguments(owner: type, edit: Edit) -> Changes:
    """Run on another first argument."""
    return (
        (owner, "forward", lambda forward: lambda self, x, *rest: forward(self, edit(x), *rest)),
    )


def result(owner: type, edit: Edit) -> Changes:
    """Return something else."""

    def change(forward: Any) -> Any:
        return lambda *args, **kwargs: edit(forward(*args, **kwargs))

    return ((owner, "forward", change),)


def child(owner: type, name: str, substitute: Callable[[Any], nn.Module]) -> Changes:
    """Run with another submodule in the place of one."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self, name, substitute(getattr(self, name))):
                return forward(self, *args, **kwargs)

        return faulty

    return ((owner, "forward", change),)


def activation(function: Edit) -> Changes:
    """An MLP with another activation function."""

    def forward(self: Any, x: Tensor) -> Tensor:
        post = self.hook_post(function(self.hook_pre(x @ self.W_in + self.b_in)))
        return post @ self.W_out + self.b_out

    return ((MLP, "forward", lambda _: forward),)


def masked(
    hides: Callable[[Tensor, Tensor], Tensor] = lambda query, key: key > query,
    fill: float = -math.inf,
) -> Edit:
    """Fill the scores where `hides`, of the positions of query and key, says so."""

    def mask(scores: Tensor) -> Tensor:
        n_queries, n_keys = scores.shape[-2:]
        position = torch.arange(n_keys, device=scores.device)
        return scores.masked_fill(hides(position[n_keys - n_queries :, None], position), fill)

    return mask


CAUSAL = masked()


def unchanged(activation: Tensor) -> Tensor:
    """The same."""
    return activation


def mixing(
    scale: Callable[[int, int], float] = lambda n_heads, d_head: math.sqrt(d_head),
    mask: Edit = CAUSAL,
    normalize: Edit = lambda scores: scores.softmax(-1),
) -> Changes:
    """Attention with another scale, mask or softmax, on both of its paths."""

    def mix(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None = None,
        see_scores: Edit = unchanged,
        see_pattern: Edit = unchanged,
    ) -> Tensor:
        scores = einsum(q, k, "b query h d, b key h d -> b h query key") / scale(*q.shape[-2:])
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        pattern = see_pattern(normalize(see_scores(mask(scores))))
        return einsum(pattern, v, "b h query key, b key h d -> b query h d")

    def mix_explicitly(
        self: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        return mix(q, k, v, seen, self.hook_attn_scores, self.hook_pattern)

    return (
        (Attention, "mix_explicitly", lambda _: mix_explicitly),
        (attention, "mix_fused", lambda _: mix),
    )


def normalizing(
    root: Callable[[Tensor, float], Tensor] = lambda variance, eps: (variance + eps).sqrt(),
    center: Edit = lambda x: x - x.mean(-1, keepdim=True),
    spread: Edit = lambda centered: centered.square().mean(-1, keepdim=True),
) -> Changes:
    """LayerNorms with another root, centring or variance, with and without gain and bias."""

    def normalize(self: Any, residual: Tensor) -> Tensor:
        centered = center(residual if residual.dtype == torch.float64 else residual.float())
        scale = self.hook_scale(root(spread(centered), self.eps))
        return self.hook_normalized(centered / scale).to(residual.dtype)

    def forward(self: Any, residual: Tensor) -> Tensor:
        return self.normalize(residual) * self.w + self.b

    return (
        (LayerNormPre, "normalize", lambda _: normalize),
        (LayerNormPre, "forward", lambda _: normalize),
        (LayerNorm, "forward", lambda _: forward),
    )


def wired(
    mid: Callable[[Tensor, Tensor], Tensor] = torch.add,
    mlp_reads: Callable[[Tensor, Tensor], Tensor] = lambda resid_pre, resid_mid: resid_mid,
    post: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Changes:
    """Blocks whose residual stream runs otherwise."""

    def forward(self: Any, resid_pre: Tensor, kv_cache: LayerCache | None = None) -> Tensor:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(*self.attn_inputs(resid_pre), kv_cache=kv_cache))
        resid_mid = self.hook_resid_mid(mid(resid_pre, attn_out))
        mlp_in = self.hook_mlp_in(mlp_reads(resid_pre, resid_mid))
        return self.hook_resid_post(post(resid_mid, self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))))

    return ((TransformerBlock, "forward", lambda _: forward),)


def post_norm(self: Any, resid_pre: Tensor, kv_cache: LayerCache | None = None) -> Tensor:
    """A block that normalizes after each addition, as the first GPT did (Radford et al. 2018)."""
    resid_pre = self.hook_resid_pre(resid_pre)
    attn_out = self.hook_attn_out(self.attn(resid_pre, kv_cache=kv_cache))
    resid_mid = self.ln1(self.hook_resid_mid(resid_pre + attn_out))
    mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(resid_mid)))
    return self.hook_resid_post(self.ln2(resid_mid + mlp_out))


def unembedding(edit: Edit) -> Changes:
    """Logits from other weights W_U [d_model d_vocab], tied and untied."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.hook_out(self.hook_in(x) @ edit(self.W_U) + self.b_U)

    return tuple((owner, "forward", lambda _: forward) for owner in (Unembed, TiedUnembed))


def element(edit: Edit, *index: int) -> Edit:
    """Edit one element of a tensor."""

    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[index] = edit(weight[index])
        return changed

    return change


def next_float32(weight: Tensor) -> Tensor:
    """A change by one unit in the last place of float32, whatever the dtype."""
    single = weight.float()
    return weight + (torch.nextafter(single, torch.full_like(single, math.inf)) - single)


def tanh_gelu(cubic: float = 0.044715, root: float = math.sqrt(2 / math.pi)) -> Edit:
    """GELU's tanh form with other constants (Hendrycks and Gimpel 2016)."""
    return lambda x: 0.5 * x * (1 + torch.tanh(root * (x + cubic * x**3)))


def without(*names: str) -> dict[str, Edit]:
    """Those parameters zero."""
    return dict.fromkeys(names, torch.zeros_like)


def input_transposed(weight: Tensor) -> Tensor:
    """W_Q, W_K or W_V, transposed as one square matrix over all heads."""
    merged = rearrange(weight, "head d_model d_head -> d_model (head d_head)")
    return rearrange(merged.T, "d_model (head d_head) -> head d_model d_head", head=len(weight))


def output_transposed(weight: Tensor) -> Tensor:
    """W_O, transposed as one square matrix over all heads."""
    merged = rearrange(weight, "head d_head d_model -> (head d_head) d_model")
    return rearrange(merged.T, "(head d_head) d_model -> head d_head d_model", head=len(weight))


def reread(weight: Tensor) -> Tensor:
    """A matrix whose memory is read as the transposed matrix's, as between Conv1D and Linear."""
    return weight.T.reshape(weight.shape)


def interleaved(module: Any) -> dict[str, Tensor]:
    """Queries, keys and values split head by head, where GPT-2 splits them at the top."""
    fused = {kind: torch.cat([getattr(module, f"{kind}_{x}") for x in "QKV"]) for kind in "Wb"}
    return {f"{kind}_{x}": fused[kind][place::3] for kind in "Wb" for place, x in enumerate("QKV")}


def value_bias_folded(module: Any) -> dict[str, Tensor]:
    """The output bias with the value bias's share, which the values already carry."""
    share = einsum(module.b_V, module.W_O, "head d_head, head d_head d_model -> d_model")
    return {"b_O": module.b_O + share}


def noise_like(weight: Tensor) -> Tensor:
    """Fresh weights of the same deviation."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(weight) * weight.std()
