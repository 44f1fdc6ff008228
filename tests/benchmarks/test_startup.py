"""CPU seconds of processes, and their ratio to one of them. No time is asserted."""

import sys

import pytest

from benchmarks import startup

IDLE = (sys.executable, "-c", "pass")
BUSY = (sys.executable, "-c", "sum(range(3_000_000))")


def test_a_process_that_computes_takes_more_cpu_time():
    assert 0 < startup.cpu_seconds(IDLE) < startup.cpu_seconds(BUSY)


def test_the_table_has_a_ratio_for_each_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(startup, "COMMANDS", {"busy": BUSY, startup.UNIT: IDLE})
    startup.main(rounds=1)
    _, busy, unit = capsys.readouterr().out.splitlines()
    assert float(busy.split()[-1]) > 1
    assert unit.split()[-1] == "1.00"
