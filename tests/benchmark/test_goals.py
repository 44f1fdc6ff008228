"""The goals: each is measured in one measurement, and judged correctly."""

from dataclasses import replace

import pytest

from clean_transformer.benchmark.goals import Goal, goals
from clean_transformer.benchmark.judgment import Judged, exit_status, judge
from clean_transformer.benchmark.plan import LONGEST, ONCE, measurements, plan_for
from clean_transformer.benchmark.work import Work

from .made_up import part, result, results

OVER, UNDER = (part("transformers sdpa"),), (part("optimized"),)
GOAL = Goal(what="speed", device="cpu", over=OVER, under=UNDER, at_least=1.7)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_parts_of_a_goal_take_turns(device: str, quick: bool):
    chosen = plan_for(device, quick)
    planned = [{*one.parts} for one in measurements(device, chosen)]
    for goal in goals(device, chosen):
        assert any({*goal.over, *goal.under} <= parts for parts in planned), goal.what


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_measurement_has_each_part_once(device: str, quick: bool):
    planned = measurements(device, plan_for(device, quick))
    assert len({one.title for one in planned}) == len(planned)
    for one in planned:
        assert len({*one.parts}) == len(one.parts)


@pytest.mark.parametrize("device", ["cpu:0", "cuda:0", "cuda:1", "mps:0"])
def test_one_of_several_devices_has_the_plan_and_the_goals_of_its_kind(device: str):
    kind = device.partition(":")[0]
    chosen = plan_for(device, quick=False)
    assert chosen == plan_for(kind, quick=False)
    named = [[goal.what for goal in goals(each, chosen)] for each in (device, kind)]
    assert named[0] == named[1]


def test_the_longest_measurements_have_fewer_rounds():
    chosen = plan_for("cpu", quick=False)
    rounds = {one.title: one.rounds for one in measurements("cpu", chosen)}
    for title in LONGEST:
        assert rounds.pop(f"{title}, cpu") == chosen.fewer_rounds
    for title in ONCE:
        assert rounds.pop(f"{title}, cpu") == 1
    assert {*rounds.values()} == {chosen.rounds}


def test_goals_have_names_of_their_own():
    names = [goal.what for goal in goals("cpu", plan_for("cpu", quick=False))]
    assert len({*names}) == len(names) == 32


def test_the_quotient_is_taken_round_by_round():
    found = results(result(*OVER, 4.0, 9.0, 8.0), result(*UNDER, 2.0, 3.0, 4.0))
    judged = judge(GOAL, found)
    assert judged.measured is not None
    assert (judged.measured.low, judged.measured.median, judged.measured.high) == (2, 2, 3)
    assert judged.verdict == "HELD"


def test_products_and_factors():
    one, two = part("limit"), part("ours")
    goal = replace(GOAL, over=(one, two), under=(two, one), factor=0.25, at_least=None, at_most=0.3)
    judged = judge(goal, results(result(one, 3.0), result(two, 5.0)))
    assert judged.measured is not None
    assert judged.measured.median == pytest.approx(0.25)
    assert judged.verdict == "HELD"


@pytest.mark.parametrize(
    ("bounds", "value", "held"),
    [
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.0}, 1.99, False),
        ({"at_least": None, "at_most": 2.0}, 2.0, True),
        ({"at_least": None, "at_most": 2.0}, 2.01, False),
    ],
)
def test_bounds(bounds: dict[str, float | None], value: float, held: bool):
    assert replace(GOAL, **bounds).holds(value) is held


def test_nan_holds_no_goal():
    assert not GOAL.holds(float("nan"))
    assert not replace(GOAL, at_least=None, at_most=1.0).holds(float("nan"))


def test_a_goal_that_was_not_measured_says_why():
    absent = judge(GOAL, results(result(*OVER, 1.0), result(*UNDER, why="it has no optimize")))
    assert (absent.verdict, absent.note) == ("NOT MEASURED", "optimized: it has no optimize")
    assert judge(GOAL, results(result(*OVER, 1.0))).verdict == "NOT MEASURED"


def test_a_missed_speed_up_says_what_the_limit_allows():
    goal = replace(GOAL, under=(part("optimized", "bfloat16"),), at_least=3.3)
    found = results(
        result(*OVER, 6.0),
        result(part("optimized", "bfloat16"), 5.0),
        result(part("limit", "bfloat16"), 4.0),
        result(part("limit"), 2.0),
    )
    judged = judge(goal, found)
    assert judged.verdict == "MISSED"
    assert judged.note == (
        "the limit allows 1.50 ×: here bfloat16 is at most 0.50 × as fast as float32"
    )


def test_what_the_limit_allows_is_taken_within_rounds():
    found = results(
        result(*OVER, 2.0, 40.0, 4.0),
        result(*UNDER, 1.9, 39.0, 3.9),
        result(part("limit"), 1, 20, 4),
    )
    judged = judge(GOAL, found)
    assert judged.verdict == "MISSED"
    assert judged.note == "the limit allows 2.00 ×"


def test_a_missed_cost_says_its_values():
    cost = replace(GOAL, at_least=None, at_most=0.3)
    assert (
        judge(cost, results(result(*OVER, 1.5), result(*UNDER, 0.2))).note == "1.50 s over 200 ms"
    )


def test_bounds_and_quotients_for_people():
    share = replace(GOAL, at_least=0.9, percent=True)
    assert (share.bound, share.number(0.876)) == ("≥ 90%", "88%")
    assert (GOAL.bound, GOAL.number(1.236)) == ("≥ 1.70 ×", "1.24 ×")
    assert replace(GOAL, at_least=None, at_most=0.3).bound == "≤ 0.30 ×"


def test_a_goal_without_under_bounds_a_measured_value():
    nats = part("optimized", "int8", Work(kind="divergence"))
    goal = Goal(what="distance", device="cpu", over=(nats,), at_most=0.01)
    assert (goal.bound, goal.number(0.0062)) == ("≤ 0.01 nats", "0.0062 nats")
    near, far = (judge(goal, results(result(nats, value))) for value in (0.006, 0.4))
    assert (near.verdict, far.verdict, far.note) == ("HELD", "MISSED", "")
    seconds = replace(goal, over=(part("ours", work=Work(kind="doctor")),), at_most=30.0)
    assert seconds.bound == "≤ 30.00 s"


def test_exit_status():
    fine = results(result(*OVER, 2.0), result(*UNDER, 1.0))
    slow = results(result(*OVER, 1.0), result(*UNDER, 1.0))
    held, missed = judge(GOAL, fine), judge(GOAL, slow)
    absent = Judged(GOAL, None)
    optional = Judged(replace(GOAL, optional=True), None)
    assert exit_status([held, optional]) == 0
    assert exit_status([held, missed, absent]) == 1
    assert exit_status([held, absent]) == 3
