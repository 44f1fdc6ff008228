"""The commands for text: what they print for people and programs, and how they end."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from clean_transformer.analysis.prediction import predict
from clean_transformer.cli.terminal import write_json
from clean_transformer.demo import stories
from clean_transformer.model import DemoTransformer
from clean_transformer.weights import hub, load
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.hub import HubError

from ..helpers import reading_model
from .running import assert_one_line, call

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    reading_model(b_U=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> DemoTransformer:
    return DemoTransformer.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def out(folder: Path):
    """Runs a command on that model, and gives what it prints."""

    def run(*arguments: object, stdin: str | None = None) -> str:
        result = call(*arguments, "--weights", folder, stdin=stdin)
        assert result.exit_code == 0, result.output
        about = "about " * ("--stream" in arguments)
        speed = rf"{about}\d+ tokens in [\d.e-]+ s, {about}[\d.e+]+ tokens/s\n"
        assert re.fullmatch(speed if arguments[0] == "generate" else "", result.stderr)
        return result.stdout

    return run


SETTINGS = ("--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 4)
PENALTIES = ("--repetition-penalty", 1.3, "--frequency-penalty", 0.2)
DRAWN = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 4}
MIN_P = {"temperature": 3.0, "min_p": 0.5, "seed": 4}
PENALISED = {"repetition_penalty": 1.3, "frequency_penalty": 0.2}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ((), {}),
        (SETTINGS + PENALTIES, DRAWN | PENALISED),
        (("--min-p", 0.5, "--temperature", 3, "--seed", 4), MIN_P),
        (("--beams", 3, *PENALTIES), {"beams": 3} | PENALISED),
        (("--stop", "a", "--stop", "e", *SETTINGS), {"stop_strings": ["a", "e"]} | DRAWN),
    ],
)
def test_generate_gives_what_the_model_generates(out, model, arguments, settings: dict):
    text = model.generate("the cat", 9, **settings)
    assert out("generate", "the cat", "-n", 9, *arguments) == text + "\n"
    read = json.loads(out("generate", "the cat", "--tokens", 9, "--json", "-", *arguments))
    assert read["prompt"] + read["completion"] == text
    assert read["prompt_tokens"] == model.to_tokens("the cat")[0].tolist()
    ids = model.generate([read["prompt_tokens"]], 9, **settings)[0]
    assert read["tokens"] == ids[len(read["prompt_tokens"]) :]
    if "beams" not in settings:
        assert out("generate", "the cat", "-n", 9, "--stream", *arguments) == text + "\n"


@pytest.mark.parametrize("command", ["generate", "predict", "tokens"])
def test_the_text_may_come_from_anywhere(out, command: str, tmp_path: Path):
    (tmp_path / "text").write_text(" the cat\n", encoding="utf-8")
    printed = out(command, " the cat", "--json", "-")
    assert out(command, "--json", "-", stdin=" the cat\n") == printed
    assert out(command, "-", "--json", "-", stdin=" the cat\n") == printed
    assert out(command, "--file", tmp_path / "text", "--json", "-") == printed


def test_predict(out, model):
    prediction = predict(model, "the cat", 3)
    read = json.loads(out("predict", "the cat", "--top", 3, "--json", "-"))
    for name in ("top", "bottom"):
        scores = [vars(score) for score in getattr(prediction, name)]
        words = [{"token": model.to_string([score["id"]])} for score in scores]
        assert read[name] == [score | word for score, word in zip(scores, words, strict=True)]
    ids = model.to_tokens("the cat")[0].tolist()
    assert [token["id"] for token in read["tokens"]] == ids
    assert [token["token"] for token in read["tokens"]] == model.to_str_tokens("the cat")
    chances, losses = prediction.token_probabilities.tolist(), prediction.losses.tolist()
    assert [token["probability"] for token in read["tokens"]] == [None, *chances]
    assert [token["loss"] for token in read["tokens"]] == [None, *losses]

    printed = out("predict", "the cat", "--top", 3)
    for score in prediction.top + prediction.bottom:
        assert any(
            all(word in line.split() for word in (str(score.id), f"{score.probability:.4g}"))
            for line in printed.splitlines()
        )
    assert f"mean loss {prediction.losses.mean():.4g} nats per token" in printed


def test_tokens(out):
    read = json.loads(out("tokens", " the cat", "--json", "-"))
    assert read["tokens"] == ["<|endoftext|>", " the", " cat"]
    assert (
        json.loads(out("tokens", " the cat", "--json", "-", "--no-bos"))["ids"] == read["ids"][1:]
    )
    printed = out("tokens", " the cat[bold]")
    assert [line.split()[1::2] for line in printed.splitlines()[5:7]] == [
        ["1", "·the", str(read["ids"][1])],
        ["2", "·cat", str(read["ids"][2])],
    ]


def test_info(out, model):
    printed = call("info").stdout
    assert "124,490,065 parameters" in printed
    assert "W_Q   [head d_model d_head]  12 × 768 × 64  = 589,824" in printed
    assert "474.9 MiB of parameters in float32" in printed
    assert "72.0 MiB of keys and values for 1024 positions" in printed
    read = json.loads(out("info", "--json", "-", "--dtype", "float16"))
    assert read["cfg"] == model.cfg.to_dict()
    shapes = {name: [*value.shape] for name, value in model.state_dict().items()}
    assert read["parameters"] == shapes
    assert read["count"] == sum(value.numel() for value in model.state_dict().values())
    assert read["bytes"]["parameters"] == 2 * read["count"]


# What cannot be done.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", -1), "temperature is -1.0; it must be 0 or a positive number"),
        (("--top-k", 5), "top_k is 5; it must be None at temperature 0"),
        (("--stream", "--beams", 2), "--stream cannot be combined with --beams or --json"),
        (("--stream", "--json", "-"), "--stream cannot be combined with --beams or --json"),
        (("--file", "x"), "there are two texts"),
        (("--dtype", "fp8"), "no dtype 'fp8'; choose from float64, float32, bfloat16, float16"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--tokens", 58), "3 tokens and 58 new ones are more than the n_ctx=60 positions"),
        (("--stop", ""), "a stop string is empty"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_done(folder: Path, arguments, message: str):
    assert_one_line(call("generate", " the cat", "--weights", folder, *arguments), message)


def test_a_text_without_quotes():
    unquoted = call("generate", "Once", "upon", "a", "time")
    assert unquoted.exit_code == 2
    assert "Put quotes around a text" in unquoted.output
    assert "quotes" not in call("info", "demo").output


@pytest.mark.parametrize("command", ["generate", "predict", "tokens"])
def test_an_empty_text_is_refused(command: str, folder: Path):
    assert_one_line(call(command, "", "--weights", folder), "the text is empty")
    assert_one_line(call(command, "--weights", folder, stdin="\n"), "the text is empty")


def test_settings_are_refused_before_the_weights_are_read():
    result = call("generate", "text", "--weights", "no/such/folder", "--top-k", 5)
    assert_one_line(result, "top_k is 5; it must be None at temperature 0")


@pytest.mark.parametrize("command", ["generate", "predict", "tokens", "info"])
def test_2_and_one_line_for_what_is_no_source(command: str):
    text = () if command == "info" else ("text",)
    result = call(command, *text, "--weights", "no/such/folder")
    assert_one_line(result, "'no/such/folder' is not a folder")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = hub.fetch

    def fetch_here(source: str, wanted: hub.FileSets, optional: tuple[str, ...] = ()) -> Path:
        if source == "gpt2":
            raise HubError("the hub cannot be asked; pass a folder with its files")
        return fetch(source, wanted, optional)

    for module in (hub, load):
        monkeypatch.setattr(module, "fetch", fetch_here)


def test_tokens_come_from_one_tokenizer(folder: Path):
    result = call("tokens", "the", "--weights", "/none", "--tokenizer", folder)
    assert_one_line(result, "--weights and --tokenizer both name a tokenizer")


@pytest.mark.parametrize("command", ["generate", "predict", "tokens"])
def test_the_demo_stands_in_for_gpt2_where_the_hub_is_out_of_reach(command: str, no_hub: None):
    result = call(command, "Once upon a time")
    assert result.exit_code == 0
    note = result.stderr.splitlines()[0]
    assert note.startswith(
        "note: gpt2 cannot be downloaded (--weights gpt2 says why); this is demo"
    )
    assert len(note.split()) < 25
    named = call(command, "Once upon a time", "--weights", "demo")
    assert named.stdout == result.stdout
    assert "note" not in named.stderr
    refused = call(command, "Once upon a time", "--weights", "gpt2")
    assert_one_line(refused, "error: the hub cannot be asked")


def test_the_demo_tells_a_whole_story_with_nothing_downloaded(with_hub):
    code = "from clean_transformer.cli import app; app(['generate', 'Once upon a time'])"
    run = with_hub(code, HF_HUB_OFFLINE="1")
    assert "this is demo" in run.stderr
    assert stories.parse(run.stdout.removesuffix("\n")) is not None


def test_the_demo_writes_as_many_tokens_as_it_is_told_to():
    read = json.loads(call("generate", "Once", "--weights", "demo", "-n", 7, "--json", "-").stdout)
    assert len(read["tokens"]) == 7
    too_long = call("generate", "Once " * 200, "--weights", "demo")
    assert_one_line(too_long, "more than the n_ctx=180 positions")


def test_numbers_that_json_has_not_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", loss=math.nan)
    assert not [*tmp_path.iterdir()]


def test_weights_without_a_tokenizer_take_another(folder: Path, tmp_path: Path, out):
    model = DemoTransformer.from_pretrained(folder, device="cpu")
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    write_folder(tmp_path, model.cfg, model.state_dict())
    for command in ("generate", "predict"):
        result = call(command, "the cat", "--weights", tmp_path)
        assert_one_line(result, "has no tokenizer; put tokenizer.json, or vocab.json + merges.txt")
        result = call(command, "the cat", "--weights", tmp_path / "a.pt")
        assert_one_line(
            result, "a.pt holds no tokenizer of GPT-2; name another one with --tokenizer"
        )
        result = call(command, "the cat", "--weights", tmp_path, "--tokenizer", folder)
        assert result.stdout == out(command, "the cat")
    result = call("tokens", "the cat", "--tokenizer", folder)
    assert result.stdout == out("tokens", "the cat")


@pytest.mark.parametrize("command", ["generate", "predict", "tokens", "info"])
def test_json_goes_to_a_file_beside_the_text_or_alone_to_standard_output(
    out, tmp_path: Path, command: str
):
    text = () if command == "info" else ("the cat",)
    file = tmp_path / "a.json"
    assert out(command, *text, "--json", file) == out(command, *text)
    assert json.loads(file.read_text()) == json.loads(out(command, *text, "--json", "-"))
    assert_one_line(call(command, *text, "--json", "no/a.json"), "no folder 'no' for 'a.json'")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--stream",),
        (),
        (
            "--json",
            "-",
        ),
    ],
)
def test_130_where_it_is_broken_off(folder: Path, model, monkeypatch, arguments):
    module, calls = type(model.unembed), []
    forward = module.forward

    def break_off(*inputs):
        calls.append(inputs)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(*inputs)

    monkeypatch.setattr(module, "forward", break_off)
    result = call("generate", " the cat", "--weights", folder, *arguments)
    assert result.exit_code == 130
    assert result.stderr.strip() == "stopped"
    assert result.stdout.startswith(" the cat") == ("--stream" in arguments)
