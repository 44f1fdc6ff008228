"""Reads and writes GGUF, the file format of llama.cpp, for the `gpt2` architecture.

The tensors have the names that the gguf package lists in `MODEL_TENSORS`. The weight of every
linear layer is [out, in], as in `nn.Linear`.
"""

from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from clean_transformer.config import Config
from clean_transformer.support.files import atomic_file
from clean_transformer.weights.files import readable
from clean_transformer.weights.formats.gguf_header import check_header, check_tensors
from clean_transformer.weights.refusals import AGAIN, WeightsError, head_width, refuse_architecture
from clean_transformer.weights.rows import Row
from clean_transformer.weights.table import File, Format, State

QKV_WEIGHT = "(qkv head d_head) d_model -> qkv head d_model d_head"


QKV_BIAS = "(qkv head d_head) -> qkv head d_head"


OUTER = (
    Row("embed.W_E", "token_embd.weight"),
    Row("pos_embed.W_pos", "position_embd.weight"),
    Row("ln_final.w", "output_norm.weight"),
    Row("ln_final.b", "output_norm.bias"),
    Row("unembed.W_U", "output.weight", "d_vocab d_model -> d_model d_vocab"),
    Row("unembed.b_U", None),
)


BLOCK = (
    Row("ln1.w", "attn_norm.weight"),
    Row("ln1.b", "attn_norm.bias"),
    Row("attn.W_Q", "attn_qkv.weight", QKV_WEIGHT, part=0),
    Row("attn.W_K", "attn_qkv.weight", QKV_WEIGHT, part=1),
    Row("attn.W_V", "attn_qkv.weight", QKV_WEIGHT, part=2),
    Row("attn.b_Q", "attn_qkv.bias", QKV_BIAS, part=0),
    Row("attn.b_K", "attn_qkv.bias", QKV_BIAS, part=1),
    Row("attn.b_V", "attn_qkv.bias", QKV_BIAS, part=2),
    Row("attn.W_O", "attn_output.weight", "d_model (head d_head) -> head d_head d_model"),
    Row("attn.b_O", "attn_output.bias"),
    Row("ln2.w", "ffn_norm.weight"),
    Row("ln2.b", "ffn_norm.bias"),
    Row("mlp.W_in", "ffn_up.weight", "d_mlp d_model -> d_model d_mlp"),
    Row("mlp.b_in", "ffn_up.bias"),
    Row("mlp.W_out", "ffn_down.weight", "d_model d_mlp -> d_mlp d_model"),
    Row("mlp.b_out", "ffn_down.bias"),
)


# Maps each field of `Config` to the key of GGUF's metadata with the same meaning.
SIZES = {
    "n_layers": "gpt2.block_count",
    "n_heads": "gpt2.attention.head_count",
    "d_model": "gpt2.embedding_length",
    "d_mlp": "gpt2.feed_forward_length",
    "n_ctx": "gpt2.context_length",
}


EPS = "gpt2.attention.layer_norm_epsilon"


# The tensor types that this module can read and write, by their names in GGUF.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_gguf(file: Path) -> tuple[Config, State]:
    """Return the architecture, and the memory-mapped tensors under llama.cpp's names.

    Raises `WeightsError` for a damaged file, for an architecture other than gpt2, and for tensors
    that are not float32, float16 or bfloat16, such as quantized tensors.
    """
    reader = _reader(file)
    quantized = [
        f"{tensor.name} is {tensor.tensor_type.name}"
        for tensor in reader.tensors
        if tensor.tensor_type.name not in DTYPES
    ]
    if quantized:
        raise WeightsError(
            f"{file} is quantized: {', '.join(quantized)}; only {', '.join(DTYPES)} can be read; "
            "convert the model again with --outtype f16"
        )
    state = {
        tensor.name: torch.from_numpy(tensor.data).view(DTYPES[tensor.tensor_type.name])
        for tensor in reader.tensors
    }
    return _config(file, reader, state), state


def _reader(file: Path) -> Any:
    """Open a GGUF file with the gguf package. Raises `WeightsError` for a damaged file."""
    package = _package()
    try:
        if not _is_foreign(file):
            check_header(readable(file))
        # "c" means copy on write: changes to the tensors, as in training, do not change the file.
        reader = package.GGUFReader(file, "c")
        check_tensors(reader, file.stat().st_size)
    except WeightsError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{file} is damaged ({error}); {AGAIN}") from None
    if reader.byte_order != "I":
        raise WeightsError(
            f"{file} has the byte order of another machine; convert the model again on this one"
        )
    return reader


def _is_foreign(file: Path) -> bool:
    """Return whether the numbers in the file are big-endian."""
    # The version is a small number. With its bytes in the wrong order, it is at least 2**16.
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8)[4:], "little") >= 2**16


def read_tokenizer(file: Path) -> dict[str, Any]:
    """Return the fields about the tokenizer in a GGUF file, without "tokenizer.ggml." in the keys.

    Raises `WeightsError` for a damaged file.
    """
    prefix = "tokenizer.ggml."
    fields = _reader(file).fields
    return {
        key.removeprefix(prefix): field.contents()
        for key, field in fields.items()
        if key.startswith(prefix)
    }


def _config(file: Path, reader: Any, state: State) -> Config:
    def metadata(key: str) -> Any:
        return reader.fields[key].contents()

    try:
        architecture = metadata("general.architecture")
        if architecture != "gpt2":
            raise WeightsError(f"{file} is a {architecture!r} model; only 'gpt2' is implemented")
        sizes = {size: metadata(key) for size, key in SIZES.items()}
        return Config(
            **sizes,
            d_head=head_width(str(file), sizes["d_model"], sizes["n_heads"]),
            d_vocab=len(state[GGUF.marker]),
            eps=_shortest_decimal(metadata(EPS)),
            tied_unembed=GGUF.is_tied(state),
        )
    except KeyError as missing:
        raise WeightsError(f"{file} has no {missing}") from None


def write_gguf(file: str | Path, cfg: Config, state: State) -> None:
    """Write a model to a GGUF file for llama.cpp.

    For example: `write_gguf(file, model.cfg, model.state_dict())`. If an error occurs, no
    incomplete file remains. The file contains no tokenizer, so llama.cpp can run the model only on
    token ids. The LayerNorm parameters, the biases and the position embeddings are written in
    float32, because llama.cpp requires this. Raises `WeightsError`, and writes nothing, for a model
    that the format cannot store.
    """
    gguf = _package()
    refuse_architecture(GGUF.name, cfg)
    tensors = GGUF.write(cfg, state)
    types = {dtype: gguf.GGMLQuantizationType[name] for name, dtype in DTYPES.items()}
    others = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in types]
    if others:
        raise WeightsError(
            f"GGUF holds {', '.join(DTYPES)}; {', '.join(others)}; convert the model"
        )
    if _shortest_decimal(cfg.eps) != cfg.eps:
        raise WeightsError(f"GGUF stores eps in float32, which cannot hold {cfg.eps!r}")
    with (
        atomic_file(Path(file)) as unfinished,
        closing(gguf.GGUFWriter(unfinished, "gpt2")) as writer,
    ):
        for size, key in SIZES.items():
            writer.add_uint32(key, getattr(cfg, size))
        writer.add_float32(EPS, cfg.eps)
        writer.add_vocab_size(cfg.d_vocab)
        writer.add_tokenizer_model("none")
        for name, tensor in tensors.items():
            if tensor.ndim == 1 or name == "position_embd.weight":
                tensor = tensor.float()
            # NumPy has no bfloat16, so we pass bfloat16 bits to the gguf package as int16.
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            writer.add_tensor(name, bits.cpu().numpy(), raw_dtype=types[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _shortest_decimal(value: float) -> float:
    """Return the shortest decimal number that rounds to the same float32 as `value`."""
    # A GGUF file stores eps in float32, and the float32 nearest to 1e-5 is not exactly 1e-5.
    return float(str(np.float32(value)))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise WeightsError(
            "GGUF files need the gguf package; pip install 'clean-transformer[gguf]'"
        ) from None
    return gguf


GGUF = Format(
    name="GGUF gpt2",
    marker="token_embd.weight",
    outer=OUTER,
    block=BLOCK,
    block_prefix="blk.{layer}.",
    file=File(suffixes=(".gguf",), read=read_gguf),
)
