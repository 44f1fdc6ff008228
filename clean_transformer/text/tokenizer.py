"""GPT-2's byte-level tokenizer, with TransformerLens's method names and conventions."""

import os
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Literal

import tokenizers
import torch
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from clean_transformer.weights import hub

END_OF_TEXT = "<|endoftext|>"


# What is seen of characters that leave no mark: Unicode has a picture of each control character.
_PICTURES = {code: 0x2400 + code for code in range(32)} | {127: "␡", ord(" "): "·", ord("\n"): "↵"}


# Token ids as the methods below take them.
Tokens = (
    Int[Tensor, "batch pos"]
    | Int[Tensor, "pos"]
    | Int[Tensor, ""]
    | Sequence[Sequence[int]]
    | Sequence[int]
)


class Tokenizer:
    """Text to token ids and back; every text survives the round trip, since any byte is a token.

    GPT-2 has one special token, <|endoftext|>: it begins a text, ends it, and fills up the shorter
    texts of a batch. Written out in a text, it is that one token too. Texts are never truncated.

    Raises `ValueError` for a `tokenizers.Tokenizer` without <|endoftext|> or without a token for
    each of the 256 bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        vocab = backend.get_vocab()
        missing = {END_OF_TEXT, *pre_tokenizers.ByteLevel.alphabet()} - vocab.keys()
        if missing:
            raise ValueError(
                f"the vocabulary lacks {len(missing)} of the tokens that a GPT-2 tokenizer has, "
                f"such as {min(missing)!r}; give the files of a byte-level BPE with {END_OF_TEXT}"
            )
        backend.add_special_tokens([END_OF_TEXT])
        # A tokenizer.json may carry both from where it was saved.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.d_vocab = len(vocab)
        self.bos_token_id = self.eos_token_id = vocab[END_OF_TEXT]

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Tokenizer":
        """The tokenizer in a folder or on the hub: an alias such as "gpt2", or "owner/name".

        The files are tokenizer.json, or else vocab.json and merges.txt, or else encoder.json and
        vocab.bpe. Raises `FileNotFoundError` for a folder without them, `ValueError` for a
        malformed file or an unknown source, and `HubError` for a failed download.
        """
        folder = hub.fetch(source, hub.TOKENIZER)
        match hub.complete_set(hub.TOKENIZER, os.listdir(folder)):
            case [file]:
                try:
                    backend = tokenizers.Tokenizer.from_file(str(folder / file))
                except Exception as error:  # tokenizers raises nothing narrower
                    raise ValueError(_malformed(folder / file, error)) from None
                return cls(backend)
            case [vocab, merges]:
                return cls.from_files(folder / vocab, folder / merges)
        raise FileNotFoundError(
            f"the folder {str(folder)!r} has no tokenizer; "
            f"put {hub.describe(hub.TOKENIZER)} there, or name another folder"
        )

    @classmethod
    def from_files(cls, vocab: str | Path, merges: str | Path) -> "Tokenizer":
        """The tokenizer of a vocab.json (token to id) and a merges.txt, as GPT-2 publishes them.

        Raises `FileNotFoundError` for a missing file and `ValueError` for a malformed one.
        """
        for path in (vocab, merges):
            if not os.path.isfile(path):
                raise FileNotFoundError(
                    f"no file {str(path)!r}; give the tokenizer's vocab.json and its merges.txt"
                )
        try:
            model = models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(_malformed(f"{vocab} with {merges}", error)) from None
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    def to_tokens(
        self,
        text: str | list[str],
        prepend_bos: bool = True,
        *,
        padding_side: Literal["left", "right"] = "right",
    ) -> Int[Tensor, "batch pos"]:
        """The token ids of one text (a batch of one) or of several.

        Shorter texts are filled up with <|endoftext|> on the `padding_side`, as GPT-2 has no
        padding token: what follows a text on the right cannot act on it, what precedes it can.

        Raises `TypeError` for anything but text, and `ValueError` for a text that has no UTF-8 (a
        lone surrogate) or an unknown `padding_side`.
        """
        texts = text if isinstance(text, list) else [text]
        for each in texts:
            if not isinstance(each, str):
                raise TypeError(f"to_tokens takes a text or a list of texts, not {shorten(each)}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        bos = [self.bos_token_id] * prepend_bos
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        except TypeError:
            raise ValueError(
                "a text with a lone surrogate has no bytes; repair its decoding"
            ) from None
        rows = [bos + encoding.ids for encoding in encodings]
        width = max(map(len, rows), default=0)
        tokens = torch.full((len(rows), width), self.eos_token_id)
        for padded, row in zip(tokens, rows, strict=True):
            start = width - len(row) if padding_side == "left" else 0
            padded[start : start + len(row)] = torch.tensor(row)
        return tokens

    def to_str_tokens(self, text: str | Tokens, prepend_bos: bool = True) -> list[str]:
        """Each token of one text as a string, for display; of given tokens, just those.

        A token that holds only part of a character shows as "�".

        Raises `TypeError` for neither text nor tokens, and `ValueError` for a batch of several or
        for ids outside the vocabulary.
        """
        ids = self.to_tokens(text, prepend_bos) if isinstance(text, str) else self._checked(text)
        if ids.ndim == 2 and len(ids) != 1:
            raise ValueError(
                f"to_str_tokens takes one text, not {len(ids)}; go through them singly"
            )
        one_by_one = [[token] for token in ids.flatten().tolist()]
        return self.backend.decode_batch(one_by_one, skip_special_tokens=False)

    def to_string(self, tokens: Tokens) -> str | list[str]:
        """The text of one token or a row of tokens, or the texts of a batch [batch, pos].

        Raises `TypeError` for anything but integers and `ValueError` for ids outside the
        vocabulary.
        """
        ids = self._checked(tokens)
        if ids.ndim == 2:
            return self.backend.decode_batch(ids.tolist(), skip_special_tokens=False)
        return self.backend.decode(ids.flatten().tolist(), skip_special_tokens=False)

    def _checked(self, tokens: object) -> Int[Tensor, "..."]:
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"tokens are a tensor or equally long lists of ids, not {shorten(tokens)}"
            ) from None
        if ids.numel() == 0:
            return ids.long()  # an empty list becomes a tensor of floats
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"token ids are integers, not {ids.dtype}")
        if ids.ndim > 2:
            raise ValueError(f"tokens of shape {[*ids.shape]}; they must be [pos] or [batch, pos]")
        outside = ids[(ids < 0) | (ids >= self.d_vocab)]
        if len(outside):
            raise ValueError(
                f"there is no token {outside[0].item()}; ids run from 0 to {self.d_vocab - 1}, "
                "so these tokens come from another vocabulary"
            )
        return ids


def visible(token: str) -> str:
    """The token as a label: "·" for a space, "↵" for a line break, "␉" for a tab, …"""
    return token.translate(_PICTURES)


def _malformed(files: str | Path, error: Exception) -> str:
    return f"{files} cannot be read as a tokenizer ({error}); get the published files again"
