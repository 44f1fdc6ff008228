"""The runs: every measurement of a plan, its contestants taking turns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.processes import Failed, Worker, command
from benchmarks.results import Result
from benchmarks.work import Entrant, Measurement, Part
from clean_transformer.model import DemoTransformer

# What logits may differ by, as a share of their own deviation. On the 'stress' weights, right ones
# in bfloat16 do by 0.015; those of a wrong model are 1 away.
AGREEMENT = {"float32": 1e-3, "tf32": 0.02, "float16": 0.02, "bfloat16": 0.1, "int8": 0.3}
CHECKED_TOKENS = [[*range(first, first + 32)] for first in (1, 1001, 2001, 3001)]

# They choose their products by measuring, and so are loaded while nobody else works.
TUNED = ("optimized", "optimized compiled")

OnTurn = Callable[[Part], object]


class Race:
    """The processes of a run, started when they are first needed and ended after their last use."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        threads: int,
        hooked_python: str | None = None,
        missing: Mapping[str, str] = MappingProxyType({}),
        at_least: float = 0.2,
        start: Callable[[list[str]], Any] = Worker,
    ):
        self.folders, self.threads, self.hooked_python = folders, threads, hooked_python
        self.missing, self.at_least, self.start = missing, at_least, start
        self.workers: dict[Entrant, Any] = {}
        self.titles: dict[Entrant, str] = {}
        self.failures: dict[Entrant, str] = {}
        self.divergences: dict[Entrant, float] = {}
        self.expected: dict[str, Tensor] = {}  # our logits, by model

    def run(
        self, measurements: Sequence[Measurement], on_turn: OnTurn = lambda part: None
    ) -> list[Result]:
        """Every measurement, one after the other."""
        results = []
        try:
            for number, measurement in enumerate(measurements):
                self.prepare(part.entrant for part in measurement.parts)
                results += self.measure(measurement, on_turn)
                later = {p.entrant for other in measurements[number + 1 :] for p in other.parts}
                for entrant in {*self.workers} - later:
                    self.workers.pop(entrant).close()
        finally:
            for worker in self.workers.values():
                worker.close()
        return results

    def prepare(self, wanted: Iterable[Entrant]) -> None:
        """Start those that do not run yet, and see that they compute GPT-2."""
        new = [e for e in dict.fromkeys(wanted) if e not in self.workers and e not in self.failures]
        for entrant in new:
            try:
                if entrant.model in self.missing:
                    raise Failed(self.missing[entrant.model])
                self.workers[entrant] = self.start(command(entrant.contestant, self.hooked_python))
            except Failed as error:
                self.failures[entrant] = str(error)
        started = [entrant for entrant in new if entrant in self.workers]
        together = [entrant for entrant in started if entrant.contestant not in TUNED]
        for group in (together, *([e] for e in started if e.contestant in TUNED)):
            for entrant in group:
                self.send(entrant)
            for entrant in group:
                self.receive(entrant)

    def send(self, entrant: Entrant) -> None:
        """Have it load the model and continue some tokens."""
        request = {
            "do": "load",
            "contestant": entrant.contestant,
            "folder": str(self.folders[entrant.model]),
            "device": entrant.device,
            "dtype": entrant.dtype,
            "threads": self.threads,
        }
        self.workers[entrant].send(request)
        if entrant.contestant != "limit":
            self.workers[entrant].send({"do": "check", "tokens": CHECKED_TOKENS})

    def receive(self, entrant: Entrant) -> None:
        """Keep it if it has done so, and right."""
        try:
            self.titles[entrant] = self.workers[entrant].receive()
            if entrant.contestant != "limit":
                self.require_agreement(entrant, self.workers[entrant].receive())
        except Failed as error:
            self.failures[entrant] = str(error)
            self.workers.pop(entrant).close()

    def require_agreement(self, entrant: Entrant, found: Mapping[str, Any]) -> None:
        """Raise `Failed` unless it computes what our model does: no other is worth timing."""
        if entrant.model not in self.expected:
            model = DemoTransformer.from_pretrained(self.folders[entrant.model], device="cpu")
            with torch.inference_mode():
                self.expected[entrant.model] = model(torch.tensor(CHECKED_TOKENS))[:, -1]
        expected = self.expected[entrant.model]
        deviation, bound = expected.std(dim=-1), AGREEMENT[entrant.dtype]
        if found["logits"] is not None:
            logits = torch.tensor(found["logits"])
            apart = ((logits - expected).std(dim=-1) / deviation).max().item()
            if not apart <= bound:
                raise Failed(f"its logits are {apart:.2g} of their deviation from ours")
            log_probs, theirs = expected.log_softmax(dim=-1), logits.log_softmax(dim=-1)
            kl = F.kl_div(theirs, log_probs, log_target=True, reduction="batchmean")
            self.divergences[entrant] = kl.item()
        if found["generated"] is not None:
            chosen = expected.gather(1, torch.tensor(found["generated"])[:, None])[:, 0]
            lack = ((expected.amax(dim=-1) - chosen) / deviation).max().item()
            if not lack <= bound:
                raise Failed(f"it goes on with a token that is {lack:.2g} deviations less likely")

    def measure(self, measurement: Measurement, on_turn: OnTurn) -> list[Result]:
        """Every part in turn, each round beginning with another."""
        values: dict[Part, list[float]] = {part: [] for part in measurement.parts}
        failures: dict[Part, str] = {}
        for number in range(measurement.warm_ups + measurement.rounds):
            first = number % len(measurement.parts)
            for part in measurement.parts[first:] + measurement.parts[:first]:
                on_turn(part)
                if part.entrant in self.failures:
                    failures[part] = self.failures[part.entrant]
                if part in failures:
                    continue
                try:
                    value = self.workers[part.entrant].ask(
                        "measure", work=asdict(part.work), at_least=self.at_least
                    )
                except Failed as error:
                    failures[part] = str(error)
                    continue
                if number >= measurement.warm_ups:
                    values[part].append(value)
        return [
            Result(
                measurement.title,
                part,
                self.titles.get(part.entrant, ""),
                [] if part in failures else values[part],
                failures.get(part, ""),
                self.divergences.get(part.entrant),
            )
            for part in measurement.parts
        ]
