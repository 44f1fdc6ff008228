"""Runs the whole benchmark: writes the weights, measures the contestants, and judges the goals."""

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clean_transformer.benchmark.contestants import CONTESTANTS
from clean_transformer.benchmark.goals import goals
from clean_transformer.benchmark.judgment import Judged, exit_status, judge
from clean_transformer.benchmark.plan import measurements, plan_for
from clean_transformer.benchmark.question import Question
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.running.models import write_models
from clean_transformer.benchmark.running.race import OnResults, OnTurn, Race
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available


@dataclass(frozen=True)
class Report:
    """A finished run: its results, the judged goals, and the devices that this machine lacks.

    `judged` is None if the run had no goals (see `Benchmark`).
    """

    results: Results
    judged: Sequence[Judged] | None
    absent: Sequence[str]

    @property
    def exit_status(self) -> int:
        """The exit status of the command: 0 if all goals are held, and 1 if a goal is missed.

        The status is 3 if no goal is missed, but a goal was not measured, for example because this
        machine lacks the device. Optional goals need not be measured. If `judged` is None, the
        status is 0 if everything was measured on all devices, and otherwise 3.
        """
        if self.judged is not None:
            return exit_status(self.judged)
        values = [result.values for result in self.results.results]
        return 0 if values and all(values) and not self.absent else 3


class Benchmark:
    """The benchmark on `devices`. The method `run` measures the contestants and judges the goals.

    With `quick`, a run does less work, and takes about two minutes on a CPU. `only` names the
    contestants to measure; None means all. With a `question`, a run only measures the work of this
    question, and takes a minute or two. With `only` or a `question`, no goals are judged, because
    goals compare all contestants at the same work. Raises `ValueError` if a name in `only` is not a
    key of `contestants.CONTESTANTS`.
    """

    def __init__(
        self,
        devices: Sequence[str] = ("cpu",),
        *,
        quick: bool = False,
        only: Collection[str] | None = None,
        question: Question | None = None,
    ):
        unknown = sorted({*(only or ())} - {*CONTESTANTS})
        if unknown:
            raise ValueError(
                f"there is no contestant {', '.join(map(repr, unknown))}; "
                f"there are: {', '.join(CONTESTANTS)}"
            )
        plans = {name: plan_for(name, quick) for name in devices}
        self.quick = quick
        self.present = [name for name in devices if is_available(name)]
        self.measurements = [
            one
            for name in self.present
            for one in (
                measurements(name, plans[name], only)
                if question is None
                else question.measurements(name, only)
            )
        ]
        self.goals = None
        if only is None and question is None:
            self.goals = [goal for name in devices for goal in goals(name, plans[name])]
        self.absent = [name for name in devices if name not in self.present]

    @property
    def turns(self) -> int:
        """The number of turns in a run. In each turn, one contestant is measured on one `Work`."""
        return sum(one.turns for one in self.measurements)

    def run(
        self,
        threads: int = 0,
        hooked_python: str | None = None,
        on_turn: OnTurn = lambda part: None,
        on_results: OnResults = lambda results: None,
    ) -> Report:
        """Write the weights, measure the contestants, and judge the goals.

        `threads` is the number of CPU threads; 0 leaves the choice to PyTorch. `hooked_python` is
        the path of the Python in an environment that has transformer_lens 3.9.0. Before each turn,
        `on_turn` is called with the `Part` that is measured next. After each measurement,
        `on_results` is called with all results so far.
        """
        threads = threads or torch.get_num_threads()
        measured: list[Result] = []
        if self.measurements:
            sizes = {part.setup.model for one in self.measurements for part in one.parts}
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                folders, missing = write_models(sorted({"tiny"} | sizes), Path(folder))
                race = Race(folders, threads, hooked_python, missing)
                measured = race.run(self.measurements, on_turn, on_results)
        results = Results(describe_run(self.present, threads, self.quick), measured)
        judged = None if self.goals is None else [judge(goal, results) for goal in self.goals]
        return Report(results, judged, self.absent)


def describe_run(devices: Sequence[str], threads: int, quick: bool) -> dict[str, str]:
    """Return a description of the run: versions, processor, threads, and device settings."""
    described = environment() | {"threads": str(threads), "run": "quick" if quick else "full"}
    for device in devices:
        for setting, value in device_settings(torch.device(device)).items():
            described[f"{device}: {setting}"] = value
    return described
