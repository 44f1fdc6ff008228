"""Every format gives back the bits that it took, in every dtype that it can hold."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.gguf import GGUF, write_gguf
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_to_json, write_folder
from clean_transformer.weights.formats.openai import OPENAI
from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER
from clean_transformer.weights.load import FORMATS
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.table import Format

from ..helpers import TINY, assert_equal_states, configs

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def random_bits(cfg: Config, dtype: torch.dtype, *formats: Format) -> dict[str, Tensor]:
    """Random bits: numbers of any size and sign, infinity included. A parameter that one of the
    formats does not have is zero."""
    lowest, highest = torch.iinfo(INTEGERS[dtype]).min, torch.iinfo(INTEGERS[dtype]).max
    zeros = {row.ours for known in formats for row in known.rows(cfg) if not row.theirs}
    state = {}
    for name, shape in parameter_shapes(cfg).items():
        bits = torch.randint(lowest, highest, shape, dtype=INTEGERS[dtype])
        numbers = bits.view(dtype)
        state[name] = torch.where(numbers.isnan() | (name in zeros), 0, numbers)
    return state


def assert_equal_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Compare the bits, because as numbers −0 equals 0."""
    assert_equal_states(
        {name: tensor.view(INTEGERS[tensor.dtype]) for name, tensor in ours.items()},
        {name: tensor.view(INTEGERS[tensor.dtype]) for name, tensor in theirs.items()},
    )


@given(
    cfg=configs(),
    route=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3),
    dtype=st.sampled_from([*INTEGERS]),
)
def test_from_format_to_format(cfg: Config, route: list[Format], dtype: torch.dtype):
    # OpenAI's format has no separate unembedding.
    cfg = replace(cfg, tied_unembed=True) if OPENAI in route else cfg
    state = before = random_bits(cfg, dtype, *route)
    for known in route:
        state = DemoTransformer.from_state_dict(known.write(cfg, state), cfg).state_dict()
    assert_equal_bits(state, before)


FILES = {
    "folder": (write_folder, HUGGINGFACE),
    "model.gguf": (write_gguf, GGUF),
    "model.pt": (lambda file, cfg, state: torch.save(state, file), HOOKED_TRANSFORMER),
}


# With fewer tokens, a random unembedding could equal the embedding and be read as tied.
@pytest.mark.filterwarnings("ignore:.* does not show eps; assuming GPT-2.s eps")
@pytest.mark.parametrize("name", FILES)
@given(
    cfg=configs(d_vocab=7), dtype=st.sampled_from([*INTEGERS]), read_as=st.sampled_from([*INTEGERS])
)
def test_through_a_file(name: str, cfg: Config, dtype: torch.dtype, read_as: torch.dtype):
    assume(name != "model.gguf" or dtype != torch.float64)  # GGUF has no float64
    write, known = FILES[name]
    # Files with NaN or infinity are refused.
    bits = random_bits(cfg, dtype, known)
    state = {key: value.nan_to_num(0.0, 0.0, 0.0) for key, value in bits.items()}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name), cfg, state)
        read = DemoTransformer.from_pretrained(Path(folder, name), device="cpu", dtype=read_as)
        assert_equal_bits(read.state_dict(), {key: state[key].to(read_as) for key in state})
    if name != "model.pt":  # its shapes do not show everything
        assert read.cfg == replace(cfg, initializer_range=read.cfg.initializer_range)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read_as", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_folder_in_half_precision(tmp_path: Path, half: torch.dtype, read_as: torch.dtype):
    state = random_bits(TINY, half, HUGGINGFACE)
    save_file(HUGGINGFACE.write(TINY, state), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(TINY)))
    read = DemoTransformer.from_pretrained(tmp_path, device="cpu", dtype=read_as)
    assert_equal_bits(read.state_dict(), {key: state[key].to(read_as) for key in state})
