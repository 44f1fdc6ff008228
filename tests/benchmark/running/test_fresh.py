"""Peak memory, which is measured in a fresh process."""

import sys
from pathlib import Path

import pytest
import torch

from clean_transformer.benchmark.running import fresh
from clean_transformer.benchmark.running.fresh import costs, in_use, peak, peak_bytes

LARGE = 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_freed_memory_counts_only_in_the_peak():
    before = in_use("cpu")
    held = torch.ones(LARGE // 4)
    assert in_use("cpu") >= before + 0.9 * LARGE
    del held
    assert in_use("cpu") < before + 0.5 * LARGE
    assert peak("cpu") >= before + 0.9 * LARGE


def test_a_gpu_counts_its_own_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 3)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7)
    assert (in_use("cuda"), peak("cuda")) == (3, 7)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_the_costs_of_a_command():
    code = f"import os; held = bytearray({LARGE}); os.makedirs('here'); raise SystemExit(3)"
    found = costs([sys.executable, "-c", code])
    assert found.status == 3
    assert found.cpu_seconds > 0
    assert found.seconds > 0
    assert LARGE < found.peak < 4 * LARGE
    assert not Path("here").exists()


def test_the_process_prints_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fresh.sys, "executable", "echo")
    with pytest.raises(ValueError, match=r"running\.fresh ours folder cpu float32"):
        peak_bytes("ours", Path("folder"), "cpu", "float32")


def test_a_failed_process_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('a\\nno memory left')\n")
    python.chmod(0o700)
    monkeypatch.setattr(fresh.sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="no memory left"):
        peak_bytes("ours", Path("folder"), "cpu", "float32")


def test_a_process_that_says_nothing_leaves_its_status(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fresh.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="its process failed: exit status 1"):
        peak_bytes("ours", Path("folder"), "cpu", "float32")
