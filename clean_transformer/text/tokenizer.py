"""`Tokenizer`: GPT-2's byte-level BPE. Its methods have the same names as in TransformerLens."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.reports.page import render_page
from clean_transformer.support.validation import refuse_other
from clean_transformer.text.symbols import visible
from clean_transformer.text.token_ids import token_ids
from clean_transformer.text.tokenizer_backends import read_file, read_folder
from clean_transformer.text.tokenizer_calls import Texts as Texts
from clean_transformer.text.tokenizer_calls import TransformersCalls, pad
from clean_transformer.text.tokenizer_files import (
    END_OF_TEXT,
    SETTINGS,
    describe,
    readable,
    refuse_lossy,
)
from clean_transformer.weights import hub

if TYPE_CHECKING:
    import tokenizers

PaddingSide = Literal["left", "right"] | None

# The types of token ids that `to_str_tokens` and `to_string` accept.
Tokens = (
    Int[Tensor, "batch pos"]
    | Int[Tensor, "pos"]
    | Int[Tensor, ""]
    | Sequence[Sequence[int]]
    | Sequence[Int[Tensor, "..."]]
    | Sequence[int]
    | int
)


class Tokenizer(TransformersCalls):
    """Converts text to token ids, and token ids to text.

    `backend` is a tokenizer of the library `tokenizers`. Every byte has a token, so the token ids
    of a text can always be converted back to the same text. The token `bos_token_id` is put before
    each text. A generated text ends at a token in `stop_tokens`. The first of these tokens is
    `eos_token_id`. The token `pad_token_id` pads the shorter texts of a batch, on `padding_side`.
    By default, all these tokens are <|endoftext|>, as in GPT-2. The characters "<|endoftext|>" in a
    text also become this token. Texts are never truncated.

    Raises `ValueError` for a `backend` that is not a byte-level BPE, that has no token for
    <|endoftext|> or for one of the 256 bytes, or that does not convert tokens back to the same
    text.
    """

    __slots__ = (
        "_has_token",
        "_pad_token_id",
        "_padding_side",
        "_replacement",
        "_warned",
        "backend",
        "bos_token_id",
        "d_vocab",
        "eos_token_id",
        "stop_tokens",
    )

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        bos_token_id: int | None = None,
        stop_tokens: Sequence[int] = (),
        pad_token_id: int | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        vocab = backend.get_vocab()
        named = bos_token_id is not None and stop_tokens
        if not named and END_OF_TEXT not in vocab:
            raise ValueError(
                f"the vocabulary lacks the token {END_OF_TEXT!r} that a GPT-2 tokenizer has; "
                f"give the files of a byte-level BPE with {END_OF_TEXT}"
            )
        if END_OF_TEXT in vocab:
            backend.add_special_tokens([END_OF_TEXT])
        # A tokenizer.json can contain settings that turn on truncation or padding.
        backend.no_truncation()
        backend.no_padding()
        refuse_lossy(backend)
        self.backend = backend
        self.d_vocab = max(vocab.values()) + 1
        self._has_token = torch.zeros(self.d_vocab, dtype=torch.bool, device="cpu")
        self._has_token[list(vocab.values())] = True
        self._replacement = [vocab[letter] for letter in "ï¿½"]  # the bytes of "�"
        self._warned = False
        self.padding_side = padding_side
        self.stop_tokens = [*stop_tokens] or [vocab[END_OF_TEXT]]
        self.eos_token_id = self.stop_tokens[0]
        self.bos_token_id = vocab[END_OF_TEXT] if bos_token_id is None else bos_token_id
        self.pad_token_id = self.eos_token_id if pad_token_id is None else pad_token_id

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Tokenizer":
        """Load the tokenizer from `source`.

        `source` is a folder, an alias such as "gpt2", the "owner/name" of a repository on the
        Hugging Face Hub, or a .gguf file that holds a tokenizer. In a folder or repository, the
        method looks for tokenizer.json, then for vocab.json and merges.txt, then for encoder.json
        and vocab.bpe. It loads the first complete set that it finds.

        Raises `FileNotFoundError` for a source without a tokenizer, `ValueError` for a malformed
        file or an unknown source, and `HubError` for a failed download.
        """
        if os.path.isfile(source):
            backend, options = read_file(Path(source))
        else:
            folder = hub.fetch(source, hub.TOKENIZER, optional=SETTINGS)
            backend, options = read_folder(folder)
        with readable(str(source)):
            return cls(backend, **options)

    def files(self) -> dict[str, str]:
        """Return the files of this tokenizer, from which `from_pretrained` makes an equal one.

        The keys are the file names in Hugging Face's format: tokenizer.json, tokenizer_config.json,
        and generation_config.json, which has `bos_token_id` and `stop_tokens`. The values are the
        contents.
        """
        stop, pad, side = self.stop_tokens, self.pad_token_id, self.padding_side
        return describe(self.backend, self.bos_token_id, stop, pad, side)

    def to_tokens(
        self, text: Texts, prepend_bos: bool | None = None, padding_side: PaddingSide = None
    ) -> Int[Tensor, "batch pos"]:
        """Return the token ids of each text, one row per text. A single text gives one row.

        Each text begins with <|endoftext|>, unless `prepend_bos` is False. Shorter texts are padded
        with the token `pad_token_id`, on `padding_side`. None means the tokenizer's attribute
        `padding_side`. Padding on the right does not change the model's
        output for the tokens of the text, because attention is causal. Padding on the left changes
        this output, unless a `KVCache` with an `attention_mask` hides the padding.

        Raises `TypeError` if `text` is neither a `str` nor a list or tuple of `str`. Raises
        `ValueError` for an unknown `padding_side`, and for a text with a lone surrogate, which
        UTF-8 cannot encode.
        """
        return self.to_padded(text, prepend_bos, padding_side)[0]

    def to_padded(
        self, text: Texts, prepend_bos: bool | None = None, padding_side: PaddingSide = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Return the tokens that `to_tokens` returns, and a mask with 1 for tokens, 0 for padding.

        If there is no padding, return None instead of the mask. The errors are the same as in
        `to_tokens`.
        """
        side = self.padding_side if padding_side is None else padding_side
        refuse_other("padding_side", side, "left", "right")
        rows = self.to_rows(text, prepend_bos)
        shape = (len(rows), max(map(len, rows), default=0))
        tokens, mask = (
            torch.tensor(pad(each, filler, side), dtype=torch.int64, device="cpu").reshape(shape)
            for each, filler in ((rows, self.pad_token_id), ([[1] * len(row) for row in rows], 0))
        )
        return tokens, None if mask.all() else mask

    def to_rows(self, text: Texts, prepend_bos: bool | None = None) -> list[list[int]]:
        """Return a list of token ids for each text, without padding.

        Each text begins with <|endoftext|>, unless `prepend_bos` is False. The errors are the same
        as in `to_tokens`.
        """
        bos = [] if prepend_bos is False else [self.bos_token_id]
        return [bos + ids for ids in self._encoded(text, add_special_tokens=False)]

    @overload
    def to_str_tokens(self, text: str | Tokens, prepend_bos: bool | None = None) -> list[str]: ...

    @overload
    def to_str_tokens(
        self, text: list[str] | tuple[str, ...] | list[Tensor], prepend_bos: bool | None = None
    ) -> list[list[str]]: ...

    def to_str_tokens(
        self, text: Texts | Tokens, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Return one string for each token of `text`, to show the tokens to people.

        `text` is one text, or the token ids of one text. For a list of texts or tensors, the result
        has one list of strings for each of them. <|endoftext|> is added before each text, unless
        `prepend_bos` is False, but not before token ids. A token that is only a part of a character
        becomes "�".

        Raises `TypeError` if `text` is neither a `str` nor token ids. Raises `ValueError` for one
        tensor with the ids of several texts, and for ids outside the vocabulary.
        """
        if isinstance(text, (list, tuple)) and any(_is_one_text(each) for each in text):
            return [self.to_str_tokens(each, prepend_bos) for each in text]
        ids = self.to_tokens(text, prepend_bos) if isinstance(text, str) else self._checked(text)
        if ids.ndim == 2 and len(ids) != 1:
            raise ValueError(
                f"to_str_tokens takes one text, not {len(ids)}; call it for each of them"
            )
        one_by_one = [self._known([token]) for token in ids.flatten().tolist()]
        return self.backend.decode_batch(one_by_one, skip_special_tokens=False)

    def to_string(self, tokens: Tokens) -> str | list[str]:
        """Return the text of one token id or of token ids [pos].

        For token ids [batch pos], return a list with the text of each row. Raises `TypeError` if
        `tokens` are not integers. Raises `ValueError` for ids outside the vocabulary, and for a
        tensor with more than two axes.
        """
        return self._strings(tokens, skip_special_tokens=False)

    def decode(self, token_ids: Tokens, skip_special_tokens: bool = False) -> str | list[str]:
        """Return the text of one token id, of token ids [pos], or of each row, as in transformers.

        In contrast to `to_string`, the rows may be a list of rows of different lengths. If
        `skip_special_tokens` is True, the text lacks special tokens, such as <|endoftext|>.
        """
        if isinstance(token_ids, (list, tuple)) and any(map(_is_row, token_ids)):
            texts = [self._strings(row, skip_special_tokens) for row in token_ids]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("each row must have the shape [pos]; give tokens[0] of to_tokens")
            return [str(text) for text in texts]
        return self._strings(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Tokens, skip_special_tokens: bool = False) -> list[str]:
        """Return a list with the text of each row of token ids, as in transformers.

        For the ids of one text [pos], the list has this text.
        """
        if isinstance(sequences, (list, tuple)) and not sequences:
            return []
        texts = self.decode(sequences, skip_special_tokens)
        return [texts] if isinstance(texts, str) else texts

    def _strings(self, tokens: Tokens, skip_special_tokens: bool) -> str | list[str]:
        ids = self._checked(tokens)
        if ids.ndim == 2:
            rows = [self._known(row) for row in ids.tolist()]
            return self.backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        row = self._known(ids.flatten().tolist())
        return self.backend.decode(row, skip_special_tokens=skip_special_tokens)

    def _known(self, ids: list[int]) -> list[int]:
        """Return `ids`, in which the tokens of "�" replace each id that has no token."""
        known = [[i] if i < self.d_vocab and self._has_token[i] else self._replacement for i in ids]
        return [token for tokens in known for token in tokens]

    def __repr__(self) -> str:
        return f"Tokenizer({self.d_vocab} tokens; {self.eos_token} is {self.eos_token_id})"

    def _repr_html_(self) -> str:
        example = self.to_str_tokens("Hello world, 1234!", prepend_bos=False)
        facts = {
            "tokens": self.d_vocab,
            self.eos_token: self.eos_token_id,
            "“Hello world, 1234!”": " | ".join(map(visible, example)),
        }
        return render_page("facts.html.jinja", title="Tokenizer", facts=facts)

    def _checked(self, tokens: object) -> Int[Tensor, "..."]:
        ids = token_ids(tokens)
        if ids.numel() == 0:
            return ids.long()
        if ids.ndim > 2:
            raise ValueError(f"tokens of shape {[*ids.shape]}; they must be [pos] or [batch, pos]")
        if ids.min() < 0:
            raise ValueError(
                f"there is no token {ids.min().item()}; ids run from 0 to {self.d_vocab - 1}"
            )
        # A model's vocabulary is often rounded up to a multiple of 64, so that a few ids of the
        # model have no token. The text so far must not be lost for them.
        has_token = self._has_token[ids.clamp(max=self.d_vocab - 1).long()]
        unknown = ids[~has_token | (ids >= self.d_vocab)]
        if len(unknown) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(unknown)} of the token ids have no text, such as {unknown[0].item()}; their "
                f"text becomes '�'. The tokenizer's ids run from 0 to {self.d_vocab - 1}.",
                stacklevel=3,
            )
        return ids


def _is_one_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)


def _is_row(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (_is_one_text(value) and not isinstance(value, str))
