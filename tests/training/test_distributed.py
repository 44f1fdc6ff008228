"""Several processes train the model that one does, whole or in shards, and go on as one does."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel

from clean_transformer.training import checkpoint
from clean_transformer.training.distributed import distribute, joined, n_processes, rank
from clean_transformer.training.settings import Training

from .. import processes
from ..helpers import Rounding, assert_equal_states
from .runs import CPU, RUN, read_metrics, run

# A batch that two processes, three, and parts of theirs, can share.
SHARED = replace(RUN, batch=12)
OUTLIVED = 3
MEASURED = ("loss", "gradient_norm", "held_out_loss")
SHARDED = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="fully_shard came with PyTorch 2.6"
)


def train_together(folder: Path, training: Training, stop_at: int | None = None) -> None:
    try:
        with joined(CPU):
            assert n_processes() > 1
            # Each begins with other numbers: those of the first are taken.
            run(folder, training, seed=rank(), stop_at=stop_at)
    finally:
        # One that outlives its group may wait for ever.
        if any(type(each) is DistributedDataParallel for each in gc.get_objects()):
            sys.exit(OUTLIVED)


def rounding(folder: Path, training: Training) -> tuple[dict[str, torch.Tensor], Rounding]:
    """What one process ends with, and how far another order of its sums may lead from it."""
    allowed = Rounding()
    save = checkpoint.save

    def watch(folder, engine, optimizer, step, *about) -> None:
        save(folder, engine, optimizer, step, *about)
        squares = {
            name: optimizer.state[parameter]["exp_avg_sq"]
            for name, parameter in engine.named_parameters()
            if parameter.requires_grad
        }
        allowed.add(step - 1, training.rate(step - 1), training.clip, squares)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", watch)
        model = run(folder, replace(training, save_every=1))
    return model.state_dict(), allowed


def test_an_old_pytorch_without_fully_shard_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.delattr(fsdp, "fully_shard", raising=False)
    with pytest.raises(ImportError, match=r"needs PyTorch 2.6 or later, and this is"):
        distribute(nn.Linear(2, 2), CPU, sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=SHARDED)])
def test_two_processes_train_what_one_does(tmp_path: Path, sharded: bool):
    one, allowed = rounding(tmp_path / "one", SHARED)
    training = replace(SHARED, sharded=sharded, recompute=True)
    assert processes.as_torchrun(train_together, 2, tmp_path / "two", training) == [0, 0]

    two = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)["model"]
    assert two.keys() == one.keys()
    for name, parameter in one.items():
        # b_U is not trained.
        limit = allowed.allowed.get(name, torch.zeros(()))
        assert ((two[name] - parameter).abs() <= limit).all(), name
        assert (limit < 1e-8).all() or name.endswith("b_K")
    ours, theirs = (
        [line[key] for line in read_metrics(tmp_path / folder) for key in MEASURED if line[key]]
        for folder in ("one", "two")
    )
    # The weights differ by that little, so that the first step's sums are what differs most.
    assert theirs == pytest.approx(ours, rel=1e-12)


# The sum of two gradients has one order; that of three depends on where they are kept.
@pytest.mark.slow
@pytest.mark.parametrize(("n", "sharded"), [(3, False), pytest.param(2, True, marks=SHARDED)])
def test_several_processes_go_on_to_the_same_bits(tmp_path: Path, n: int, sharded: bool):
    training = replace(SHARED, sharded=sharded)
    for folder, stops in (("whole", [None]), ("parts", [3, None])):
        for stop_at in stops:
            arguments = tmp_path / folder, training, stop_at
            ended = processes.as_torchrun(train_together, n, *arguments)
            assert any(ended) == (stop_at is not None)
            assert OUTLIVED not in ended
    whole, parts = (
        torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)["model"]
        for folder in ("whole", "parts")
    )
    assert_equal_states(whole, parts)
    assert [line["step"] for line in read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5]
