"""Where a model's files come from: a local folder, or a repository of the Hugging Face hub."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import filter as matching
from pathlib import Path

HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


# The small model that comes with the package, under the name "demo".
DEMO = Path(__file__).parents[1] / "demo" / "model"


# Sets of file names (or patterns) of which any one will do, the preferred set first.
FileSets = tuple[tuple[str, ...], ...]


TOKENIZER: FileSets = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),  # the names in OpenAI's own release
)


# The hub allows neither "--" nor ".." in a name, and only a letter, digit or "_" at its ends.
HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


class HubError(OSError):
    """The hub could not give the files; the message says what to do next."""


def fetch(source: str | Path, wanted: FileSets) -> Path:
    """The folder with the files of `source`: a local folder, an alias of `HUB_IDS` or a hub id.

    A local folder is returned as it is, and for "demo" the one that comes with the package. From
    the hub, only the first set of `wanted` that the repository has in full is downloaded, into
    `huggingface_hub`'s cache and under its environment variables. Where the hub does not answer,
    the cached copy is taken.

    Raises `ValueError` for a source that is none of these, and `HubError` if the hub has no
    such repository or files, cannot be reached with nothing cached, or breaks off a download.
    """
    if os.path.isdir(source):
        return Path(source)
    if source == "demo":
        return DEMO
    repo = _hub_id(str(source))

    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.errors import HfHubHTTPError

    # One request that is not retried: without a network, its failure is known at once. How it
    # fails depends on the HTTP library, which differs between versions of huggingface_hub.
    try:
        listing = HfApi().model_info(repo, timeout=HF_HUB_ETAG_TIMEOUT).siblings or []
    except Exception as error:
        cached = _cached(repo, wanted)
        if cached:
            return cached
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            raise HubError(
                f"{repo!r} is neither a folder here nor a repository on the hub that you may read; "
                "check the spelling, or log in with `hf auth login` if it is private"
            ) from None
        raise HubError(
            f"{repo!r} is not in the cache and the hub cannot be asked ({_first_line(error)}); "
            "connect once to download it, or pass a folder with its files"
        ) from None

    files = complete_set(wanted, [sibling.rfilename for sibling in listing])
    if not files:
        raise HubError(
            f"{repo!r} on the hub does not have {describe(wanted)}; "
            "choose another repository, or pass a folder with these files"
        )
    downloaded = [_download(repo, file) for file in files]
    return downloaded[0].parent


def complete_set(wanted: FileSets, names: Iterable[str]) -> list[str]:
    """The files of the first set that `names` has in full, in the set's order; or none."""
    names = sorted(names)
    for patterns in wanted:
        matches = [matching(names, pattern) for pattern in patterns]
        if all(matches):
            return [name for group in matches for name in group]
    return []


def describe(wanted: FileSets) -> str:
    """The sets in words, for messages."""
    return ", or ".join(" + ".join(patterns) for patterns in wanted)


def _hub_id(name: str) -> str:
    if name in HUB_IDS:
        return HUB_IDS[name]
    if HUB_ID.fullmatch(name):
        return name
    aliases = [*HUB_IDS, "demo"]
    close = get_close_matches(name.lower(), aliases, cutoff=0.8)
    raise ValueError(
        f"{name!r} is no folder, no hub id 'owner/name' and none of the aliases "
        + ", ".join(aliases)
        + (f"; did you mean {' or '.join(close)}?" if close else "")
    )


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # of the HTTP library, the hub, the file system
        raise HubError(
            f"the download of {file} from {repo!r} failed ({_first_line(error)}); "
            "no incomplete file is ever used, try again"
        ) from None


def _cached(repo: str, wanted: FileSets) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in wanted:
        try:
            folder = snapshot_download(repo, allow_patterns=[*patterns], local_files_only=True)
        except LocalEntryNotFoundError:
            continue
        if complete_set((patterns,), os.listdir(folder)):
            return Path(folder)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
