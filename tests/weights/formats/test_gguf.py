import sys
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.gguf import GGUF, SIZES, read_gguf, write_gguf
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_to_json
from clean_transformer.weights.refusals import WeightsError

from ...helpers import (
    TINY,
    assert_equal_states,
    assert_same_function,
    random_model,
    random_tokens,
    randomized,
    tiny,
)
from .linear_gpt import LinearGPT

UNTIED = tiny(tied_unembed=False)
F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))


def write_as_llama_cpp(
    file: Path, cfg: Config, theirs: LinearGPT, matrices=F32, *, arch: str = "gpt2", **options
) -> Path:
    """Write a file with the gguf package only: its names for tensors, its methods for metadata.

    Only matrices have the type `matrices`; as in llama.cpp's converter, the others are float32.
    """
    writer = gguf.GGUFWriter(file, arch, **options)
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.n_ctx)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_layer_norm_eps(cfg.eps)
    writer.add_token_list([str(token) for token in range(cfg.d_vocab)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, cfg.n_layers)
    for key, tensor in theirs.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        type = matrices if tensor.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def their_model(cfg: Config, dtype: torch.dtype = torch.float32) -> LinearGPT:
    """A random model in float32, whose numbers are exact in `dtype`."""
    return randomized(LinearGPT(cfg), dtype).float()


# What a file of the gguf package gives.


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_their_file_gives_their_logits(tmp_path: Path, tied: bool):
    cfg = tiny(tied_unembed=tied, eps=1e-3)
    theirs = their_model(cfg)
    file = write_as_llama_cpp(tmp_path / "model.gguf", cfg, theirs)
    ours = DemoTransformer.from_pretrained(file, device="cpu", dtype=torch.float64)
    assert ours.cfg == cfg
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = cfg.eps
    assert_same_function(ours(random_tokens()), theirs.double()(random_tokens()))


@pytest.mark.parametrize(("type", "dtype"), [(F16, torch.float16), (BF16, torch.bfloat16)])
def test_half_precision_arrives_unrounded(tmp_path: Path, type, dtype: torch.dtype):
    theirs = their_model(UNTIED, dtype)
    file = write_as_llama_cpp(tmp_path / "model.gguf", UNTIED, theirs, type)
    expected = DemoTransformer.from_state_dict(theirs.state_dict(), UNTIED)
    for wanted in (torch.float64, torch.float32, dtype):
        ours = DemoTransformer.from_pretrained(str(file), device="cpu", dtype=wanted)
        assert_equal_states(ours.state_dict(), expected.to(wanted).state_dict())


def test_the_names_are_those_of_the_package():
    ours = {
        row.theirs.rpartition(".")[0] for row in GGUF.rows(tiny(tied_unembed=False)) if row.theirs
    }
    tensors = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]]
    assert ours == {name.format(bid=layer) for name in tensors for layer in range(2)}


def test_training_leaves_the_file_alone(tmp_path: Path):
    file = write_as_llama_cpp(tmp_path / "model.gguf", TINY, their_model(TINY))
    before = file.read_bytes()
    model = DemoTransformer.from_pretrained(file, device="cpu")
    model(random_tokens()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert file.read_bytes() == before


# What is refused.


def refused(file: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        DemoTransformer.from_pretrained(file, device="cpu")


def test_quantized_tensors_are_refused_by_name(tmp_path: Path):
    cfg = tiny(n_layers=1, d_model=32, n_heads=4, d_head=8, d_mlp=32)
    file = write_as_llama_cpp(tmp_path / "model.gguf", cfg, their_model(cfg), Q8_0)
    refused(
        file,
        r"model\.gguf is quantized: token_embd\.weight is Q8_0, .*ffn_down\.weight is Q8_0, .*;"
        r" only F32, F16, BF16 can be read; convert the model again with --outtype f16",
    )


def test_another_architecture(tmp_path: Path):
    file = write_as_llama_cpp(tmp_path / "model.gguf", TINY, their_model(TINY), arch="gptneox")
    refused(file, r"model\.gguf is a 'gptneox' model; only 'gpt2' is implemented")


def test_another_byte_order(tmp_path: Path):
    file, theirs = tmp_path / "model.gguf", their_model(TINY)
    write_as_llama_cpp(file, TINY, theirs, endianess=gguf.GGUFEndian.BIG)
    refused(file, "has the byte order of another machine")


def rewrite(file: Path, *, without: str = "", **changes) -> Path:
    """Copy one of our files with other sizes in its metadata, or without one key or tensor."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_name("changed.gguf"), "gpt2")
    for size, key in SIZES.items():
        if key != without:
            writer.add_uint32(key, changes.get(size, getattr(TINY, size)))
    writer.add_layer_norm_eps(TINY.eps)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "gpt2.context_length"}, r"gguf has no 'gpt2\.context_length'"),
        ({"without": "token_embd.weight"}, r"gguf has no 'token_embd\.weight'"),
        ({"without": "blk.1.ffn_up.bias"}, r"GGUF gpt2 .*missing: blk\.1\.ffn_up\.bias$"),
        ({"n_heads": 5}, "n_embd 12 is not a multiple of 5 heads"),
        ({"n_layers": 1}, r"unused: blk\.1\.attn_norm\.weight, "),
        (
            {"n_ctx": 11},
            r"wrong shape: position_embd\.weight \(10, 12\) instead of \(11, 12\)$",
        ),
    ],
)
def test_metadata_and_tensors_that_contradict_each_other(tmp_path: Path, changes, message: str):
    write_gguf(tmp_path / "model.gguf", TINY, random_model(dtype=torch.float32).state_dict())
    refused(rewrite(tmp_path / "model.gguf", **changes), message)


def test_a_truncated_file(tmp_path: Path):
    file = tmp_path / "model.gguf"
    write_gguf(file, TINY, random_model(dtype=torch.float32).state_dict())
    content, last = file.read_bytes(), gguf.GGUFReader(file).tensors[-1]
    for kept in (*range(0, last.data_offset, 101), last.data_offset + last.n_bytes - 1):
        file.write_bytes(content[:kept])
        refused(file, r"model\.gguf is damaged \(.*\); copy or download it again")


def test_a_file_of_another_kind(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" * 20)
    refused(tmp_path / "model.gguf", r"is damaged \(GGUF magic invalid\)")


def test_a_file_that_says_a_thing_twice(tmp_path: Path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_context_length(1)
    writer.add_uint32("gpt3.context_length", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file.write_bytes(file.read_bytes().replace(b"gpt3", b"gpt2"))
    refused(file, r"is damaged \('gpt2\.context_length' occurs twice")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model(dtype=torch.float32)
    write_gguf(tmp_path / "model.gguf", TINY, model.state_dict())
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "model.gguf", r"gguf package; pip install 'clean-transformer\[gguf\]'$")
    with pytest.raises(WeightsError, match=r"need the gguf package; pip install"):
        write_gguf(tmp_path / "new.gguf", TINY, model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# What is written.


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_reads_what_we_write(tmp_path: Path, tied: bool):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    cfg = tiny(tied_unembed=tied)
    state = random_model(cfg, dtype=torch.float32).state_dict()
    write_gguf(tmp_path / "model.gguf", cfg, state)
    # Without a config, it looks for the vocabulary's size in a tokenizer, and for n_positions in
    # n_ctx.
    config = transformers.GPT2Config(**config_to_json(cfg))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    ).state_dict()
    for key, tensor in HUGGINGFACE.write(cfg, state).items():
        assert torch.equal(theirs[key], tensor), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_matrices_are_in_half_precision(tmp_path: Path, dtype: torch.dtype):
    write_gguf(tmp_path / "model.gguf", TINY, random_model(dtype=dtype).state_dict())
    _, theirs = read_gguf(tmp_path / "model.gguf")
    for name, tensor in theirs.items():
        wide = tensor.ndim == 1 or name == "position_embd.weight"
        assert tensor.dtype == (torch.float32 if wide else dtype), name


def float64_positions(state: dict[str, Tensor]) -> None:
    state["pos_embed.W_pos"] = state["pos_embed.W_pos"].double()


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (TINY, lambda state: state["unembed.b_U"].add_(1), r"GGUF.* no place for unembed\.b_U, wh"),
        (TINY, float64_positions, r"F32, F16, BF16; position_embd\.weight is torch\.float64; conv"),
        (tiny(normalization_type="LNPre", tied_unembed=False), None, "for folded LayerNorms"),
        (tiny(d_head=5), None, "GGUF gpt2 format needs n_heads × d_head = d_model, not 3 × 5 = 12"),
        (tiny(eps=1.23456789e-5), None, r"eps in float32, which cannot hold 1\.23456789e-05"),
    ],
    ids=["b_U", "float64", "LNPre", "d_head", "eps"],
)
def test_a_model_without_a_place_in_the_format_writes_nothing(tmp_path: Path, cfg, change, message):
    state = random_model(cfg, dtype=torch.float32).state_dict()
    if change:
        change(state)
    with pytest.raises(WeightsError, match=message):
        write_gguf(tmp_path / "model.gguf", cfg, state)
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    file = tmp_path / "model.gguf"
    state = random_model(dtype=torch.float32).state_dict()
    write_gguf(file, TINY, state)
    before = file.read_bytes()

    def break_off(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(file, TINY, random_model(dtype=torch.float32, seed=1).state_dict())
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]
