"""Runs measurements, in which the contestants take turns. Each contestant has its own process."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.benchmark.results.data import Result
from clean_transformer.benchmark.running.processes import Failed, Worker, command
from clean_transformer.benchmark.work import GENERATING, Measurement, Part, Setup
from clean_transformer.model import DemoTransformer

# For each dtype: how far a contestant's logits may be from the logits of our model in float32. The
# distance is the standard deviation of the difference between the two, divided by the standard
# deviation of our logits. With the weights of `synthetic.stress`, correct bfloat16 logits have the
# distance 0.015, and the logits of a wrong model have the distance 1.
AGREEMENT = {"float32": 1e-3, "tf32": 0.02, "float16": 0.02, "bfloat16": 0.1, "int8": 0.3}

# The inputs on which each contestant is compared with our model.
CHECKED_TOKENS = [[*range(first, first + 32)] for first in (1, 1001, 2001, 3001)]

# Each contestant generates this many tokens after the first input in CHECKED_TOKENS. The first new
# token tests how the contestant reads the prompt, and the other new tokens test its KV cache.
CHECKED_NEW = 3

OnTurn = Callable[[Part], object]
OnResults = Callable[[list[Result]], object]


class Expected(NamedTuple):
    """The logits of our model, with which each contestant is compared.

    - `logits` [input d_vocab]: the logits at the last position of each input in `CHECKED_TOKENS`.
    - `new_logits` [CHECKED_NEW d_vocab]: our model generates `CHECKED_NEW` tokens after the first
      input; `new_logits[i]` has the logits from which our model chooses the new token i.
    """

    logits: Tensor
    new_logits: Tensor

    @classmethod
    def of(cls, folder: Path) -> "Expected":
        """Run our model with the weights in `folder`, in float32 on the CPU."""
        model = DemoTransformer.from_pretrained(folder, device="cpu")
        with torch.inference_mode():
            logits, tokens = model(torch.tensor(CHECKED_TOKENS))[:, -1], CHECKED_TOKENS[0]
            for _ in range(CHECKED_NEW):
                after = model(torch.tensor([tokens]))[0]
                tokens = [*tokens, int(after[-1].argmax())]
        return cls(logits, after[-CHECKED_NEW:])


def wrong_token(new: Iterable[int], new_logits: Iterable[Tensor], bound: float) -> str:
    """Say which generated token is wrong, or return an empty text.

    `new_logits` has our logits for each new token. A token is right if its logit is at most
    `bound` standard deviations of the logits below the largest.
    """
    for token, logits in zip(new, new_logits, strict=True):
        lack = (logits.max() - logits[token]) / logits.std()
        if not lack <= bound:
            return (
                f"it generates a token whose logit is {lack:.2g} standard deviations "
                "below the largest"
            )
        # The contestant chose a token that our model finds almost as likely as the most likely
        # token. From here on, the contestant continues another text than our model, so the later
        # tokens cannot be compared.
        if token != logits.argmax():
            break
    return ""


class Race:
    """Runs measurements, in which several setups take turns.

    A setup is a contestant with its model, device and dtype. Each setup has a process, which ends
    after the setup's last measurement.

    - `folders`: the folder with the weights of each model, by model name.
    - `threads`: the number of CPU threads of each process.
    - `hooked_python`: the Python of an environment that has `HookedTransformer`.
    - `missing`: for each model without a folder, the reason why its weights were not written.
    - `at_least`: in each turn, a process repeats its work until this many seconds have passed.
    - `start`: a function that takes a command, starts the process, and returns its `Worker`.
    """

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
        self.workers: dict[Setup, Any] = {}
        self.titles: dict[Setup, str] = {}
        self.failures: dict[Setup, str] = {}
        self.wrong_tokens: dict[Setup, str] = {}
        self.divergences: dict[Setup, float] = {}
        self.expected: dict[str, Expected] = {}  # the keys are model names

    def run(
        self,
        measurements: Sequence[Measurement],
        on_turn: OnTurn = lambda part: None,
        on_results: OnResults = lambda results: None,
    ) -> list[Result]:
        """Run the measurements one after the other, and return their results.

        Before each turn, `on_turn` is called with the `Part` that is measured next. After each
        measurement, `on_results` is called with all results so far.
        """
        results: list[Result] = []
        try:
            for number, measurement in enumerate(measurements):
                self.prepare(part.setup for part in measurement.parts)
                results += self.measure(measurement, on_turn)
                on_results(results)
                later = {p.setup for other in measurements[number + 1 :] for p in other.parts}
                for setup in {*self.workers} - later:
                    self.workers.pop(setup).close()
        finally:
            for worker in self.workers.values():
                worker.close()
        return results

    def prepare(self, wanted: Iterable[Setup]) -> None:
        """Start a process for each setup that has no process yet.

        The process loads the setup's contestant. Then this method compares the contestant's results
        with our model's results (see `require_agreement`). No process is started for a setup that
        failed earlier.
        """
        new = [e for e in dict.fromkeys(wanted) if e not in self.workers and e not in self.failures]
        for setup in new:
            try:
                if setup.model in self.missing:
                    raise Failed(self.missing[setup.model])
                self.workers[setup] = self.start(command(setup.contestant, self.hooked_python))
            except Failed as error:
                self.failures[setup] = str(error)
        started = [setup for setup in new if setup in self.workers]
        self.titles |= self.ask_all(started, self.load_request)
        # All setups run the check at the same time, because some contestants then compile for most
        # of a minute.
        checked = [s for s in started if s in self.workers and s.contestant != "limit"]
        request = {"do": "check", "tokens": CHECKED_TOKENS, "new": CHECKED_NEW}
        for setup, found in self.ask_all(checked, lambda _: request).items():
            try:
                self.require_agreement(setup, found)
            except Failed as error:
                self.exclude(setup, error)

    def load_request(self, setup: Setup) -> dict[str, Any]:
        """Return the request that makes the setup's process load the contestant."""
        return {
            "do": "load",
            "contestant": setup.contestant,
            "folder": str(self.folders[setup.model]),
            "device": setup.device,
            "dtype": setup.dtype,
            "threads": self.threads,
        }

    def ask_all(
        self, setups: Iterable[Setup], request: Callable[[Setup], dict[str, Any]]
    ) -> dict[Setup, Any]:
        """Send a request to all setups, wait for all answers, and return the answers by setup.

        The function `request` takes a setup and returns the request for it. A setup that answers
        with an error is excluded (see `exclude`).
        """
        setups = [*setups]
        for setup in setups:
            self.workers[setup].send(request(setup))
        answers = {}
        for setup in setups:
            try:
                answers[setup] = self.workers[setup].receive()
            except Failed as error:
                self.exclude(setup, error)
        return answers

    def exclude(self, setup: Setup, why: Failed) -> None:
        """End the setup's process, and store in `failures` why the setup is not measured."""
        self.failures[setup] = str(why)
        self.workers.pop(setup).close()

    def require_agreement(self, setup: Setup, found: Mapping[str, Any]) -> None:
        """Raise `Failed` unless the setup computes what our model computes.

        `found` is the answer of the setup's process to the request "check" (see `Server.check`).
        This method stores the KL divergence between our model and the setup in `divergences`. If
        the logits are right and the generated tokens are wrong, this method raises no error, but
        stores the reason in `wrong_tokens`.
        """
        if setup.model not in self.expected:
            self.expected[setup.model] = Expected.of(self.folders[setup.model])
        expected, bound = self.expected[setup.model], AGREEMENT[setup.dtype]
        if found["logits"] is not None:
            logits = torch.tensor(found["logits"])
            apart = ((logits - expected.logits).std(dim=-1) / expected.logits.std(dim=-1)).max()
            if not apart <= bound:
                raise Failed(f"its logits are {apart:.2g} standard deviations from ours")
            log_probs, theirs = expected.logits.log_softmax(dim=-1), logits.log_softmax(dim=-1)
            kl = F.kl_div(theirs, log_probs, log_target=True, reduction="batchmean")
            self.divergences[setup] = kl.item()
        if found["generated"] is not None:
            why = wrong_token(found["generated"], expected.new_logits, bound)
            if why and found["logits"] is None:
                raise Failed(why)
            if why:
                self.wrong_tokens[setup] = why

    def measure(self, measurement: Measurement, on_turn: OnTurn) -> list[Result]:
        """Run one measurement, and return one result for each part: a setup with its work.

        Each round starts with another part than the previous round, so that the order favors no
        part.
        """
        values: dict[Part, list[float]] = {part: [] for part in measurement.parts}
        failures: dict[Part, str] = {}
        for number in range(measurement.warm_ups + measurement.rounds):
            first = number % len(measurement.parts)
            for part in measurement.parts[first:] + measurement.parts[:first]:
                on_turn(part)
                if part.setup in self.failures:
                    failures[part] = self.failures[part.setup]
                if part.work.kind in GENERATING and part.setup in self.wrong_tokens:
                    failures[part] = self.wrong_tokens[part.setup]
                if part in failures:
                    continue
                warms_up = number < measurement.warm_ups
                work = part.warm_up if warms_up else part.work
                if work.kind == "divergence":
                    values[part].append(self.divergences[part.setup])
                    continue
                try:
                    value = self.workers[part.setup].ask(
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
                self.titles.get(part.setup, ""),
                [] if part in failures else values[part],
                failures.get(part, ""),
                self.divergences.get(part.setup),
            )
            for part in measurement.parts
        ]
