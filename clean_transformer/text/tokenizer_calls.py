"""`TransformersCalls`: what notebooks call of a tokenizer of transformers."""

from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any, Literal

import torch

from clean_transformer.support.validation import refuse_other

if TYPE_CHECKING:
    import tokenizers

# One text, or several texts.
Texts = str | list[str] | tuple[str, ...]


def pad(rows: list[list[int]], filler: int, side: str) -> list[list[int]]:
    """Return the rows, made equally long with the number `filler` on the side "left" or "right"."""
    width = max(map(len, rows), default=0)
    fillers = [[filler] * (width - len(row)) for row in rows]
    pairs = zip(rows, fillers, strict=True)
    return [more + row if side == "left" else row + more for row, more in pairs]


class Encoded(dict[str, Any]):
    """The result of `tokenizer(texts)`: the keys "input_ids" and "attention_mask"."""

    @property
    def input_ids(self) -> Any:
        """The token ids."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 for each token of a text, and 0 for padding."""
        return self["attention_mask"]


class TransformersCalls:
    """A base class of `Tokenizer`: methods and attributes with the names of transformers."""

    backend: "tokenizers.Tokenizer"
    bos_token_id: int
    eos_token_id: int
    d_vocab: int
    _pad_token_id: int
    _padding_side: Literal["left", "right"]
    __slots__ = ()  # so that assigning an attribute of transformers that is not here is an error

    def _encoded(self, text: Texts, *, add_special_tokens: bool) -> list[list[int]]:
        """Return a list of token ids for each text.

        If `add_special_tokens` is True, the files of the tokenizer say which tokens are put before
        and after each text. Raises the same errors as `Tokenizer.to_tokens`.
        """
        texts = [*text] if isinstance(text, (list, tuple)) else [text]
        for each in texts:
            if not isinstance(each, str):
                raise TypeError(f"to_tokens takes a text or a list of texts, not {shorten(each)}")
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ValueError(
                "a text contains a lone surrogate, which has no UTF-8; decode the text correctly"
            ) from None
        return [encoding.ids for encoding in encodings]

    def __call__(
        self, text: Texts, *, padding: bool = False, return_tensors: Literal["pt"] | None = None
    ) -> Encoded:
        """Return the token ids of one text or several texts, as in transformers.

        In contrast to `to_tokens`, a token is put before a text only if the files of the tokenizer
        say so. GPT-2's files do not. For one text, `input_ids` is a list of ids. For several texts,
        it is a list of such lists. If `padding` is True, the shorter texts are padded with
        `pad_token`, on `padding_side`. With `return_tensors="pt"`, the results are tensors
        [batch pos].

        Raises the same errors as `Tokenizer.to_tokens`. Raises `ValueError` for tensors of texts
        with different numbers of tokens, unless `padding` is True. Raises `ValueError` for a
        `padding` that is no bool, such as "max_length", and for an unknown `return_tensors`.
        """
        refuse_other("padding", padding, True, False)
        refuse_other("return_tensors", return_tensors, "pt", None)
        ids = self._encoded(text, add_special_tokens=True)
        masks = [[1] * len(row) for row in ids]
        if padding:
            ids = pad(ids, self.pad_token_id, self.padding_side)
            masks = pad(masks, 0, self.padding_side)
        if return_tensors is None:
            one = isinstance(text, str)
            found = (ids[0], masks[0]) if one else (ids, masks)
            return Encoded(input_ids=found[0], attention_mask=found[1])
        if len({len(row) for row in ids}) > 1:
            raise ValueError("the texts have different numbers of tokens; give padding=True")
        return Encoded(
            input_ids=torch.tensor(ids, dtype=torch.int64, device="cpu"),
            attention_mask=torch.tensor(masks, dtype=torch.int64, device="cpu"),
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text. A call of the tokenizer returns the same ids.

        Raises the same errors as `Tokenizer.to_tokens`.
        """
        [row] = self._encoded(text, add_special_tokens=True)
        return row

    def tokenize(self, text: str) -> list[str]:
        """Return the spelling of each token in the vocabulary. "Ġ" stands for a space."""
        [row] = self._encoded(text, add_special_tokens=False)
        return [str(self.backend.id_to_token(token)) for token in row]

    @property
    def vocab(self) -> dict[str, int]:
        """A new dictionary that maps each token's spelling to its id. "Ġ" stands for a space."""
        return self.backend.get_vocab()

    @property
    def vocab_size(self) -> int:
        """The number of tokens, `d_vocab`."""
        return self.d_vocab

    @property
    def bos_token(self) -> str:
        """The token that is put before each text, <|endoftext|> in GPT-2."""
        return str(self.backend.id_to_token(self.bos_token_id))

    @property
    def eos_token(self) -> str:
        """The token that ends a text, <|endoftext|> in GPT-2."""
        return str(self.backend.id_to_token(self.eos_token_id))

    @property
    def pad_token(self) -> str:
        """The token that pads the shorter texts of a batch: `eos_token`, unless you assign another.

        Assigning a token that is not in the vocabulary raises `ValueError`.
        """
        return str(self.backend.id_to_token(self.pad_token_id))

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(f"pad_token is {token!r}, which is not in the vocabulary")
        self._pad_token_id = number

    @property
    def pad_token_id(self) -> int:
        """The id of `pad_token`. Assigning an id without a token raises `ValueError`."""
        return self._pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, token: int) -> None:
        if token < 0 or self.backend.id_to_token(token) is None:
            raise ValueError(f"pad_token_id is {token!r}, which is not in the vocabulary")
        self._pad_token_id = token

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """The side on which shorter texts are padded: "right" unless you assign "left".

        `generate` always pads on the left.
        """
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: Literal["left", "right"]) -> None:
        refuse_other("padding_side", side, "left", "right")
        self._padding_side = side
