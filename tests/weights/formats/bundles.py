"""A small writer of TensorFlow's bundles and OpenAI's folders, for tests of the reader.

It writes one shard, one block, and every key in full. A real bundle shares the beginnings of keys;
those in `data/` were written by TensorFlow.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.formats.crc32c import masked_crc32c
from clean_transformer.weights.formats.openai import HPARAMS, OPENAI
from clean_transformer.weights.formats.tensorflow import DTYPES, MAGIC

NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def varint(number: int) -> bytes:
    low, high = number % 128, number >> 7
    return bytes([low + 128]) + varint(high) if high else bytes([low])


def sized(content: bytes) -> bytes:
    return varint(len(content)) + content


def entry(key: bytes, value: bytes) -> bytes:
    return b"\0" + varint(len(key)) + varint(len(value)) + key + value


def table_of_blocks(*blocks: bytes, compression: int = 0, repeats: int = 1) -> bytes:
    """A table of these blocks of entries, with correct checksums. It lists all `repeats` times."""
    table = b""

    def append(entries: bytes) -> bytes:
        nonlocal table
        block = entries + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")  # one restart
        place = varint(len(table)) + varint(len(block))
        block += bytes([compression])
        table += block + masked_crc32c(block).to_bytes(4, "little")
        return place

    places = [append(entries) for entries in blocks]
    metaindex = append(b"")
    index = append(b"".join(entry(b"", place) for place in places * repeats))
    return table + (metaindex + index).ljust(40, b"\0") + MAGIC


def table(entries: Mapping[bytes, bytes]) -> bytes:
    return table_of_blocks(b"".join(entry(*pair) for pair in entries.items()))


def write_bundle(prefix: Path, tensors: Mapping[str, Tensor]) -> None:
    index, data = {b"": b"\x08\1"}, b""  # 1 shard
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        shape = b"".join(b"\x12" + sized(b"\x08" + varint(n)) for n in tensor.shape)
        index[name.encode()] = (
            b"\x08" + varint(NUMBERS[tensor.dtype]) + b"\x12" + sized(shape)
            + b"\x20" + varint(len(data)) + b"\x28" + varint(len(raw))
            + b"\x35" + masked_crc32c(raw).to_bytes(4, "little")
        )  # fmt: skip
        data += raw.tobytes()
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(index))
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)


def write_openai(folder: Path, cfg: Config, state: Mapping[str, Tensor]) -> None:
    """Our parameters as OpenAI published theirs."""
    folder.mkdir(exist_ok=True)
    write_bundle(folder / "model.ckpt", OPENAI.write(cfg, state))
    hparams = {theirs: cfg.to_dict()[ours] for theirs, ours in HPARAMS.items()}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
