"""Comparing two runs: what became slower, beyond the machine's drift and the noise."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clean_transformer.benchmark.results import comparison
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.results.file import write_results
from clean_transformer.benchmark.work import Work
from clean_transformer.cli import app

from ..made_up import part, result, results

PEERS = ("limit", "transformers sdpa", "transformers eager", "HookedTransformer")


def run(ours: float, machine: float = 1.0, jitter: float = 0.01, memory: float = 100.0) -> Results:
    """Five rounds of each contestant, on a machine that is slower by a factor."""

    def rows(contestant: str, seconds: float) -> Result:
        spread = (1, 1 + jitter, 1 - jitter, 1 + 2 * jitter, 1 - 2 * jitter)
        return result(part(contestant), *(machine * seconds * each for each in spread))

    kept = result(part("ours", work=Work(kind="memory")), memory)
    return results(rows("ours", ours), kept, *(rows(peer, 2.0) for peer in PEERS))


def verdicts(before: Results, after: Results) -> list[str]:
    return [change.verdict for change in comparison.compare(before, after)[1]]


def test_the_same_run():
    assert verdicts(run(1.0), run(1.0)) == ["the same", "the same"]


def test_slower_and_faster():
    assert verdicts(run(1.0), run(1.3)) == ["slower", "the same"]
    assert verdicts(run(1.3), run(1.0)) == ["faster", "the same"]


def test_a_slower_machine_is_not_a_slower_model():
    drift, [change, memory] = comparison.compare(run(1.0), run(1.0, machine=1.5))
    assert drift == pytest.approx(1.5)
    assert change.factor == pytest.approx(1.0)
    assert (change.verdict, memory.verdict) == ("the same", "the same")


def test_a_machine_that_is_slower_for_a_while_is_not_a_slower_model():
    def twice(later: Results) -> Results:
        rows = [replace(row, measurement="later") for row in later.results]
        return Results({}, [*run(1.0).results, *rows])

    _, changes = comparison.compare(twice(run(1.0)), twice(run(1.0, machine=1.5)))
    assert [change.factor for change in changes] == pytest.approx([1.0] * 4)
    alone = comparison.compare(run(1.0), run(1.0))[1]
    assert [change.noise for change in changes] == pytest.approx([c.noise for c in alone] * 2)


def test_a_change_within_the_noise_is_not_reported():
    assert verdicts(run(1.0, jitter=0.2), run(1.3, jitter=0.2)) == ["the same", "the same"]


def test_bytes_have_no_noise():
    _, kept, *peers = run(1.3, memory=110).results
    scattered = [
        replace(row, values=[factor * value for value in row.values])
        for row, factor in zip(peers, (0.7, 0.9, 1.1, 1.3), strict=True)
    ]
    after = Results({}, [result(part("ours"), 1.3), kept, *scattered])
    assert verdicts(run(1.0), after) == ["the same", "slower"]


def test_more_memory_counts_although_the_machine_is_slower():
    assert verdicts(run(1.0), run(1.0, machine=1.5, memory=150)) == ["the same", "slower"]


def test_peers_of_another_version_do_not_show_the_drift():
    after = run(1.0)
    after = Results({}, [*after.results[:2], *(_of_another_version(r) for r in after.results[2:])])
    drift, _ = comparison.compare(run(1.0), after)
    assert drift is None


def _of_another_version(row: Result) -> Result:
    return Result(row.measurement, row.part, "2.0", [9 * value for value in row.values])


def test_nothing_in_common():
    with pytest.raises(ValueError, match="no measurement in common"):
        comparison.compare(run(1.0), results())


def test_what_only_one_run_measured_is_told():
    ours, *rest = run(1.0).results
    broken = Results({}, [replace(ours, values=[], why="its logits are wrong"), *rest[:-1]])
    failed, absent = comparison.missing(run(1.0), broken)
    assert (failed.part, failed.failed) == (ours.part, True)
    assert failed.why == "not measured in the later run: its logits are wrong"
    assert (absent.part, absent.failed) == (rest[-1].part, False)
    [repaired, added] = comparison.missing(broken, run(1.0))
    assert repaired.why == "not measured in the earlier run: its logits are wrong"
    assert (added.why, added.failed) == ("not measured in the earlier run", False)
    assert comparison.missing(run(1.0), run(2.0)) == []


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_command(tmp_path: Path):
    files = [str(tmp_path / name) for name in ("before.json", "after.json")]
    for file, speed in zip(files, (1.0, 1.3), strict=True):
        write_results(run(speed), [], Path(file))
    status, output = call(*files)
    assert status == 1
    assert "1 of 2 got slower" in output
    assert call(*files[:1] * 2)[0] == 0
    assert call(files[0], str(tmp_path / "none.json"))[0] == 2

    ours, *rest = run(1.0).results
    broken = replace(ours, values=[], why="its logits are wrong")
    write_results(Results({}, [broken, *rest]), [], Path(files[1]))
    status, output = call(*files)
    assert status == 1
    assert "0 of 1 got slower, and 1 failed" in output
    assert "not measured in the later run: its logits are wrong" in output

    write_results(Results({}, [ours]), [], Path(files[1]))
    status, output = call(*files)
    assert status == 0
    assert "how much the machine's own speed changed is unknown" in output
