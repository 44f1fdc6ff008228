import socket
from pathlib import Path

import pytest

from clean_transformer.weights.hub import (
    DEMO,
    HUB_IDS,
    TOKENIZER,
    FileSets,
    complete_set,
    fetch,
)
from clean_transformer.weights.load import WEIGHTS

SHARDS = [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
INDEX = "model.safetensors.index.json"
OPENAIS = [
    "hparams.json",
    "checkpoint",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
]
OTHER_FORMATS = [
    "README.md",
    "flax_model.msgpack",
    "generation_config.json",
    "model.safetensors.index.fp16.json",
    "tf_model.h5",
]


def fetching(source: str, wanted: FileSets = WEIGHTS) -> str:
    # The process does not import PyTorch, which takes seconds.
    return (
        "from clean_transformer.weights.hub import fetch; import sys;"
        f"print(fetch({source!r}, {wanted!r})); assert 'torch' not in sys.modules"
    )


def publish(hub, repo: str, *names: str) -> None:
    """Each file contains the name of the repository and its own name, many times."""
    folder = hub.repos / repo
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{repo} {name} " * 50)


def last_line(process) -> str:
    """The message of the only error in the traceback, which ended the process."""
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    return process.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["config.json", "model.safetensors"]),
        ([INDEX, *SHARDS, "pytorch_model.bin"], ["config.json", INDEX, *SHARDS]),
        (["pytorch_model.bin", *OPENAIS], ["config.json", "pytorch_model.bin"]),
        (OPENAIS, OPENAIS),
    ],
)
def test_only_the_preferred_weights_are_downloaded(hub, with_hub, names, chosen):
    publish(hub, "someone/model", "config.json", *names, *OTHER_FORMATS)

    process = with_hub(fetching("someone/model"))

    assert hub.downloaded == chosen, process.stderr
    folder = Path(process.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted(chosen)
    for path in folder.iterdir():
        assert path.read_text() == (hub.repos / "someone/model" / path.name).read_text()


@pytest.mark.parametrize(
    "chosen", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["encoder.json", "vocab.bpe"]]
)
def test_only_the_tokenizer_is_downloaded(hub, with_hub, chosen):
    publish(hub, "someone/model", "config.json", "model.safetensors", *chosen, *OTHER_FORMATS)
    process = with_hub(fetching("someone/model", TOKENIZER))
    assert hub.downloaded == chosen, process.stderr


def test_the_download_shows_its_progress(hub, with_hub):
    publish(hub, "someone/model", "config.json", "model.safetensors")
    process = with_hub(fetching("someone/model"), TQDM_POSITION="-1")  # as on a terminal
    assert "model.safetensors: 100%" in process.stderr


def test_an_alias_is_its_hub_id(hub, with_hub):
    publish(hub, "openai-community/gpt2-xl", "tokenizer.json")
    folder = Path(with_hub(fetching("gpt2-xl", TOKENIZER)).stdout.strip())
    assert (folder / "tokenizer.json").read_text().startswith("openai-community/gpt2-xl")


def test_the_aliases_are_the_published_gpt2s():
    sizes = {f"gpt2-{size}": f"openai-community/gpt2-{size}" for size in ("medium", "large", "xl")}
    smallest = dict.fromkeys(["gpt2", "gpt2-small"], "openai-community/gpt2")
    assert smallest | sizes | {"distilgpt2": "distilbert/distilgpt2"} == HUB_IDS


def test_what_is_cached_is_not_downloaded_again(hub, with_hub):
    publish(hub, "someone/model", "config.json", "model.safetensors")
    first = with_hub(fetching("someone/model"))
    again = with_hub(fetching("someone/model"))
    assert again.stdout == first.stdout != ""
    assert hub.downloaded == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "how",
    ["offline", *(pytest.param(how, marks=pytest.mark.slow) for how in ("unreachable", "failing"))],
)
def test_without_the_hub_the_cached_copy_is_taken(hub, with_hub, how):
    names = ["config.json", INDEX, *SHARDS]
    publish(hub, "someone/model", *names)
    first = with_hub(fetching("someone/model"))
    hub.faults["someone/model"] = how

    again = with_hub(fetching("someone/model"), **WITHOUT_HUB[how])

    assert again.stdout == first.stdout != "", again.stderr
    assert hub.downloaded == names


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


WITHOUT_HUB = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "unreachable": {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"},
    "failing": {},
    "silent": {"HF_HUB_ETAG_TIMEOUT": "1"},
}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("offline", "OfflineModeIsEnabled"),
        pytest.param("unreachable", "Connection refused", marks=pytest.mark.slow),
        pytest.param("failing", "503", marks=pytest.mark.slow),
        pytest.param("silent", "Timeout", marks=pytest.mark.slow),
    ],
)
def test_without_the_hub_and_a_cached_copy(hub, with_hub, how, why):
    publish(hub, "someone/model", "config.json", "model.safetensors", "tokenizer.json")
    with_hub(fetching("someone/model", TOKENIZER))  # of the same repository, but no weights
    hub.faults["someone/model"] = how

    # `with_hub` has a time limit, in case the process waits forever.
    error = last_line(with_hub(fetching("someone/model"), **WITHOUT_HUB[how]))

    assert error.startswith("clean_transformer.weights.hub.HubError: 'someone/model' is not in the")
    assert why in error
    assert error.endswith("connect once to download it, or pass a folder with its files")


@pytest.mark.parametrize(("source", "status"), [("gpt2", 401), ("nobody/nothing", 404)])
def test_a_repository_that_the_hub_does_not_have(hub, with_hub, source, status):
    hub.status_of_unknown = status
    error = last_line(with_hub(fetching(source)))
    assert f"HubError: {HUB_IDS.get(source, source)!r} is neither a local folder nor a" in error
    assert "check the spelling" in error


def test_a_repository_without_the_files(hub, with_hub):
    publish(hub, "someone/model", "config.json", INDEX, "model.onnx", *OTHER_FORMATS)
    error = last_line(with_hub(fetching("someone/model")))
    assert "HubError: 'someone/model' on the hub does not have config.json + model.saf" in error
    assert error.endswith("choose another repository, or pass a folder with these files")
    assert hub.downloaded == []


@pytest.mark.parametrize(
    "fault", ["short", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("cut", "gone"))]
)
def test_a_download_that_breaks_off(hub, with_hub, fault):
    publish(hub, "someone/model", "config.json", "model.safetensors")
    hub.faults["model.safetensors"] = fault

    error = last_line(with_hub(fetching("someone/model")))
    assert "HubError: the download of model.safetensors from 'someone/model' failed (" in error
    assert error.endswith("try again; an incomplete download is never used")

    del hub.faults["model.safetensors"]
    folder = Path(with_hub(fetching("someone/model")).stdout.strip())
    whole = hub.repos / "someone/model" / "model.safetensors"
    assert (folder / "model.safetensors").read_text() == whole.read_text()


def test_another_content_of_the_same_length_is_not_kept(hub, with_hub):
    publish(hub, "someone/model", "config.json", "model.safetensors")
    hub.faults["model.safetensors"] = "other"
    error = last_line(with_hub(fetching("someone/model")))
    assert "HubError: model.safetensors from 'someone/model' arrived with another content" in error

    del hub.faults["model.safetensors"]
    folder = Path(with_hub(fetching("someone/model")).stdout.strip())
    whole = hub.repos / "someone/model" / "model.safetensors"
    assert (folder / "model.safetensors").read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        ("403", "the hub forbids the access (403): accept the conditions"),
        pytest.param("429", "too many requests from here (429): wait", marks=pytest.mark.slow),
        pytest.param("500", "the hub has a fault of its own (500)", marks=pytest.mark.slow),
    ],
)
def test_what_a_status_means(hub, with_hub, status: str, meaning: str):
    publish(hub, "someone/model", "config.json", "model.safetensors")
    hub.faults["someone/model"] = status
    assert meaning in last_line(with_hub(fetching("someone/model")))


LISTINGS = {
    "long": "longer than 1 MB",
    "slow": "took more than 1 seconds",
    "[" * 100_000: "RecursionError",
    "[1]": "TypeError",
    '{"siblings": [{"rfilename"': "JSONDecodeError",
    '{"id": "someone/model"}': "KeyError: 'siblings'",
    '{"siblings": [{"rfilename": "../../config.json"}, {"rfilename": null}]}': "does not have conf",
}


def test_a_listing_that_is_none(hub, with_hub):
    for number, listing in enumerate(LISTINGS):
        publish(hub, f"someone/model{number}", "config.json", "model.safetensors")
        hub.faults[f"someone/model{number}"] = listing
    process = with_hub(f"""
from clean_transformer.weights import hub
from clean_transformer.weights.load import WEIGHTS
hub.MAX_LISTING, hub.MAX_SECONDS = 2**20, 1
for number in range({len(LISTINGS)}):
    try:
        hub.fetch(f"someone/model{{number}}", WEIGHTS)
    except hub.HubError as error:
        print(error)
""")
    errors = process.stdout.splitlines()
    assert len(errors) == len(LISTINGS), process.stderr
    for number, (error, expected) in enumerate(zip(errors, LISTINGS.values(), strict=True)):
        assert error.startswith(f"'someone/model{number}' ")
        assert expected in error
        assert len(error) < 500


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_folder_is_returned_as_it_is(tmp_path, as_type):
    assert fetch(as_type(tmp_path), WEIGHTS) == tmp_path


@pytest.mark.parametrize(
    ("source", "suggested"),
    [
        ("gpt2-smal", "gpt2-small"),
        ("GPT2", "gpt2"),
        ("gpt2_medium", "gpt2-medium"),
        ("gpt-2", "gpt2"),
    ],
)
def test_an_unknown_alias(source, suggested):
    with pytest.raises(ValueError, match=f"'{source}' is not a folder.*did you mean.*{suggested}"):
        fetch(source, TOKENIZER)


@pytest.mark.parametrize(
    "source", ["bert", "", "./model", "/no/folder", Path("../model"), "a/b/c", "a--b/c", "a/b."]
)
def test_a_source_that_is_nothing_of_the_known(source):
    with pytest.raises(ValueError, match=r"alias \(gpt2, gpt2-small, .*, distilgpt2, demo\)$"):
        fetch(source, WEIGHTS)


def test_the_set_in_full_is_chosen_and_keeps_its_order():
    assert complete_set(TOKENIZER, ["merges.txt", "vocab.json"]) == ["vocab.json", "merges.txt"]
    assert complete_set(TOKENIZER, ["encoder.json", "vocab.json"]) == []
    assert complete_set(WEIGHTS, [*reversed(SHARDS), INDEX, "config.json"])[2:] == SHARDS


def test_a_folder_with_the_name_of_the_demo_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch("demo", WEIGHTS) == DEMO
    Path("demo").mkdir()
    with pytest.warns(UserWarning, match=r"'demo' is the folder ./demo here, not the model in"):
        assert fetch("demo", WEIGHTS) == Path("demo")
    assert fetch("./demo", WEIGHTS) == Path("demo")
