import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from clean_transformer.config import Config
from clean_transformer.parity import invariants
from clean_transformer.parity.activations.drift import threads
from clean_transformer.parity.operations import probes
from clean_transformer.parity.references.choose import REFERENCES, choose_reference
from clean_transformer.support.devices import is_available

from .helpers import Watched, quietly, random_model, random_tokens
from .hub_server import HubServer, serving

settings.register_profile("tests", deadline=None, max_examples=25)
settings.load_profile("tests")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def planted(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Tells of a planted fault that it was tried, caught or attributed: counted at the end."""
    return partial(record_property, "planted")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
            terminalreporter.write_line(
                f"planted {kind} faults: {caught} of {planted} caught, {attributed} attributed"
            )


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same ones, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors as small as these; tests run side by side."""
    with threads(1):
        yield


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub on this machine, whose repositories are the folders that a test puts in `repos`."""
    with serving(tmp_path / "repos") as server:
        yield server


@pytest.fixture
def with_hub(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a process of its own that has `hub` for its hub and an empty cache.

    `huggingface_hub` reads its environment variables when it is imported, so that only a new
    process shows what they do; and this one's standard error is what a user would see.
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
    """Every kind of device; those that this machine lacks are skipped."""
    if not is_available(request.param):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def dtype(device: str) -> torch.dtype:
    """The most exact numbers that the device has."""
    return torch.float32 if device == "mps" else torch.float64


@pytest.fixture(scope="session")
def installed() -> str:
    """The version of TransformerLens in this environment."""
    return choose_reference("auto")[0] or pytest.skip("no reference is installed")


@pytest.fixture(scope="session")
def theirs(installed: str) -> Watched:
    """The installed TransformerLens, which has run on random weights."""
    cfg = Config(
        n_layers=12,
        n_heads=3,
        d_model=24,
        # Square W_Q and W_O hide a transposition; only HookedTransformer can have others.
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
def model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_device` without what has tests of its own: a fresh process and single operations."""
    here = [check for check in invariants.INVARIANTS if check.__name__ != "fresh_process"]
    monkeypatch.setattr(invariants, "INVARIANTS", here)
    monkeypatch.setattr(probes, "PROBES", ())
