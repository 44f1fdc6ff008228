"""Small training runs, for the tests to start here or in processes of their own."""

import json
from pathlib import Path

import numpy as np
import torch

from clean_transformer.model import DemoTransformer
from clean_transformer.training.loop import train
from clean_transformer.training.settings import Training

from ..helpers import random_model, tiny

CFG = tiny(n_layers=1)
CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(CFG.d_vocab, size=500).astype(np.uint16)
RUN = Training(steps=5, batch=4, accumulation=2, warmup=2, save_every=2, held_out_batches=2)


class Stopped(Exception):
    """Interrupts a run."""


def run(
    folder: Path, training: Training = RUN, *, stop_at: int | None = None, seed: int = 0
) -> DemoTransformer:
    """Train a random model of that seed, and return it."""

    def on_step(measured) -> None:
        if measured.step == stop_at:
            raise Stopped

    model = random_model(CFG, seed=seed)
    options = {"held_out": TOKENS[:100], "device": CPU, "on_step": on_step}
    train(model, TOKENS, folder, training, **options)
    return model


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
