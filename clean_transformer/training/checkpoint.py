"""Reads and writes the two files of a training run: checkpoint.pt and metrics.jsonl."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from clean_transformer.support.files import (
    UNFINISHED,
    atomic_file,
    locked,
    made_folder,
    write_atomically,
)
from clean_transformer.support.printable import printable
from clean_transformer.training.distributed import rank
from clean_transformer.weights.files import read_tensors
from clean_transformer.weights.refusals import WeightsError

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


def save(
    folder: Path,
    engine: nn.Module,
    optimizer: Optimizer,
    step: int,
    about: Mapping[str, Any],
    start: str,
) -> None:
    """Save the state of the run after `step` steps, in place of the previous checkpoint.

    All processes must call this function, but only process 0 writes the file. `engine` is the
    module that `distribute` returned for the model. `about` has values that identify the run, such
    as its settings. `start` is a hash of the model's weights before the first step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, state = get_state_dict(engine, optimizer, options=options)
    if rank() == 0:
        # With a path, `torch.save` would not say why it cannot write, for example for a full disk.
        with atomic_file(folder / CHECKPOINT) as unfinished, unfinished.open("wb") as file:
            whole = {"step": step, "about": dict(about), "model": model, "optimizer": state}
            torch.save(whole | {"start": start}, file)


def refuse_other_folder(folder: Path) -> None:
    """Raise an error if `folder` has files, but neither a checkpoint nor metrics of a run.

    Raises `NotADirectoryError` if `folder` is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file; give a folder for the run")
    if any((folder / name).exists() for name in (CHECKPOINT, METRICS)):
        return
    if others := [file.name for file in folder.iterdir() if not file.name.startswith(UNFINISHED)]:
        raise ValueError(
            f"{str(folder)!r} is not the folder of a training run: it has {min(others)!r}; train "
            "in a new folder"
        )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create `folder` if it is missing. Other runs cannot use it until the `with` block ends.

    If the `with` block ends with an error, and has written nothing, the new folder is deleted.
    Raises `BlockingIOError` if another run uses the folder.
    """
    with made_folder(folder), locked(folder):
        yield


def read(
    folder: Path, about: Mapping[str, Any], state: Mapping[str, Tensor], steps: int
) -> dict[str, Any] | None:
    """Return the dictionary that `save` wrote, or None if `folder` has no checkpoint.

    The tensors are memory-mapped. `about` identifies the run. Raises `ValueError` for a file that
    is not a checkpoint, and for a checkpoint that was saved with a different `about`. In the second
    case, the error message names the fields that differ. Also raises `ValueError` if the
    checkpoint's number of steps is not from 1 to `steps`, or if metrics.jsonl lacks one of these
    steps. Raises `ValueError` if the checkpoint's parameters do not have the names, shapes and
    dtypes of the state dict `state`, or if a running mean of AdamW does not have the shape and
    dtype of its parameter.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        saved = read_tensors(file)
        before = {str(field): value for field, value in saved["about"].items()}
    except (WeightsError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not a checkpoint of a training run ({error}); train in another folder"
        ) from None
    differing = [
        f"{field:.200} was {before.get(field)!r:.200} and is now {about.get(field)!r}"
        for field in sorted(before.keys() | about.keys())
        if type(before.get(field)) is not type(about.get(field))
        or before.get(field) != about.get(field)
    ]
    if differing:
        raise ValueError(
            f"{folder} has a different run: {printable('; '.join(differing))}. Resume it with the "
            "same settings, or train in another folder"
        )
    try:
        problem = _problem(saved, state, steps)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error!s:.200}"
    if problem:
        raise ValueError(f"{file} is damaged: {printable(problem)}; train in another folder")
    metrics = folder / METRICS
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if lines < saved["step"]:
        raise ValueError(
            f"{metrics} has {lines} of the checkpoint's {saved['step']} steps; restore the file, "
            "or train in another folder"
        )
    return saved


def _problem(saved: Mapping[str, Any], state: Mapping[str, Tensor], steps: int) -> str | None:
    """Return why a checkpoint does not fit the model or the run, or None if it fits."""
    step, model, moments = saved["step"], saved["model"], saved["optimizer"]["state"]
    if type(saved["start"]) is not str:
        return f"start is {saved['start']!r:.200}"
    if type(step) is not int or not 1 <= step <= steps:
        return f"it is of step {step!r:.200}, and the run has {steps} steps"
    if different := sorted(model.keys() ^ state.keys()):
        return f"{different[0]:.200} is in only one of the checkpoint and the model"
    for name, value in model.items():
        wanted = (state[name].shape, state[name].dtype)
        if (value.shape, value.dtype) != wanted:
            return f"{name} is {value.dtype} {[*value.shape]}, not {wanted[1]} {[*wanted[0]]}"
        for kind, moment in moments.get(name, {}).items():
            if kind.startswith("exp_avg") and (moment.shape, moment.dtype) != wanted:
                return f"{kind} of {name} is {moment.dtype} {[*moment.shape]}"
    return None


def restore(saved: Mapping[str, Any], engine: nn.Module, optimizer: Optimizer) -> int:
    """Load the checkpoint `saved` into the model and the optimizer.

    Returns the number of steps that the run had done when the checkpoint was saved. The number of
    processes may have changed since then.
    """
    set_state_dict(
        engine,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    return saved["step"]


@dataclass(frozen=True)
class Measured:
    """The measurements of one training step. The losses are in nats per token.

    `step` counts from 1. `loss` is the mean loss on the training batch of all processes.
    `gradient_norm` is the norm of all gradients together, before clipping. `tokens_per_second`
    counts the tokens of all processes. `held_out_loss` is None for a step without an evaluation.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    held_out_loss: float | None = None


class Metrics:
    """Writes metrics.jsonl, with one line per step.

    `steps` is the number of steps that the last checkpoint contains, or 0 for a new run. Only the
    first `steps` lines of an existing file are kept, because a resumed run repeats the steps after
    the last checkpoint.
    """

    def __init__(self, folder: Path, steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS
        lines = self.file.read_text("utf-8").splitlines(keepends=True) if steps else []
        write_atomically(self.file, "".join(lines[:steps]))

    def add(self, measured: Measured) -> None:
        """Append the measurements of a step.

        After a step, call `add` before the function `save` writes a checkpoint. Then metrics.jsonl
        has a line for every step in the checkpoint, whenever the run is killed.
        """
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measured)) + "\n")
