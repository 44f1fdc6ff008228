from itertools import combinations_with_replacement

import pytest

from clean_transformer.parity.verdict import Verdict, worst

FROM_BEST_TO_WORST = [*Verdict]


def test_the_worst_of_two_is_the_later_one():
    for better, worse in combinations_with_replacement(FROM_BEST_TO_WORST, 2):
        assert worst([better, worse]) is worst(iter([worse, better])) is worse


def test_nothing_is_not_a_pass():
    assert worst([]) is Verdict.NOT_CHECKED


@pytest.mark.parametrize(
    ("verdict", "status"), [*zip(FROM_BEST_TO_WORST, (0, 3, 2, 1, 1), strict=True)]
)
def test_exit_status(verdict: Verdict, status: int):
    assert verdict.exit_status == status


def test_verdicts_print_as_words():
    assert [verdict.value for verdict in Verdict] == [
        "PASS",
        "NOT CHECKED",
        "ERROR",
        "DEGRADED",
        "WRONG",
    ]
