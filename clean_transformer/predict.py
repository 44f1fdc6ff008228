"""What a model expects next, how it comes to expect it layer by layer, and which part says so."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.layer_norm import LayerNorm

Text = str | Int[Tensor, "pos"] | Int[Tensor, "1 pos"]


@dataclass(frozen=True)
class TokenScore:
    """A token as the next one."""

    id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model expects after one text, and how well it expected the text itself.

    `top` and `bottom` are the likeliest and the least likely next tokens, the most extreme first.
    `token_probabilities` and `losses` (−log probability, in nats) are those of each actual token
    but the first, given the ones before it. On the CPU.
    """

    top: list[TokenScore]
    bottom: list[TokenScore]
    token_probabilities: Float[Tensor, "later_pos"]
    losses: Float[Tensor, "later_pos"]


@torch.no_grad()
def predict(model: DemoTransformer, text: Text, top: int = 5) -> Prediction:
    """The `top` likeliest and least likely tokens after one text, and its own probabilities.

    Raises `ValueError` for several texts or for a `top` that is not from 1 to d_vocab.
    """
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top is {top}; it must be from 1 to {model.cfg.d_vocab}, the vocabulary")
    tokens = single(model, text)
    logits = at_least_float32(model(tokens)[0])
    log_probs = logits.log_softmax(dim=-1)

    def scores(ids: Int[Tensor, "top"]) -> list[TokenScore]:
        values = zip(ids, logits[-1, ids], log_probs[-1, ids].exp(), strict=True)
        return [TokenScore(int(id_), float(logit), float(p)) for id_, logit, p in values]

    actual = log_probs[:-1].gather(-1, tokens[0, 1:, None].long()).squeeze(-1).cpu()
    return Prediction(
        top=scores(logits[-1].topk(top).indices),
        bottom=scores(logits[-1].topk(top, largest=False).indices),
        token_probabilities=actual.exp(),
        losses=-actual,
    )


@torch.no_grad()
def logit_lens(
    model: DemoTransformer, text: Text
) -> tuple[Float[Tensor, "component pos d_vocab"], list[str]]:
    """Log-probabilities of the next token if the model ended early, and labels.

    The residual stream before each block, and after the last, goes through ln_final and the
    unembedding (nostalgebraist 2020, "interpreting GPT: the logit lens"). Labels are those of
    `ActivationCache.accumulated_resid`: "0_pre", "1_pre", …, "final_post", the model's own answer.
    """
    tokens = single(model, text)
    _, cache = model.run_with_cache(
        tokens,
        names=lambda name: name.endswith(("resid_pre", "resid_post")),
        remove_batch_dim=True,
    )
    streams, labels = cache.accumulated_resid()
    return at_least_float32(model.unembed(model.ln_final(streams))).log_softmax(dim=-1), labels


@dataclass(frozen=True)
class LogitAttribution:
    """What each part of a model adds to the logit of one token over that of another.

    `rest` has the embeddings and the biases that belong to no head, by parameter name. All parts
    together are the `difference` of the two logits, but for rounding.
    """

    difference: float
    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, "layer"]
    rest: dict[str, float]


@torch.no_grad()
def logit_attribution(
    model: DemoTransformer, text: Text, token: int, other: int
) -> LogitAttribution:
    """Each part's contribution to logit[token] − logit[other] after the text.

    The residual stream is the sum of the parts, and all after it is affine once ln_final's scale
    is held at what it was (Elhage et al. 2021, "direct logit attribution"). Raises `ValueError`
    for ids outside the vocabulary.
    """
    for id_ in (token, other):
        if not 0 <= id_ < model.cfg.d_vocab:
            raise ValueError(f"there is no token {id_}; ids run from 0 to {model.cfg.d_vocab - 1}")
    parts = ("hook_embed", "hook_pos_embed", "hook_z", "hook_mlp_out", "ln_final.hook_scale")
    logits, cache = model.run_with_cache(
        single(model, text), names=lambda name: name.endswith(parts)
    )
    last = {name: value[0, -1] for name, value in cache.items()}

    unembed, ln_final = model.unembed, model.ln_final
    reads = at_least_float32(unembed.W_U[:, token]) - at_least_float32(unembed.W_U[:, other])
    rest = {"unembed.b_U": unembed.b_U[token] - unembed.b_U[other]}
    direction = reads
    if isinstance(ln_final, LayerNorm):
        direction = at_least_float32(ln_final.w) * reads
        rest["ln_final.b"] = at_least_float32(ln_final.b) @ reads
    # To centre what reads the stream is to centre the stream.
    direction = (direction - direction.mean()) / last["ln_final.hook_scale"]

    def contribution(part: Float[Tensor, "*part d_model"]) -> Float[Tensor, "*part"]:
        return at_least_float32(part) @ direction

    heads, mlps = [], []
    for layer in range(len(model.blocks)):
        z, W_O = (
            last[f"blocks.{layer}.attn.hook_z"],
            model.get_parameter(f"blocks.{layer}.attn.W_O"),
        )
        result = einsum(z, W_O, "head d_head, head d_head d_model -> head d_model")
        heads.append(contribution(result))
        mlps.append(contribution(last[f"blocks.{layer}.hook_mlp_out"]))
        b_O = f"blocks.{layer}.attn.b_O"
        rest[b_O] = contribution(model.get_parameter(b_O))
    rest["embed.W_E"] = contribution(last["hook_embed"])
    rest["pos_embed.W_pos"] = contribution(last["hook_pos_embed"])
    return LogitAttribution(
        difference=float(logits[0, -1, token] - logits[0, -1, other]),
        heads=torch.stack(heads).cpu(),
        mlps=torch.stack(mlps).cpu(),
        rest={name: float(part) for name, part in rest.items()},
    )


def single(model: DemoTransformer, text: Text) -> Int[Tensor, "1 pos"]:
    """The tokens of one text, on the model's device. Raises `ValueError` for several texts."""
    tokens = model.to_tokens(text) if isinstance(text, str) else text.to(model.device)
    if tokens.ndim == 1:
        return tokens[None]
    if len(tokens) != 1:
        raise ValueError(f"this takes one text, not {len(tokens)}; go through them singly")
    return tokens


def at_least_float32(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half precision as float32: a softmax over 50,257 tokens needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
