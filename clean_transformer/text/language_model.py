"""`LanguageModel`: gives a model a tokenizer, so that you can pass texts instead of token ids."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule
from clean_transformer.kv_cache import KVCache, LeftPadding
from clean_transformer.support.knows_left_out import KnowsLeftOut
from clean_transformer.support.left_out import NoValue
from clean_transformer.support.numerics import at_least_float32
from clean_transformer.support.validation import refuse_other
from clean_transformer.text.token_ids import are_known, token_ids
from clean_transformer.text.tokenizer import PaddingSide, Texts, Tokenizer, Tokens
from clean_transformer.weights.stacked import StackedWeights

Logits = Float[Tensor, "batch pos d_vocab"]
Loss = Float[Tensor, ""] | Float[Tensor, "batch later_pos"]


class LogitsAndLoss(NamedTuple):
    """The result of a model that is called with `return_type="both"`."""

    logits: Logits
    loss: Loss


class LanguageModel(HookedModule, StackedWeights, KnowsLeftOut):
    """A base class of `DemoTransformer`: adds a tokenizer and methods that TransformerLens has.

    `source` is the folder, file or hub id from which `DemoTransformer.from_pretrained` loaded the
    model, or None for a model that was made in another way. Some attributes of TransformerLens do
    not exist here (see `LEFT_OUT`). Reading one of them raises an `AttributeError` that says what
    to use instead.
    """

    source: str | Path | None = None

    @property
    def cfg(self) -> Config:
        """The model's architecture, and the device and the dtype of its weights."""
        weight = next(self.parameters())
        vars(self._cfg).update(device=weight.device, dtype=weight.dtype)
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: Config) -> None:
        # Make a copy, because another model with another device may use the same `cfg`.
        self._cfg = replace(cfg)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.parameters()).device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `source`. The first read of this attribute loads the tokenizer.

        You can assign another tokenizer to this attribute. Raises `NoValue`, which is both a
        `ValueError` and an `AttributeError`, if `source` is None and no tokenizer was assigned.
        """
        if self.source is None:
            raise NoValue(
                "this model came without a tokenizer; give it token ids, or assign "
                "model.tokenizer = Tokenizer.from_pretrained(a folder or hub id)"
            )
        return Tokenizer.from_pretrained(self.source)

    def __call__(
        self,
        tokens: Any,
        *rest: Any,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        **arguments: Any,
    ) -> Any:
        """Run the model on a text, on several texts, or on token ids [batch pos].

        Token ids are a tensor, or a list with one list of ids per input, all of the same length.
        `prepend_bos` and `padding_side` say how to tokenize texts (see `Tokenizer.to_tokens`). The
        padding on the left of texts is hidden from attention. If the tokenizer's `padding_side` is
        "left", the same holds for token ids without a `kv_cache` (see `padding_mask`). `rest` and
        `arguments` are the other arguments of `forward`.

        `return_type` chooses the result: the logits, the loss (see `loss_fn`), both
        (`LogitsAndLoss`), or None. The loss ignores the padding of texts. If `loss_per_token` is
        True, the loss is not averaged (see the argument `per_token` of `loss_fn`). If
        `stop_at_layer` is given, the result is the residual stream.

        Raises `TypeError` or `ValueError`, before the model runs, for arguments that contradict
        each other, and for TransformerLens's arguments in `LEFT_OUT`.
        """
        self._refuse_other(type(self).__name__, arguments)
        cache = rest[0] if rest else arguments.get("kv_cache")
        if not isinstance(cache, (KVCache, NoneType)):
            raise TypeError(
                f"kv_cache is a {type(cache).__name__}; give a KVCache, and the other arguments by "
                "their names, such as return_type='loss'"
            )
        stops = arguments.get("stop_at_layer") is not None
        refuse_other("return_type", return_type, "logits", "loss", "both", None)
        partly = stops or arguments.get("last_only") or not arguments.get("unembed", True)
        if return_type in ("loss", "both") and partly:
            raise ValueError("the loss needs the logits of all positions of the whole model")
        if return_type not in ("loss", "both") and loss_per_token:
            raise ValueError("loss_per_token needs return_type='loss' or 'both'")
        mask = None
        if is_text(tokens):
            if padding_side is None:
                padding_side = self.tokenizer.padding_side
            tokens, padded = self.tokenizer.to_padded(tokens, prepend_bos, padding_side)
            tokens = tokens.to(self.device)
            mask = None if padded is None else padded.to(self.device)
            if mask is not None and padding_side == "left" and cache is not None:
                raise TypeError("left-padded texts and a kv_cache contradict; pass token ids")
        else:
            if prepend_bos is not None or padding_side is not None:
                raise TypeError("prepend_bos and padding_side are for texts, not for token ids")
            if not isinstance(tokens, Tensor):
                tokens = token_ids(tokens).to(self.device)
            if cache is None:
                padding_side, mask = "left", self.padding_mask(tokens)
        if mask is not None and padding_side == "left":
            rest, arguments["kv_cache"] = rest[1:], LeftPadding(self.cfg.n_layers, mask)
        if return_type is None:
            arguments["unembed"] = False  # nobody gets the logits
        output = super().__call__(tokens, *rest, **arguments)
        if return_type == "logits" or stops:
            return output
        if return_type is None:
            return None
        loss = self.loss_fn(output, tokens, mask, loss_per_token)
        return loss if return_type == "loss" else LogitsAndLoss(output, loss)

    def loss_fn(
        self,
        logits: Logits,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Loss:
        """Return the mean cross entropy of the next-token predictions, in nats.

        The cross entropy of a token is −log p(token | earlier tokens). The first token of each
        input is never predicted. If `per_token` is True, the result is the cross entropy of each
        predicted token [batch pos−1] instead of the mean.

        `attention_mask` is 1 for tokens and 0 for padding. If the mask is 0 for a token or for the
        token before it, the cross entropy of this token is 0 and does not count in the mean. Raises
        `ValueError` if no token counts, and for `tokens` or a mask of another shape than the
        logits.
        """
        for given in (tokens, attention_mask):
            if given is not None and given.shape != logits.shape[:2]:
                raise ValueError(
                    f"logits of {[*logits.shape[:2]]} [batch pos], but tokens or a mask of "
                    f"{[*given.shape]}; give the tokens that the model read"
                )
        log_probs = at_least_float32(logits[:, :-1]).log_softmax(dim=-1)
        losses = -log_probs.gather(-1, tokens[:, 1:, None].long())[..., 0]
        is_token = torch.ones_like(tokens) if attention_mask is None else attention_mask
        counts = (is_token[:, :-1] * is_token[:, 1:]).bool()
        if not counts.any():
            raise ValueError("the loss needs a token after another token")
        losses = losses.masked_fill(~counts, 0)
        return losses if per_token else losses.sum() / counts.sum()

    def padding_mask(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
        """Return 0 for padding on the left of `tokens`, and 1 for other tokens.

        Padding is the tokenizer's `pad_token_id` at the start of an input. If this is also the
        token that begins a text, the last one of them is not padding, as in TransformerLens. The
        result is None if there is no padding, and unless the tokenizer was used or assigned, and
        its `padding_side` is "left". A graph of `torch.export` or `torch.jit.trace` hides no
        padding.
        """
        tokenizer: Any = vars(self).get("tokenizer")
        if getattr(tokenizer, "padding_side", None) != "left" or tokens.ndim != 2:
            return None
        if torch.jit.is_tracing() or not are_known(tokens):  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            return None
        padding = (tokens == tokenizer.pad_token_id).cumprod(dim=1)
        if tokenizer.pad_token_id == tokenizer.bos_token_id:
            padding = torch.cat([padding[:, 1:], torch.zeros_like(padding[:, :1])], dim=1)
        padding[:, -1:] = 0  # an input of padding alone
        return 1 - padding if padding.any() else None

    def tl_parameters(self) -> dict[str, Tensor]:
        """Return a dictionary of all parameters and "unembed.W_U", by their names.

        TransformerLens has this method, and its `SVDInterpreter` calls this method. "unembed.W_U"
        is included even if it is the transpose of "embed.W_E".
        """
        return {**dict(self.named_parameters()), "unembed.W_U": self.W_U}

    def to_tokens(
        self, text: Texts, prepend_bos: bool | None = None, padding_side: PaddingSide = None
    ) -> Int[Tensor, "batch pos"]:
        """Return the token ids of one text or several texts, on the model's device.

        See `Tokenizer.to_tokens`.
        """
        return self.tokenizer.to_tokens(text, prepend_bos, padding_side).to(self.device)

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None) -> Any:
        """Return each token of one text or several texts as a string.

        See `Tokenizer.to_str_tokens`.
        """
        return self.tokenizer.to_str_tokens(text, prepend_bos)

    def to_string(self, tokens: Tokens) -> str | list[str]:
        """Return the text of tokens [pos], or a list of texts for tokens [batch pos].

        See `Tokenizer.to_string`.
        """
        return self.tokenizer.to_string(tokens)

    def to_single_token(self, text: str) -> int:
        """Return the token id of `text`. Raises `ValueError` if `text` is not exactly one token."""
        [ids] = self.tokenizer.to_rows(text, prepend_bos=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens: {self.to_str_tokens(text, False)}")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """Return the text of one token id."""
        return self.tokenizer.to_str_tokens([token])[0]

    def get_token_position(
        self,
        single_token: str | int | Int[Tensor, ""],
        input: str | Int[Tensor, "pos"] | Int[Tensor, "1 pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Return the first or the last position of `single_token` in the text or tokens `input`.

        If `input` is a text and `prepend_bos` is not False, <|endoftext|> is at position 0. Raises
        `ValueError` if the token is not in the text, for tokens of several texts, and for an
        unknown `mode`. Raises `TypeError` for `prepend_bos` with tokens.
        """
        refuse_other("mode", mode, "first", "last")
        if prepend_bos is not None and not isinstance(input, str):
            raise TypeError("prepend_bos is for texts, not for token ids")
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else token_ids(input)
        if tokens.ndim > 1 and len(tokens) != 1:
            raise ValueError(f"tokens of shape {[*tokens.shape]} are several texts; give one")
        token = single_token
        if isinstance(token, str):
            token = self.to_single_token(token)
        found = (tokens.flatten() == token).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"{single_token!r} is not in the text")
        return found[0] if mode == "first" else found[-1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return the direction in the residual stream that raises the logit of each token.

        The direction of a token is its column of W_U. A string must be exactly one token. For a
        tensor with only one element, the result has the shape [d_model], as in TransformerLens.
        Raises `TypeError` for ids that are not integers, and `ValueError` for ids outside the
        vocabulary.
        """
        ids = token_ids(self.to_single_token(tokens) if isinstance(tokens, str) else tokens)
        if ((ids < 0) | (ids >= self.cfg.d_vocab)).any():
            raise ValueError(
                f"there is no token {ids.tolist()}; ids run from 0 to {self.cfg.d_vocab - 1}"
            )
        return self.W_U.T[int(ids) if ids.numel() == 1 else ids.long()]


def is_text(value: object) -> TypeGuard[Texts]:
    """Whether `value` is one text, or a list or tuple that begins with a text."""
    if isinstance(value, (list, tuple)):
        return isinstance(next(iter(value), None), str)
    return isinstance(value, str)
