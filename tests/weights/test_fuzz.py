"""Mutated files of every format: each gives equal weights, or one error that names the file.

`FUZZ_SECONDS=3600 pytest tests/weights/test_fuzz.py` runs for an hour in all.
"""

import os
import random
import shutil
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clean_transformer.weights.formats.gguf import write_gguf
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, write_folder
from clean_transformer.weights.formats.nanogpt import NANOGPT
from clean_transformer.weights.load import read_pretrained
from clean_transformer.weights.refusals import WeightsError

from ..helpers import random_model, tiny
from .formats.bundles import write_openai

CFG = tiny(d_mlp=48)
CPU = torch.device("cpu")
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 10, "vocab_size": 31}


def state() -> dict[str, torch.Tensor]:
    return random_model(CFG, dtype=torch.float32).state_dict()


def safetensors(folder: Path) -> Path:
    write_folder(folder, CFG, state())
    return folder


def pickled(folder: Path, **options) -> Path:
    write_folder(folder, CFG, state())
    (folder / "model.safetensors").unlink()
    torch.save(HUGGINGFACE.write(CFG, state()), folder / "pytorch_model.bin", **options)
    return folder


def legacy(folder: Path) -> Path:
    return pickled(folder, _use_new_zipfile_serialization=False)


def nanogpt(folder: Path) -> Path:
    saved = {"model": NANOGPT.write(CFG, state()), "model_args": ARGS}
    torch.save(saved, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def gguf(folder: Path) -> Path:
    write_gguf(folder / "model.gguf", CFG, state())
    return folder / "model.gguf"


def openai(folder: Path) -> Path:
    write_openai(folder, CFG, state())
    return folder


WRITERS: tuple[Callable[[Path], Path], ...] = (safetensors, pickled, legacy, nanogpt, gguf, openai)


# Mutations of bytes, and of what formats are made of: numbers, names, records.


def flip(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def flip_early(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(min(len(raw), 4000))] = rng.randrange(256)


def cut(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def remove(raw: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(raw))
    del raw[start : start + rng.choice((1, 4, 8, 64))]


def repeat(raw: bytearray, rng: random.Random) -> None:
    start, place = rng.randrange(len(raw)), rng.randrange(len(raw))
    raw[place:place] = raw[start : start + rng.choice((1, 8, 64, 512))]


def number(raw: bytearray, rng: random.Random) -> None:
    place = rng.randrange(min(len(raw), 4000))
    value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
    raw[place : place + 8] = struct.pack("<Q", value)


def digit(raw: bytearray, rng: random.Random) -> None:
    places = [place for place, byte in enumerate(raw[:4000]) if 48 <= byte < 58]
    if places:
        raw[rng.choice(places)] = rng.choice(b'0123456789-e."[{')


MUTATIONS = (flip, flip_early, cut, remove, repeat, number, digit)


def mutate(file: Path, rng: random.Random) -> None:
    if zipfile.is_zipfile(file) and rng.random() < 0.7:  # with right checksums
        with zipfile.ZipFile(file) as archive:
            records = {name: bytearray(archive.read(name)) for name in archive.namelist()}
        name = rng.choice([n for n in records if records[n]] + [n for n in records if "pkl" in n])
        rng.choice(MUTATIONS)(records[name], rng)
        with zipfile.ZipFile(file, "w") as archive:
            for each, content in records.items():
                archive.writestr(each, bytes(content))
        return
    raw = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        if raw:
            rng.choice(MUTATIONS)(raw, rng)
    file.write_bytes(raw)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_mutated_files(tmp_path: Path, write: Callable[[Path], Path]):
    (tmp_path / "good").mkdir()
    source = write(tmp_path / "good")
    name = "" if source.is_dir() else source.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = read_pretrained(source, CPU, torch.float32)
        end, seed = time.monotonic() + SECONDS / len(WRITERS), 0
        while seed < 60 or time.monotonic() < end:
            seed += 1
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            rng = random.Random(seed)
            mutate(rng.choice(sorted((tmp_path / "bad").iterdir())), rng)
            began = time.monotonic()
            error = None
            try:
                cfg, read = read_pretrained(tmp_path / "bad" / name, CPU, torch.float32)
            except (WeightsError, FileNotFoundError) as refusal:
                error = str(refusal)
            assert time.monotonic() - began < 10, seed
            if error is not None:
                assert str(tmp_path / "bad") in error, seed
                assert error.isprintable(), seed
                continue
            # Safetensors, GGUF, and files from before PyTorch 1.6 have no checksums, so another
            # finite number in a tensor cannot be noticed. A wrong shape or name can.
            assert cfg.n_layers == expected[0].n_layers, seed
            assert read.keys() == expected[1].keys(), seed
            assert all(tensor.isfinite().all() for tensor in read.values()), seed
            if write is openai:
                assert all(read[key].equal(expected[1][key]) for key in read), seed
