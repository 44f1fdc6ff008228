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
from clean_transformer.benchmark.results.data import Results
from clean_transformer.benchmark.running.models import write_models
from clean_transformer.benchmark.running.race import OnTurn, Race
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available


@dataclass(frozen=True)
class Report:
    """A finished run: its results, the judged goals, and the devices that this machine lacks.

    `judged` is None if the run was limited to some contestants (`Benchmark(only=…)`).
    """

    results: Results
    judged: Sequence[Judged] | None
    absent: Sequence[str]

    @property
    def exit_status(self) -> int:
        """The exit status of the command: 0 if all goals are held, and 1 if a goal is missed.

        The status is 3 if no goal is missed, but a goal was not measured. Optional goals and goals
        for devices that this machine lacks need not be measured. If `judged` is None, the status is
        0 if everything was measured, and otherwise 3.
        """
        if self.judged is not None:
            return exit_status([one for one in self.judged if one.goal.device not in self.absent])
        values = [result.values for result in self.results.results]
        return 0 if values and all(values) else 3


class Benchmark:
    """The benchmark on `devices`. The method `run` measures the contestants and judges the goals.

    With `quick`, a run does less work, and takes about two minutes on a CPU. `only` names the
    contestants to measure; None means all. With `only`, no goals are judged, because goals compare
    contestants. Raises `ValueError` if a name in `only` is not a key of `contestants.CONTESTANTS`.
    """

    def __init__(
        self,
        devices: Sequence[str] = ("cpu",),
        *,
        quick: bool = False,
        only: Collection[str] | None = None,
    ):
        unknown = sorted({*(only or ())} - {*CONTESTANTS})
        if unknown:
            raise ValueError(
                f"there is no contestant {', '.join(map(repr, unknown))}; "
                f"there are: {', '.join(CONTESTANTS)}"
            )
        plans = {name: plan_for(name, quick) for name in devices}
        self.quick, self.only = quick, only
        self.present = [name for name in devices if is_available(name)]
        self.measurements = [
            one for name in self.present for one in measurements(name, plans[name], only)
        ]
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
    ) -> Report:
        """Write the weights, measure the contestants, and judge the goals.

        `threads` is the number of CPU threads; 0 leaves the choice to PyTorch. `hooked_python` is
        the path of the Python in an environment that has transformer_lens 3.9.0. Before each turn,
        `on_turn` is called with the `Part` that is measured next.
        """
        sizes = {part.setup.model for one in self.measurements for part in one.parts}
        threads = threads or torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            folders, missing = write_models(sorted({"tiny", "small"} | sizes), Path(folder))
            measured = Race(folders, threads, hooked_python, missing).run(
                self.measurements, on_turn
            )
        results = Results(describe_run(self.present, threads, self.quick), measured)
        judged = [judge(goal, results) for goal in self.goals] if self.only is None else None
        return Report(results, judged, self.absent)


def describe_run(devices: Sequence[str], threads: int, quick: bool) -> dict[str, str]:
    """Return a description of the run: versions, processor, threads, and device settings."""
    described = environment() | {"threads": str(threads), "run": "quick" if quick else "full"}
    for device in devices:
        for setting, value in device_settings(torch.device(device)).items():
            described[f"{device}: {setting}"] = value
    return described
