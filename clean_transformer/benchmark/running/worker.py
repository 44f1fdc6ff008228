"""The program of the process that runs one contestant.

The process reads requests from standard input, and writes an answer to each request to standard
output. Each request and each answer is one line of JSON. There are three requests; the value in the
answer is after the arrow:

    {"do": "load", "contestant": …, "folder": …, "device": …, "dtype": …, "threads": …} → title
    {"do": "check", "tokens": [[…]], "new": …} → {"logits": [[…]], "generated": [id, …]}
    {"do": "measure", "work": {…}, "at_least": seconds} → seconds; for memory, bytes

An answer is {"value": …}, or {"error": "…"} if the request failed. `Server` has one method for each
request, which returns the value. Text that libraries print goes to standard error.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clean_transformer.benchmark.contestants import CONTESTANTS
from clean_transformer.benchmark.contestants.base import Contestant
from clean_transformer.benchmark.contestants.limit import Limit
from clean_transformer.benchmark.running.fresh import Costs, costs, peak_bytes
from clean_transformer.benchmark.running.timing import (
    import_seconds,
    median_seconds,
    wait_until_idle,
)
from clean_transformer.benchmark.work import Work

COMMAND = (sys.executable, "-m", "clean_transformer")  # the command `clean-transformer`


class Server:
    """Answers requests. Each method answers the request with the same name.

    `load` must be the first request. The contestant then stays loaded for all later requests.
    """

    contestant: Contestant

    def load(self, contestant: str, folder: str, device: str, dtype: str, threads: int) -> str:
        """Load the contestant, and return its title (the package and its version)."""
        torch.set_num_threads(threads)
        if dtype == "tf32":
            torch.set_float32_matmul_precision("high")
        self.name = contestant
        self.contestant = CONTESTANTS[contestant](Path(folder), device, dtype)
        return self.contestant.title

    def check(self, tokens: list[list[int]], new: int) -> dict[str, Any]:
        """Return logits and generated tokens, which `Race` compares with our model's results.

        The result has two keys: "logits" has the logits at the last position of each input in
        `tokens`, and "generated" has the `new` tokens that the contestant generates after the first
        input. "logits" is None if the contestant has no `forward`, and "generated" is None if the
        contestant has no `generate`.
        """
        given = torch.tensor(tokens, device=self.contestant.device)
        found: dict[str, Any] = {"logits": None, "generated": None}
        with torch.inference_mode():
            if has(self.contestant, "forward"):
                found["logits"] = self.contestant.last_logits(given).tolist()
            if has(self.contestant, "generate"):
                [row] = self.contestant.generate(given[:1], new)
                found["generated"] = [int(token) for token in row]
        return found

    def measure(self, work: dict[str, Any], at_least: float) -> float:
        """Measure `work` with the loaded contestant, and return seconds (or bytes, see `BYTES`).

        This method calls `Limit.measure` for the contestant "limit", and the function `measure` for
        all others.
        """
        wanted = Work(**work)
        limit = self.contestant if isinstance(self.contestant, Limit) else None
        with torch.inference_mode(limit is not None or wanted.kind != "train"):
            if limit is not None:
                return limit.measure(wanted, at_least)
            return measure(self.name, self.contestant, wanted, at_least)


def has(contestant: Contestant, method: str) -> bool:
    """Return whether the contestant's class overrides the given method of `Contestant`."""
    return getattr(type(contestant), method, None) is not getattr(Contestant, method, None)


def measure(name: str, contestant: Contestant, work: Work, at_least: float) -> float:
    """Return the seconds that `work` takes; for a kind in `BYTES`, the bytes that the work needs.

    `name` is the contestant's key in `CONTESTANTS`. The work is repeated until `at_least` seconds
    have passed, and the result is the median. The kinds in `FRESH` run only once. For
    the kind "step", the result is computed from two medians:
    (time for 1 + `work.new` tokens - time for 1 token) / `work.new`. Raises `RuntimeError` if noise
    makes this difference 0 or negative.
    """
    folder, device, dtype = contestant.folder, contestant.device, contestant.dtype
    tokens = some_tokens(work.batch, work.length, device)

    def first_use() -> Any:
        made = type(contestant)(folder, device, dtype)
        return made, made.generate(tokens[:1, :1], 1)

    def timed(call: Callable[[], object]) -> float:
        return median_seconds(call, device, at_least)

    match work.kind:
        case "import":
            return import_seconds(contestant.imported)
        case "memory":
            return float(peak_bytes(name, folder, device, dtype))
        case "help":
            return costs([*COMMAND, "--help"]).cpu_seconds
        case "doctor":
            return doctor().seconds
        case "doctor_memory":
            return doctor().peak
        case "load":
            return timed(lambda: type(contestant)(folder, device, dtype))
        case "first_use":
            return timed(first_use)
        case "forward":
            return timed(lambda: contestant.forward(tokens, work.last_only))
        case "generate":
            return timed(lambda: contestant.generate(tokens, work.new))
        case "step":
            first = timed(lambda: contestant.generate(tokens, 1))
            rest = timed(lambda: contestant.generate(tokens, 1 + work.new)) - first
            if rest <= 0:
                raise RuntimeError("the time of its steps is lost in the noise of reading")
            return rest / work.new
        case "capture":
            return timed(lambda: contestant.capture(tokens))
        case "train":
            tokens = some_tokens(work.batch, work.length + 1, device)
            return timed(lambda: contestant.train_step(tokens))
    raise ValueError(f"there is no kind of work {work.kind!r}")


@cache
def doctor() -> Costs:
    """Run `clean-transformer doctor` on GPT-2 small, and return what it needed.

    The first call in this process runs the command; later calls return the same numbers. Raises
    `RuntimeError` if the verdict is not PASS.
    """
    found = costs([*COMMAND, "doctor", "--weights", "stress:small", "--device", "cpu"])
    if found.status:
        raise RuntimeError(f"doctor ended with exit status {found.status}")
    return found


def some_tokens(batch: int, length: int, device: str) -> Tensor:
    """Return token ids [batch length], all below 997. Every call returns the same ids."""
    return (torch.arange(batch * length, device=device) * 389 % 997).view(batch, length)


def explain(error: Exception) -> str:
    """Return one line that describes the error, or says which package is not installed."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    reason = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {reason}"


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # If a library prints to standard output, the text goes to standard error instead.
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(server, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": explain(error)}
        wait_until_idle()  # so that this process does not slow down the next contestant
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
