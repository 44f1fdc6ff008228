"""Reads the settings of a GPT-2 tokenizer from the same JSON files as transformers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any

from clean_transformer.support.printable import printable
from clean_transformer.weights.files import read_json

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"


# The named special tokens, in the order in which transformers adds tokens that are new.
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


# The arguments of `tokenizers.AddedToken`.
ARGUMENTS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


# Small files next to a tokenizer. `read_settings` reads the files that exist.
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)


# Texts that a tokenizer must give back unchanged. The last text has a combining accent.
PROBES = ("Hello,  World!\n\n\tÀB ", "def f(x):\n    return x + 1234", "e\u0301ﬁ½")


@dataclass(frozen=True)
class Settings:
    """The settings in the JSON files of a tokenizer's folder.

    `fields` has the settings in tokenizer_config.json and special_tokens_map.json. `added` has the
    arguments of `tokenizers.AddedToken` for each added token, in the order of the ids. `bos` and
    `eos` are the values of bos_token_id and eos_token_id in the model's files, or [] if these files
    have no such value.
    """

    fields: dict[str, Any]
    added: list[dict[str, Any]]
    bos: list[int]
    eos: list[int]


def read_settings(folder: Path) -> Settings:
    """Return the settings in the JSON files of a folder.

    As in transformers, bos_token_id and eos_token_id are read from generation_config.json, or else
    from config.json. Raises `ValueError` for a malformed file.
    """
    fields = _read(folder / "tokenizer_config.json")
    decoder = fields.pop("added_tokens_decoder", None)
    with _names(folder / "tokenizer_config.json"):
        if decoder is not None:
            added = [dict(token) for _, token in sorted(decoder.items(), key=lambda at: int(at[0]))]
        else:
            fields |= _read(folder / "special_tokens_map.json")
            given = [fields.get(f"{name}_token") for name in NAMED]
            named = [token for token in given if token not in (None, "")]
            special = {_content(token) for token in (*named, *_extra(fields))}
            ids = _read(folder / "added_tokens.json")
            added = [
                {"content": token, "special": token in special, "normalized": token not in special}
                for token in sorted(ids, key=lambda token: int(ids[token]))
            ]
    files = [_read(folder / name) for name in ("generation_config.json", "config.json")]
    return Settings(fields, added, _ids(files, "bos"), _ids(files, "eos"))


def apply(settings: Settings, backend: "tokenizers.Tokenizer") -> dict[str, str]:
    """Add the tokens in `settings` to `backend`, and return the spelling of each special token.

    A new token gets the next free id. The keys of the result are names of special tokens, such as
    "bos" and "pad".
    """
    from tokenizers import AddedToken, pre_tokenizers

    if settings.fields.get("split_special_tokens"):
        raise ValueError("split_special_tokens is true, but special tokens are never split here")
    prefix = _switch(settings, "add_prefix_space")
    if prefix is not None and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=prefix, use_regex=backend.pre_tokenizer.use_regex
        )
    given = {name: settings.fields.get(f"{name}_token") for name in NAMED}
    named = {name: token for name, token in given.items() if token}
    tokens: dict[str, dict[str, Any]] = {}
    for token in settings.added:
        tokens.setdefault(token["content"], token)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for special in (*named.values(), *_extra(settings.fields)):
        content = _content(special)
        if content not in tokens and content not in known:
            tokens[content] = dict(special) if isinstance(special, dict) else {"content": content}
        if content in tokens and content in map(_content, named.values()):
            tokens[content]["special"] = True
        elif content in tokens:
            tokens[content].setdefault("special", True)
    backend.add_tokens(
        [
            AddedToken(**{key: token[key] for key in ARGUMENTS if key in token})
            for token in tokens.values()
        ]
    )
    return {name: _content(token) for name, token in named.items()}


def add_ends(settings: Settings, backend: "tokenizers.Tokenizer", named: Mapping[str, str]) -> None:
    """Let `backend` put a token before or after each text, if the settings ask for this.

    The settings are add_bos_token and add_eos_token. `named` is the result of `apply`.
    """
    from tokenizers import processors

    bos, eos = (named.get(name, END_OF_TEXT) for name in ("bos", "eos"))
    before = [bos] if _switch(settings, "add_bos_token") else []
    after = [eos] if _switch(settings, "add_eos_token") else []
    if before or after:
        ends = [(token, backend.token_to_id(token)) for token in {*before, *after}]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=ends
        )


def describe(
    backend: "tokenizers.Tokenizer",
    bos: int,
    stop_tokens: Sequence[int],
    pad: int,
    padding_side: str,
) -> dict[str, str]:
    """Return the contents of a tokenizer's files by name (see `Tokenizer.files`)."""
    added = {
        str(token_id): {name: getattr(token, name) for name in ARGUMENTS}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items())
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": backend.id_to_token(bos),
        "eos_token": backend.id_to_token(stop_tokens[0]),
        "pad_token": backend.id_to_token(pad),
        "padding_side": padding_side,
        "added_tokens_decoder": added,
    }
    prefix = getattr(backend.pre_tokenizer, "add_prefix_space", None)
    if prefix is not None:
        settings["add_prefix_space"] = prefix
    ids = {"bos_token_id": bos, "eos_token_id": [*stop_tokens]}
    return {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "generation_config.json": json.dumps(ids, indent=2) + "\n",
    }


def refuse_lossy(backend: "tokenizers.Tokenizer") -> None:
    """Raise `ValueError` for a tokenizer that is not a byte-level BPE, or that changes texts."""
    from tokenizers import models, pre_tokenizers

    if not isinstance(backend.model, models.BPE):
        raise ValueError(f"a {type(backend.model).__name__} tokenizer loses text; GPT-2 needs BPE")
    if backend.model.dropout:
        raise ValueError("the tokenizer has BPE dropout, which gives random tokens; remove it")
    vocab = backend.get_vocab()
    if len({*vocab.values()}) < len(vocab):
        raise ValueError("two tokens of the vocabulary have the same id")
    missing = {*pre_tokenizers.ByteLevel.alphabet()} - vocab.keys()
    if missing:
        raise ValueError(
            f"the vocabulary lacks {len(missing)} of the tokens that a GPT-2 tokenizer has, "
            f"such as {min(missing)!r}; give the files of a byte-level BPE"
        )
    for probe in PROBES:
        ids = backend.encode(probe, add_special_tokens=False).ids
        # With the setting add_prefix_space, a space before the text is not a loss.
        if backend.decode(ids, skip_special_tokens=False) not in (probe, f" {probe}"):
            raise ValueError(f"the tokenizer changes the text {probe!r}, so it is not GPT-2's")


@contextmanager
def readable(files: str) -> Iterator[None]:
    """Turn any exception of `tokenizers` in the `with` block into a `ValueError` naming `files`."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust code is no `Exception`.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(
                f"{files} cannot be read as a tokenizer ({printable(str(error))}); "
                "download the published files again"
            ) from None
        raise


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


@contextmanager
def _names(file: Path) -> Iterator[None]:
    """Turn any exception about the content of `file` into a `ValueError` that names `file`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({printable(str(error))})") from None


def _switch(settings: Settings, name: str) -> bool | None:
    """Return the setting `name`, or None without this setting.

    Raises `ValueError` if the value is neither true nor false.
    """
    value = settings.fields.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{name} must be true or false, not {shorten(value)}")
    return value


def _content(token: Any) -> str:
    """Return the spelling of `token`, a value in a JSON file: a string or a dictionary.

    Raises `ValueError` for anything else, such as a dictionary without a spelling.
    """
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"a special token must be a text, not {shorten(token)}")
    return content


def _extra(fields: dict[str, Any]) -> list[Any]:
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    return [*(extra.values() if isinstance(extra, dict) else extra)]


def _ids(files: list[dict[str, Any]], name: str) -> list[int]:
    """Return the token ids for `name`, such as "eos", from the first of `files` with such ids."""
    for fields in files:
        value = fields.get(f"{name}_token_id")
        ids: list[Any] = value if isinstance(value, list) else [value]
        if ids and all(type(token) is int for token in ids):
            return ids
    return []
