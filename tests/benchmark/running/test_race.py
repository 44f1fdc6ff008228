"""Contestants take turns, wrong ones are not timed, and a failed one stops no other."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clean_transformer
from clean_transformer.benchmark.running import race as racing_module
from clean_transformer.benchmark.running.models import TINY
from clean_transformer.benchmark.running.processes import Failed, Worker, command, environment
from clean_transformer.benchmark.running.race import CHECKED_NEW, CHECKED_TOKENS, Expected, Race
from clean_transformer.benchmark.running.worker import explain
from clean_transformer.benchmark.work import Measurement, Part, Setup, Work
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.synthetic import stress

from ..made_up import WORK, part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    write_folder(folder, TINY, stress(TINY))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, Any]:
    """Our own answer to the request "check"."""
    model = DemoTransformer.from_pretrained(folder, device="cpu")
    with torch.inference_mode():
        logits = model(torch.tensor(CHECKED_TOKENS))[:, -1]
    return {
        "logits": logits.tolist(),
        "generated": model.generate(torch.tensor(CHECKED_TOKENS[:1]), CHECKED_NEW)[0, 32:].tolist(),
    }


class Fake:
    """Stands in for a process. Its first measurement takes 1 second, its second 2 seconds, …"""

    made: "list[Fake]"
    ours: dict[str, Any]

    def __init__(self, command: list[str]):
        self.name = ""
        self.sent: list[str] = []
        self.measured = 0
        self.asked: list[tuple[int, float]] = []
        self.closed = False
        self.made.append(self)

    def send(self, request: dict[str, Any]) -> None:
        self.name = request.get("contestant", self.name)
        self.sent.append(request["do"])

    def receive(self) -> Any:
        if self.sent.pop(0) == "load":
            if self.name == "onnxruntime":
                raise Failed("it is not installed")
            return f"the {self.name}"
        logits, (one, *others) = self.ours["logits"], self.ours["generated"]
        worst = min(range(len(logits[0])), key=logits[0].__getitem__)
        wrong = {
            "watched": {"logits": logits[::-1]},
            "compiled": {"logits": [[math.nan for _ in row] for row in logits]},
            "llama.cpp": {"generated": [worst, *others]},
            "CTranslate2": {"generated": [one, worst, *others[1:]]},
        }
        return self.ours | wrong.get(self.name, {})

    def ask(self, do: str, **request: Any) -> Any:
        assert not self.closed
        assert do == "measure"
        assert not self.sent
        if self.name == "TransformerBridge":
            raise Failed("it has no room")
        self.measured += 1
        self.asked.append((request["work"]["new"], request["at_least"]))
        if self.name == "transformers eager" and self.measured == 3:
            raise Failed("it ran out of memory")
        return float(self.measured)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def race(
    folder: Path, ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Race]]:
    monkeypatch.setattr(Fake, "made", [], raising=False)
    monkeypatch.setattr(Fake, "ours", ours, raising=False)

    def make(**settings: Any) -> Race:
        return Race({"small": folder}, 1, "python", start=Fake, **settings)

    yield make
    assert all(fake.closed for fake in Fake.made)


def test_contestants_take_turns_in_rotating_order(race: Callable[..., Race]):
    parts = part("ours"), part("optimized"), part("limit")
    turns: list[Part] = []
    results = race().run([Measurement("forward", parts, 2)], turns.append)
    a, b, c = parts
    assert turns == [a, b, c, b, c, a, c, a, b]
    # The first round warms up.
    assert [result.values for result in results] == [[2.0, 3.0]] * 3
    assert [result.kl_divergence for result in results] == [0.0, 0.0, None]
    assert [result.title for result in results] == ["the ours", "the optimized", "the limit"]


def test_warming_up_takes_one_call_and_few_tokens(race: Callable[..., Race]):
    generating = Part(part("ours").setup, Work(kind="generate", length=16, new=64))
    race(at_least=0.5).run([Measurement("generate", (generating,), 2)])
    [fake] = Fake.made
    assert fake.asked == [(4, 0.0), (64, 0.5), (64, 0.5)]


def test_the_divergence_is_the_one_of_the_check(race: Callable[..., Race]):
    apart = Part(part("optimized").setup, Work(kind="divergence"))
    [found] = race().run([Measurement("divergence", (apart,), 1)])
    assert found.values == [found.kl_divergence] == [0.0]
    assert Fake.made[0].measured == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_short_context_warms_up_for_a_long_one_where_it_runs_the_same_code(device: str):
    step = Part(Setup(contestant="ours", device=device), Work(kind="step", length=960, new=48))
    length = 64 if device == "cpu" else 960
    assert step.warm_up == Work(kind="generate", length=length, new=4)


@pytest.mark.parametrize(
    ("contestant", "why"),
    [
        ("onnxruntime", "it is not installed"),
        ("TransformerBridge", "it has no room"),
        ("transformers eager", "it ran out of memory"),
        ("watched", "its logits are"),
        ("compiled", "its logits are nan"),
    ],
)
def test_a_contestant_that_fails_or_computes_something_else_is_not_measured(
    contestant: str, why: str, race: Callable[..., Race]
):
    measurement = Measurement("forward", (part(contestant), part("ours")), 2)
    failed, ours = race().run([measurement])
    assert failed.values == []
    assert why in failed.why
    assert (len(ours.values), ours.why) == (2, "")


@pytest.mark.parametrize("contestant", ["llama.cpp", "CTranslate2"])
def test_a_contestant_that_generates_wrong_tokens_is_measured_where_it_generates_none(
    contestant: str, race: Callable[..., Race]
):
    forward = part(contestant)
    kinds = Work(kind="generate", length=16, new=4), Work(kind="step", length=16, new=4)
    generating = (Part(forward.setup, work) for work in kinds)
    results = race().run([Measurement("all", (forward, *generating), 2)])
    assert [len(result.values) for result in results] == [2, 0, 0]
    assert all("it generates a token" in result.why for result in results[1:])


def test_hooked_transformer_without_its_environment_is_not_measured(race: Callable[..., Race]):
    racing = race()
    racing.hooked_python = None
    [failed] = racing.run([Measurement("forward", (part("HookedTransformer"),), 1)])
    assert "needs --hooked-python" in failed.why


def test_a_model_that_is_too_large_is_not_measured(race: Callable[..., Race]):
    large = Part(Setup(contestant="ours", model="xl"), WORK)
    racing = race(missing={"xl": "xl needs 19 GB"})
    [failed] = racing.run([Measurement("size", (large,), 1)])
    assert failed.why == "xl needs 19 GB"


def test_a_process_lives_as_long_as_it_is_needed(race: Callable[..., Race]):
    alive: list[list[bool]] = []

    def look(_: Part) -> None:
        alive.append([not fake.closed for fake in Fake.made])

    measurements = [
        Measurement("one", (part("ours"), part("limit")), 0),
        Measurement("two", (part("ours"),), 0),
    ]
    race().run(measurements, look)
    assert alive == [[True, True], [True, True], [True, False]]


def test_contestants_load_and_are_checked_together(race: Callable[..., Race]):
    asked: list[tuple[str, str, int]] = []

    class Counting(Fake):
        working = 0

        def send(self, request: dict[str, Any]) -> None:
            super().send(request)
            Counting.working += 1
            asked.append((request["do"], self.name, Counting.working))

        def receive(self) -> Any:
            Counting.working -= 1
            return super().receive()

    racing = race()
    racing.start = Counting
    parts = (part("optimized"), part("ours"), part("optimized", "bfloat16"), part("limit"))
    racing.run([Measurement("forward", parts, 0)])
    assert asked == [
        ("load", "optimized", 1),
        ("load", "ours", 2),
        ("load", "optimized", 3),
        ("load", "limit", 4),
        ("check", "optimized", 1),
        ("check", "ours", 2),
        ("check", "optimized", 3),
    ]


def test_after_a_tie_of_two_tokens_another_text_is_right(race: Callable[..., Race]):
    racing, setup = race(), part("ours").setup
    tie, other = [0.0, 9.0, 9.0], [9.0, 0.0, 0.0]
    racing.expected["small"] = Expected(torch.zeros(1, 3), torch.tensor([other, tie, other]))
    for generated in ([0, 1, 0], [0, 2, 0], [0, 2, 1]):
        racing.require_agreement(setup, {"logits": None, "generated": generated})
    for generated in ([1, 1, 0], [0, 0, 0], [0, 1, 1]):
        with pytest.raises(Failed, match=r"1\.7 standard deviations below the largest"):
            racing.require_agreement(setup, {"logits": None, "generated": generated})


def test_processes_end_with_the_run(race: Callable[..., Race]):
    def stop(_: Part) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race().run([Measurement("one", (part("ours"),), 1)], stop)


@pytest.mark.slow
def test_a_real_process(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Ours in a process of its own, with as little time for each measurement as possible."""
    monkeypatch.setattr(racing_module, "CHECKED_TOKENS", [[1, 2, 3]])
    racing = Race({"small": folder}, 1, at_least=0.0)
    works = [
        Work(kind="forward", batch=2, length=4),
        Work(kind="forward", length=4, last_only=True),
        Work(kind="generate", length=4, new=2),
        Work(kind="step", length=4, new=2),
        Work(kind="capture", length=4),
        Work(kind="load"),
        Work(kind="first_use"),
        Work(kind="train", batch=2, length=4),
        Work(kind="sleep"),
    ]
    parts = tuple(part("ours", work=work) for work in works)
    trained = part("limit", work=Work(kind="train", batch=2, length=4))
    forward = part("limit", work=works[0])
    *results, unknown = racing.run([Measurement("all", (forward, trained, *parts), 1)])
    for result in results:
        assert result.values or "lost in the noise" in result.why, result.why
    for result in results[:2]:
        assert isinstance(result.values[0], float), result.why
    assert unknown.why == "ValueError: there is no kind of work 'sleep'"


def test_a_process_that_dies_reports_its_last_line():
    worker = Worker([sys.executable, "-c", "raise SystemExit('out of memory')"])
    with pytest.raises(Failed, match="ended with status 1: out of memory"):
        worker.ask("load")
    worker.close()


def test_hooked_transformer_runs_in_its_own_environment():
    assert command("HookedTransformer", "/other/python")[0] == "/other/python"
    assert command("ours", "/other/python")[0] == sys.executable


def test_a_worker_of_another_environment_gets_this_package_alone():
    """Not its neighbors, which may be in `site-packages`."""
    folder = Path(environment()["PYTHONPATH"])
    [link] = folder.iterdir()
    assert link.resolve() == Path(clean_transformer.__file__).parent


def test_a_package_that_is_not_installed_is_named():
    error = ModuleNotFoundError("No module named 'llama_cpp.x'", name="llama_cpp.x")
    assert explain(error) == "llama_cpp is not installed"
    assert explain(ValueError("too large\nfor this")) == "ValueError: too large"
