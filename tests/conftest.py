# Before the first import of the package, whose functions the module decorates.
from . import type_checks  # noqa: F401

# isort: split
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from benchmarks.healthy_settings import threads
from clean_transformer.config import Config
from clean_transformer.parity.references.choose import REFERENCES, choose_reference
from clean_transformer.support.devices import is_available

from .helpers import Watched, quietly, random_model, random_tokens
from .hub_server import HubServer, serving
from .parity.small import model_only

settings.register_profile("tests", deadline=None, max_examples=25)
settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


# How many slow tests were left out. With pytest-xdist, each worker leaves out the same tests.
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that compare with the installed reference, and those that start a browser."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "installed" in fixtures:
            item.add_marker("reference")
        if "driven" in fixtures:
            item.add_marker("slow")


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that `-m "not slow"` leaves out. `-k` also leaves out other tests."""
    if items and all(item.get_closest_marker("slow") for item in items):
        items[0].config.stash[LEFT_OUT] = len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist, send the count of left-out tests to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the main process of pytest-xdist, keep the largest count that a worker has sent."""
    found = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[LEFT_OUT] = max(found, node.config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the closing lines: which planted faults were caught, and which tests did not run."""
    for line in (*planted_lines(terminalreporter), *skipped_lines(terminalreporter)):
        terminalreporter.write_line(line)
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} slow tests were left out; `make test-all` runs them"
        )


def planted_lines(terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    """Yield how many planted faults of each kind were caught. The fixture `planted` records it."""
    calls = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
    ]
    counts = Counter(
        what for call in calls for name, what in call.user_properties if name == "planted"
    )
    for kind in ("semantic", "device"):
        if planted := counts[kind]:
            caught, attributed = counts[f"{kind} caught"], counts[f"{kind} attributed"]
            yield f"planted {kind} faults: {caught} of {planted} caught, {attributed} attributed"


def skipped_lines(terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    """Yield how many tests were skipped for each reason, the most frequent reason first."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        yield f"{count} skipped: {reason}"


@pytest.fixture
def planted(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """A function that records a planted fault as tried, caught or attributed, for the summary."""
    return partial(record_property, "planted")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed PyTorch, so that a test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Use one thread: tests run in parallel on small tensors, where more threads cost time."""
    with threads(1):
        yield


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hugging Face hub on this machine. A test creates a repository as a folder in `repos`."""
    with serving(tmp_path / "repos") as server:
        yield server


@pytest.fixture
def with_hub(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs Python code in a fresh process, which uses `hub` and an empty cache.

    The process must be fresh, because `huggingface_hub` reads environment variables only when it is
    imported. The standard error of the process is what a user would see.
    """

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=outside | ours | variables,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(params=["cpu", "cuda", "mps"])
def device(request: pytest.FixtureRequest) -> str:
    """Run the test once for each kind of device. Skip the devices that this machine lacks."""
    if not is_available(request.param):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    """The most precise floating-point dtype of the device."""
    return torch.float32 if device == "mps" else torch.float64


@pytest.fixture(scope="session")
def installed() -> str:
    """The best reference in this environment, such as "bridge" or "hooked"."""
    return choose_reference("auto")[0] or pytest.skip("no reference is installed")


@pytest.fixture(scope="session")
def theirs(installed: str) -> Watched:
    """A run of the installed reference on random weights, with all activations that it caches."""
    cfg = Config(
        n_layers=12,
        n_heads=3,
        d_model=24,
        # If W_Q and W_O were square, a test could miss a transposition. Only HookedTransformer
        # allows n_heads · d_head ≠ d_model.
        d_head=5 if installed == "hooked" else 8,
        d_mlp=40,
        d_vocab=101,
        n_ctx=11,
        tied_unembed=False,
    )
    state = random_model(cfg).state_dict()
    tokens = random_tokens(cfg, batch=2, length=9)
    reference = quietly(REFERENCES[installed], cfg, state)
    with torch.no_grad():
        cache = reference.run(tokens)
    named = {reference.aliases.get(key, key): value for key, value in cache.items()}
    return Watched(cfg, state, tokens, named)


@pytest.fixture
def model_alone() -> Iterator[None]:
    with model_only():
        yield
