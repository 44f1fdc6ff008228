"""The runs: every measurement of a plan, its contestants taking turns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.benchmark.results.results import Result
from clean_transformer.benchmark.running.processes import Failed, Worker, command
from clean_transformer.benchmark.work import Entrant, Measurement, Part
from clean_transformer.model import DemoTransformer

# What logits may differ by, as a share of their own deviation. On the 'stress' weights, right ones
# in bfloat16 do by 0.015; those of a wrong model are 1 away.
AGREEMENT = {"float32": 1e-3, "tf32": 0.02, "float16": 0.02, "bfloat16": 0.1, "int8": 0.3}


CHECKED_TOKENS = [[*range(first, first + 32)] for first in (1, 1001, 2001, 3001)]


CHECKED_NEW = 3  # of the first of them: by its prompt, and by what is kept of it


# They choose their products by measuring, and so are loaded while nobody else works.
TUNED = ("optimized", "optimized compiled")


OnTurn = Callable[[Part], object]


class Expected(NamedTuple):
    """What our model computes: the logits after the checked tokens, and those by which it goes on
    after the first of them."""

    logits: Tensor
    new_logits: Tensor

    @classmethod
    def of(cls, folder: Path) -> "Expected":
        """Of the weights in that folder."""
        model = DemoTransformer.from_pretrained(folder, device="cpu")
        with torch.inference_mode():
            logits, tokens = model(torch.tensor(CHECKED_TOKENS))[:, -1], CHECKED_TOKENS[0]
            for _ in range(CHECKED_NEW):
                after = model(torch.tensor([tokens]))[0]
                tokens = [*tokens, int(after[-1].argmax())]
        return cls(logits, after[-CHECKED_NEW:])


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
        self.expected: dict[str, Expected] = {}  # by model

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
            self.titles |= self.ask_all(group, self.loading)
        # What is compiled, which takes most of a minute, is compiled side by side.
        checked = [e for e in started if e in self.workers and e.contestant != "limit"]
        request = {"do": "check", "tokens": CHECKED_TOKENS, "new": CHECKED_NEW}
        for entrant, found in self.ask_all(checked, lambda _: request).items():
            try:
                self.require_agreement(entrant, found)
            except Failed as error:
                self.exclude(entrant, error)

    def loading(self, entrant: Entrant) -> dict[str, Any]:
        """The request to load its model."""
        return {
            "do": "load",
            "contestant": entrant.contestant,
            "folder": str(self.folders[entrant.model]),
            "device": entrant.device,
            "dtype": entrant.dtype,
            "threads": self.threads,
        }

    def ask_all(
        self, entrants: Iterable[Entrant], request: Callable[[Entrant], dict[str, Any]]
    ) -> dict[Entrant, Any]:
        """What each answers, all of them at work at once; without those that fail."""
        entrants = [*entrants]
        for entrant in entrants:
            self.workers[entrant].send(request(entrant))
        answers = {}
        for entrant in entrants:
            try:
                answers[entrant] = self.workers[entrant].receive()
            except Failed as error:
                self.exclude(entrant, error)
        return answers

    def exclude(self, entrant: Entrant, why: Failed) -> None:
        """End its process."""
        self.failures[entrant] = str(why)
        self.workers.pop(entrant).close()

    def require_agreement(self, entrant: Entrant, found: Mapping[str, Any]) -> None:
        """Raise `Failed` unless it computes what our model does: no other is worth timing."""
        if entrant.model not in self.expected:
            self.expected[entrant.model] = Expected.of(self.folders[entrant.model])
        expected, bound = self.expected[entrant.model], AGREEMENT[entrant.dtype]
        if found["logits"] is not None:
            logits = torch.tensor(found["logits"])
            apart = ((logits - expected.logits).std(dim=-1) / expected.logits.std(dim=-1)).max()
            if not apart <= bound:
                raise Failed(f"its logits are {apart:.2g} of their deviation from ours")
            log_probs, theirs = expected.logits.log_softmax(dim=-1), logits.log_softmax(dim=-1)
            kl = F.kl_div(theirs, log_probs, log_target=True, reduction="batchmean")
            self.divergences[entrant] = kl.item()
        if found["generated"] is not None:
            for new, logits in zip(found["generated"], expected.new_logits, strict=True):
                lack = (logits.max() - logits[new]) / logits.std()
                if not lack <= bound:
                    raise Failed(f"it goes on with a token {lack:.2g} deviations less likely")
                if new != logits.argmax():  # as good as that, and from here on another text
                    break

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
                warms_up = number < measurement.warm_ups
                work = part.to_warm_up if warms_up else part.work
                try:
                    value = self.workers[part.entrant].ask(
                        "measure", work=asdict(work), at_least=0.0 if warms_up else self.at_least
                    )
                except Failed as error:
                    failures[part] = str(error)
                    continue
                if not warms_up:
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
