"""The published results: this version reads them, and they say what the README says."""

import re
from collections import Counter
from pathlib import Path

import pytest

from clean_transformer.benchmark import read_results
from clean_transformer.benchmark.goals import goals
from clean_transformer.benchmark.judgment import Judged, judge
from clean_transformer.benchmark.plan import plan_for

FOLDER = Path(__file__).parents[2] / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    results = read_results(FOLDER / "results" / "two_core_amd_avx512.json")
    return [judge(goal, results) for goal in goals("cpu", plan_for("cpu", quick=False))]


def test_the_readme_counts_the_goals(judged: list[Judged]):
    counts = Counter(one.verdict for one in judged)
    assert (len(judged), counts["MISSED"], counts["NOT MEASURED"]) == (32, 18, 0)
    assert "misses 18 of the 32 goals, and all goals are measured" in README


def test_the_readme_has_the_bound_of_each_missed_goal(judged: list[Judged]):
    reasons = README.partition("| goal | why it is missed |")[2].partition("\n\n")[0]
    for one in judged:
        if one.verdict == "MISSED" and "of the limit, decode" not in one.goal.what:
            assert one.goal.bound in reasons, one.goal.what


def test_the_readme_has_the_measured_speed_ups(judged: list[Judged]):
    figures = README.partition("| | as it is |")[2].partition("\n\n")[0]
    for one in judged:
        speed_up = re.match(r"(forward|generate|capture|train).* over (?!our)", one.goal.what)
        if speed_up and one.measured and one.goal.at_least is not None:
            assert one.goal.number(one.measured.median) in figures, one.goal.what
