"""Results: shares of the limit, and the file that keeps them."""

import json
from pathlib import Path

import pytest

from clean_transformer.benchmark.goals import Goal
from clean_transformer.benchmark.judgment import judge
from clean_transformer.benchmark.results.data import Results
from clean_transformer.benchmark.results.file import read_results, write_results
from clean_transformer.benchmark.work import Work

from ..made_up import part, result, results

RUN = results(
    result(part("limit"), 1.0, 2.0, 2.0),
    result(part("ours"), 2.0, 8.0, 4.0),
    result(part("llama.cpp"), why="it is not installed"),
)


def test_the_share_of_the_limit_is_taken_round_by_round():
    share = RUN.share_of_limit(RUN.results[1])
    assert share is not None
    assert (share.low, share.median, share.high) == (0.25, 0.5, 0.5)
    assert RUN.share_of_limit(RUN.results[0]) is None


def test_the_limit_is_of_the_same_measurement():
    elsewhere = results(result(part("limit"), 1.0, measurement="growth"), RUN.results[1])
    assert elsewhere.share_of_limit(elsewhere.results[1]) is None


def test_tokens_per_second():
    assert RUN.results[1].tokens_per_second == 20 / 4


def test_the_memory_of_a_setup():
    memory = result(part("ours", work=Work(kind="memory")), 5.0, measurement="memory")
    both = results(*RUN.results, memory)
    assert both.memory_of(part("ours").setup) == memory
    assert both.memory_of(part("ours", "int8").setup) is None
    assert RUN.memory_of(part("ours").setup) is None


def test_a_file_gives_back_what_was_written(tmp_path: Path):
    goal = Goal(what="w", device="cpu", over=(part("limit"),), under=(part("ours"),), at_least=0.9)
    file = tmp_path / "results.json"
    write_results(RUN, [judge(goal, RUN)], file)
    again = read_results(file)
    assert again.environment == RUN.environment
    assert [r.values for r in again.results] == [r.values for r in RUN.results]
    assert [r.part for r in again.results] == [r.part for r in RUN.results]
    assert again.results[2].why == "it is not installed"


def test_what_a_file_says(tmp_path: Path):
    file = tmp_path / "results.json"
    goal = Goal(what="w", device="cpu", over=(part("limit"),), under=(part("ours"),), at_least=0.9)
    write_results(RUN, [judge(goal, RUN)], file)
    values = json.loads(file.read_text())
    assert (values["schema"], values["version"]) == ("clean-transformer/bench", 2)
    ours = values["results"][1]
    assert ours["part"]["work"]["kind"] == "forward"
    assert ours["part"]["setup"]["contestant"] == "ours"
    assert (ours["median"], ours["tokens_per_second"], ours["share_of_limit"]) == (4.0, 5.0, 0.5)
    assert "median" not in values["results"][2]
    [judged] = values["goals"]
    assert (judged["measured"], judged["at_least"], judged["verdict"]) == (0.5, 0.9, "MISSED")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no report that --json wrote"),
        ("[]", "is no report that --json wrote"),
        ('{"schema": "clean-transformer/bench"}', "is no report that --json wrote"),
        ('{"schema": "clean-transformer/parity", "version": 2}', "not clean-transformer/bench"),
        ('{"schema": "clean-transformer/bench", "version": 1}', "make the report again"),
    ],
)
def test_any_other_file_is_refused(content: str, said: str, tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_results(file)


def test_parts_that_took_turns_are_found_together():
    both = results(*RUN.results, result(part("ours"), 1.0, measurement="growth"))
    found = both.together([part("ours"), part("limit")])
    assert found is not None
    assert found[part("ours")].measurement == "forward"
    assert both.together([part("ours"), part("optimized")]) is None
    assert isinstance(both, Results)
