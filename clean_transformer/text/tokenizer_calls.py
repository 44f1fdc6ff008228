"""`TransformersCalls`: what notebooks call of a tokenizer of transformers."""

from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    import tokenizers

# One text, or several texts.
Texts = str | list[str] | tuple[str, ...]


def refuse_other(setting: str, given: object, *valid: object) -> None:
    """Raise `ValueError` if the value `given` of `setting` is none of the `valid` values."""
    if given not in valid:
        raise ValueError(f"{setting} is {given!r}; it must be {' or '.join(map(repr, valid))}")


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
        with different numbers of tokens, unless `padding` is True, and for an unknown
        `return_tensors`.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; it must be 'pt' or None")
        rows = self._encoded(text, add_special_tokens=True)
        width = max(map(len, rows), default=0)
        missing = [width - len(row) if padding else 0 for row in rows]
        ids = [
            self._padded(row, n, self.pad_token_id) for row, n in zip(rows, missing, strict=True)
        ]
        masks = [self._padded([1] * len(row), n, 0) for row, n in zip(rows, missing, strict=True)]
        if return_tensors is None:
            one = isinstance(text, str)
            found = (ids[0], masks[0]) if one else (ids, masks)
            return Encoded(input_ids=found[0], attention_mask=found[1])
        if any(len(row) != width for row in ids):
            raise ValueError("the texts have different numbers of tokens; give padding=True")
        return Encoded(
            input_ids=torch.tensor(ids, dtype=torch.int64, device="cpu"),
            attention_mask=torch.tensor(masks, dtype=torch.int64, device="cpu"),
        )

    def _padded(self, row: list[int], n: int, filler: int) -> list[int]:
        """Return `row` with `n` more elements, which are all `filler`, on the `padding_side`."""
        padding = [filler] * n
        return padding + row if self.padding_side == "left" else row + padding

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
        if self.backend.token_to_id(token) is None:
            raise ValueError(f"pad_token is {token!r}, which is not in the vocabulary")
        self._pad_token_id = self.backend.token_to_id(token)

    @property
    def pad_token_id(self) -> int:
        """The id of `pad_token`. Assigning an id without a token raises `ValueError`."""
        return self._pad_token_id

    @pad_token_id.setter
    def pad_token_id(self, token: int) -> None:
        if token not in self.vocab.values():
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
