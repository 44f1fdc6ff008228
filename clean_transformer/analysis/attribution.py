"""Direct logit attribution: computes what each head, MLP and bias adds to a logit difference."""

import operator
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from clean_transformer import modules
from clean_transformer.analysis.prediction import Text, single
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.contract import kind, parts
from clean_transformer.modules.layer_norm import LayerNorm
from clean_transformer.support.numerics import at_least_float32


@dataclass(frozen=True)
class LogitAttribution:
    """How much each head, MLP, embedding and bias of a model adds to logit[token] − logit[other].

    `difference` is logit[token] − logit[other]. `heads` has the contribution of each head to
    `difference`, and `mlps` has the contribution of each MLP with its biases. `rest` has the
    contributions of the embeddings and of all other biases, by parameter name. All entries of
    `heads`, `mlps` and `rest` sum to `difference`, up to rounding.
    """

    difference: float
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, "layer"]
    rest: dict[str, float]


@torch.no_grad()
def logit_attribution(
    model: DemoTransformer, text: Text, token: int | str, other: int | str
) -> LogitAttribution:
    """Return how much each head, MLP, embedding and bias adds to logit[token] − logit[other].

    `token` and `other` are token ids, or texts of exactly one token, such as " the". The logits are
    the logits at the last position of `text`. The final residual stream is a sum: each embedding,
    head, MLP and bias adds one vector. This function treats the number by which ln_final divides
    the residual stream as a constant, with the value that the number has for this text. The logits
    are then an affine function of the sum, so each vector has a well-defined contribution (Elhage
    et al. 2021, "A Mathematical Framework for Transformer Circuits"). Raises `ValueError` for ids
    outside the vocabulary, for a `token` of several tokens, and for several texts. Also raises
    `ValueError` if the contributions do not sum to the difference up to rounding, for example
    because a swapped attention scales its output.
    """
    token, other = (
        model.to_single_token(each) if isinstance(each, str) else operator.index(each)
        for each in (token, other)
    )
    for id_ in (token, other):
        if not 0 <= id_ < model.cfg.d_vocab:
            raise ValueError(f"there is no token {id_}; ids run from 0 to {model.cfg.d_vocab - 1}")
    points = ("hook_embed", "hook_pos_embed", "hook_z", "hook_mlp_out", "ln_final.hook_scale")
    logits, cache = model.run_with_cache(
        single(model, text), names_filter=lambda name: name.endswith(points)
    )

    def last(name: str) -> Tensor:
        return cache[name][0, -1]

    unembed, ln_final = model.unembed, model.ln_final
    columns = at_least_float32(unembed.W_U[:, [token, other]])
    reads = columns[:, 0] - columns[:, 1]
    rest = {"unembed.b_U": unembed.b_U[token] - unembed.b_U[other]}
    direction, longest = reads, columns.norm(dim=0).sum()
    biases = [unembed.b_U[token], unembed.b_U[other]]
    if isinstance(ln_final, LayerNorm):
        gain, bias = at_least_float32(ln_final.w), at_least_float32(ln_final.b)
        direction = gain * reads
        rest["ln_final.b"] = bias @ reads
        biases.append(bias.norm() * longest)
        longest = longest * gain.abs().max()
    # ln_final centers the residual stream. We center `direction` instead of the residual stream,
    # because the dot product of the two vectors is the same.
    longest = longest / last("ln_final.hook_scale")
    direction = (direction - direction.mean()) / last("ln_final.hook_scale")

    def contribution(part: Float[Tensor, "*part d_model"]) -> Float[Tensor, "*part"]:
        part = at_least_float32(part)
        lengths.append(part.norm(dim=-1).sum())
        return part @ direction

    lengths: list[Tensor] = []
    heads, mlps = [], []
    for layer in range(len(model.blocks)):
        z = last(f"blocks.{layer}.attn.hook_z")
        W_O = model.get_parameter(f"blocks.{layer}.attn.W_O")
        result = einsum(z, W_O, "head d_head, head d_head d_model -> head d_model")
        heads.append(contribution(result))
        mlps.append(contribution(last(f"blocks.{layer}.hook_mlp_out")))
        b_O = f"blocks.{layer}.attn.b_O"
        rest[b_O] = contribution(model.get_parameter(b_O))
    rest["embed.W_E"] = contribution(last("hook_embed"))
    rest["pos_embed.W_pos"] = contribution(last("hook_pos_embed"))

    # The model rounds the residual stream after each of 2 additions per block, and a few vectors
    # after them. A product of two vectors of length n has about √n roundings. Each rounding of a
    # vector changes it by at most eps, relative to its length.
    roundings = 2 * len(model.blocks) + 4 + model.cfg.d_model**0.5
    size = sum(lengths) * longest + sum(abs(part) for part in biases)
    allowed = torch.finfo(logits.dtype).eps * roundings * size
    found = LogitAttribution(
        difference=float(logits[0, -1, token] - logits[0, -1, other]),
        heads=torch.stack(heads).cpu(),
        mlps=torch.stack(mlps).cpu(),
        rest={name: float(part) for name, part in rest.items()},
    )
    total = float(found.heads.sum() + found.mlps.sum()) + sum(found.rest.values())
    if not abs(total - found.difference) <= float(allowed):  # NaN is refused, too
        others = [
            f"{path} is a {type(module).__name__}"
            for path, module in model.named_modules()
            if path in {*parts(model.cfg.n_layers)}
            and kind(path) != "mlp"
            and type(module) not in vars(modules).values()
        ]
        raise ValueError(
            f"the contributions sum to {total:.4g}, and the logits differ by "
            f"{found.difference:.4g}, because the model does not add up like GPT-2: "
            + (", ".join(others) or "a hook or a patched method changes it")
        )
    return found
