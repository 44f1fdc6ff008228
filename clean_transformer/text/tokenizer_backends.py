"""Reads the `backend` of a `Tokenizer` (a tokenizer of the library `tokenizers`) from files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clean_transformer.text.tokenizer_files import add_ends, apply, read_settings, readable
from clean_transformer.weights import hub
from clean_transformer.weights.formats.gguf import read_tokenizer

if TYPE_CHECKING:
    import tokenizers

# A backend, and the keyword arguments of `Tokenizer` that go with it.
Loaded = tuple["tokenizers.Tokenizer", dict[str, Any]]


def read_folder(folder: Path) -> Loaded:
    """Load the tokenizer in a folder, with the settings from the JSON files next to it.

    The tokenizer is tokenizer.json, or else vocab.json and merges.txt, or else encoder.json and
    vocab.bpe. Raises `FileNotFoundError` if the folder has none of these, and `ValueError` for a
    malformed file.
    """
    import tokenizers

    settings = read_settings(folder)
    files = hub.complete_set(hub.TOKENIZER, os.listdir(folder))
    if not files:
        raise FileNotFoundError(
            f"the folder {str(folder)!r} has no tokenizer; "
            f"put {hub.describe(hub.TOKENIZER)} there, or name another folder"
        )
    paths = [folder / file for file in files]
    with readable(" with ".join(map(str, paths))):
        if len(paths) == 1:
            backend = tokenizers.Tokenizer.from_file(str(paths[0]))
        else:
            backend = byte_level(tokenizers.models.BPE.from_file(*map(str, paths)))
        named = apply(settings, backend)
        if len(paths) > 1:  # tokenizer.json itself says what to put before and after texts
            add_ends(settings, backend, named)
    vocab = backend.get_vocab()
    ids = {name: [vocab[token]] for name, token in named.items()}

    def first(own: list[int], name: str) -> list[int]:
        # Many models name GPT-2's id 50256 by mistake, with a smaller vocabulary.
        return own if own and max(own) < len(vocab) else ids.get(name, [])

    return backend, {
        "bos_token_id": next(iter(first(settings.bos, "bos")), None),
        "stop_tokens": first(settings.eos, "eos"),
        "pad_token_id": next(iter(ids.get("pad", [])), None),
        "padding_side": settings.fields.get("padding_side") or "right",
    }


def read_file(file: Path) -> Loaded:
    """Load the tokenizer that a GGUF file holds.

    Raises `FileNotFoundError` for a GGUF file without a tokenizer, and for any other file.
    """
    from tokenizers import AddedToken, models

    fields = read_tokenizer(file) if file.suffix == ".gguf" else {}
    tokens, merges = fields.get("tokens"), fields.get("merges")
    if fields.get("model") != "gpt2" or not tokens or merges is None:
        raise FileNotFoundError(
            f"{file} holds no tokenizer of GPT-2; name another one with --tokenizer, or assign "
            "model.tokenizer = Tokenizer.from_pretrained(a folder or hub id)"
        )
    with readable(str(file)):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        vocab = {token: i for i, token in enumerate(tokens)}
        if len(vocab) < len(tokens):
            raise ValueError("it has a token twice")
        backend = byte_level(models.BPE(vocab, pairs))
        types = fields.get("token_type") or []
        # 3 is a control token, and 4 is a token that the model's author added.
        backend.add_tokens(
            [
                AddedToken(token, special=kind == 3, normalized=False)
                for token, kind in zip(tokens, types, strict=False)
                if kind in (3, 4)
            ]
        )
    # As in a folder, an id outside of the vocabulary, such as GPT-2's 50256, does not count.
    bos, eos, pad = (
        fields.get(name) if fields.get(name, len(tokens)) < len(tokens) else None
        for name in ("bos_token_id", "eos_token_id", "padding_token_id")
    )
    return backend, {
        "bos_token_id": bos,
        "stop_tokens": [] if eos is None else [eos],
        "pad_token_id": pad,
    }


def byte_level(model: "tokenizers.models.BPE") -> "tokenizers.Tokenizer":
    """Return GPT-2's tokenizer with the vocabulary and the merges of `model`."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
