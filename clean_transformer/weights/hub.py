"""Finds the files of a model in a local folder, or downloads them from the Hugging Face hub."""

import json
import os
import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import filter as matching
from hashlib import sha256
from pathlib import Path
from time import monotonic

HUB_IDS = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


# The folder of the small model that is part of the package. `fetch("demo")` returns this folder.
DEMO = Path(__file__).parents[1] / "demo" / "model"


# Alternative sets of files. Each set is a tuple of file names or glob patterns. A model needs all
# files of one set, no matter which set. The preferred set comes first.
FileSets = tuple[tuple[str, ...], ...]


TOKENIZER: FileSets = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),  # OpenAI's own release uses these names
)


# A hub id is "owner/name". The owner and the name begin and end with a letter, a digit or "_". They
# do not contain "--" or "..".
HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


# A longer or slower list of a repository's files is refused. The hub's longest lists have 10 MB.
MAX_LISTING, MAX_SECONDS = 32 * 2**20, 60.0


class HubError(OSError):
    """The files of a model could not be downloaded. The message says what to do next."""


def fetch(source: str | Path, wanted: FileSets, optional: Iterable[str] = ()) -> Path:
    """Return the local folder with the files of `source`, and download them first if necessary.

    `source` is a local folder, a hub id ("owner/name"), an alias such as "gpt2", or "demo", the
    model in this package. A local folder with such a name comes first; for a folder "demo", this
    function warns with `UserWarning`. `wanted` lists alternative sets of files. This function
    downloads the first set of which the repository has every file. It also downloads the files in
    `optional` that the repository has. The package `huggingface_hub` keeps the downloaded files in
    a cache, and reads environment variables such as HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. If the
    request to the hub fails, but the cached folder of the model has every file of a set, this
    function returns the cached folder.

    Raises `ValueError` if `source` is neither a folder nor a hub id nor an alias. Raises `HubError`
    if the repository or the files do not exist, if a download is interrupted, or if the hub does
    not answer and the cache has no complete set.
    """
    if os.path.isdir(source):
        if source == "demo":
            warnings.warn(
                "'demo' is the folder ./demo here, not the model in this package; write './demo', "
                "or call this in another folder",
                stacklevel=3,
            )
        return Path(source)
    if source == "demo":
        return DEMO
    repo = _hub_id(str(source))

    from huggingface_hub.errors import HfHubHTTPError

    # This request is not retried, so that it fails at once if there is no network connection. We
    # catch every exception, because its type depends on the HTTP library, and different versions
    # of huggingface_hub use different HTTP libraries.
    try:
        names = _listing(repo)
    except Exception as error:
        cached = _cached(repo, wanted)
        if cached:
            return cached
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 404):  # for a private repository, too, so that nobody can guess its name
            raise HubError(
                f"{repo!r} is neither a local folder nor a repository on the hub that you may "
                "read; check the spelling, or log in with `hf auth login` if it is private"
            ) from None
        raise HubError(
            f"{repo!r} is not in the cache and {_answer(status, error)}; "
            "connect once to download it, or pass a folder with its files"
        ) from None

    files = complete_set(wanted, names)
    if not files:
        raise HubError(
            f"{repo!r} on the hub does not have {describe(wanted)}; "
            "choose another repository, or pass a folder with these files"
        )
    files += [name for name in optional if name in names and name not in files]
    downloaded = [_download(repo, file) for file in files]
    return downloaded[0].parent


def _listing(repo: str) -> list[str]:
    """Return the names of the files that the repository has on the hub."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    begun, content = monotonic(), bytearray()
    with get_session().stream(
        "GET",
        f"{constants.ENDPOINT}/api/models/{repo}",
        headers=build_hf_headers(),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    ) as answer:
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > MAX_LISTING:
                raise ValueError(f"its list of files is longer than {MAX_LISTING >> 20} MB")
            if monotonic() - begun > MAX_SECONDS:
                raise TimeoutError(f"its list of files took more than {MAX_SECONDS:.0f} seconds")
    return [str(file["rfilename"]) for file in json.loads(content)["siblings"]]


def complete_set(wanted: FileSets, names: Iterable[str]) -> list[str]:
    """Return the file names that belong to the first complete set of `wanted`.

    `names` are the names of existing files. A set is a tuple of glob patterns, and is complete if
    each pattern matches at least one name. The result has the matching names, in the order of the
    patterns. If no set is complete, the result is [].
    """
    names = sorted(names)
    for patterns in wanted:
        matches = [matching(names, pattern) for pattern in patterns]
        if all(matches):
            return [name for group in matches for name in group]
    return []


def describe(wanted: FileSets) -> str:
    """Return a text that lists sets of files: "tokenizer.json, or vocab.json + merges.txt"."""
    return ", or ".join(" + ".join(patterns) for patterns in wanted)


def _hub_id(name: str) -> str:
    if name in HUB_IDS:
        return HUB_IDS[name]
    if HUB_ID.fullmatch(name):
        return name
    aliases = [*HUB_IDS, "demo"]
    close = get_close_matches(name.lower(), aliases, cutoff=0.8)
    raise ValueError(
        f"{name!r} is not a folder, a hub id (owner/name) or an alias ({', '.join(aliases)})"
        + (f"; did you mean {' or '.join(close)}?" if close else "")
    )


def _answer(status: int | None, error: Exception) -> str:
    """Return the meaning of the hub's HTTP `status` as a text, or `error` if there is no status."""
    if status == 403:
        return "the hub forbids the access (403): accept the conditions on the model's page"
    if status == 429:
        return "the hub got too many requests from here (429): wait some minutes"
    if status is not None and status >= 500:
        return f"the hub has a fault of its own ({status}): try again later"
    return f"the hub does not answer ({_first_line(error)})"


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    cached = try_to_load_from_cache(repo, file)
    before = Path(cached).resolve() if isinstance(cached, str) else None
    try:
        path = Path(hf_hub_download(repo, file))
    except Exception as error:  # many types: the HTTP library, the hub or the file system fails
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = _answer(status, error) if status in (403, 429) else _first_line(error)
        raise HubError(
            f"the download of {file} from {repo!r} failed ({reason}); "
            "try again; an incomplete download is never used"
        ) from None
    if path.resolve() != before:
        _refuse_other_content(repo, path)
    return path


def _refuse_other_content(repo: str, path: Path) -> None:
    """Raise `HubError`, and delete the file, if its SHA-256 hash is not the hash on the hub."""
    # The cache names each file of Git LFS by the SHA-256 hash that the hub announced. The hub gives
    # no hash of this kind for small files.
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    digest = sha256()
    with blob.open("rb") as content:
        while some := content.read(2**20):
            digest.update(some)
    found = digest.hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{path.name} from {repo!r} arrived with another content than the hub announced "
            f"(SHA-256 {found[:12]}… instead of {blob.name[:12]}…); it was deleted; try again"
        )


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
