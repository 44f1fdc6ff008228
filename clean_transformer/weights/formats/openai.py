"""OpenAI's own GPT-2: its rows, its hparams.json, and its folders, read and written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.support.files import atomic_folder
from clean_transformer.weights.formats.huggingface import QKV_BIAS, QKV_WEIGHT, read_json
from clean_transformer.weights.formats.tensor_bundle import read_bundle, write_bundle
from clean_transformer.weights.table import Format, Row, State, WeightsError

# Its linear maps are convolutions of width 1, whose weight is [1, in, out]. It has no unembedding:
# that is always the embedding.
OPENAI = Format(
    name="OpenAI GPT-2",
    marker="model/wte",
    outer=(
        Row("embed.W_E", "model/wte"),
        Row("pos_embed.W_pos", "model/wpe"),
        Row("ln_final.w", "model/ln_f/g"),
        Row("ln_final.b", "model/ln_f/b"),
        Row("unembed.b_U", None),
    ),
    block=(
        Row("ln1.w", "ln_1/g"),
        Row("ln1.b", "ln_1/b"),
        Row("attn.W_Q", "attn/c_attn/w", f"1 {QKV_WEIGHT}", part=0),
        Row("attn.W_K", "attn/c_attn/w", f"1 {QKV_WEIGHT}", part=1),
        Row("attn.W_V", "attn/c_attn/w", f"1 {QKV_WEIGHT}", part=2),
        Row("attn.b_Q", "attn/c_attn/b", QKV_BIAS, part=0),
        Row("attn.b_K", "attn/c_attn/b", QKV_BIAS, part=1),
        Row("attn.b_V", "attn/c_attn/b", QKV_BIAS, part=2),
        Row("attn.W_O", "attn/c_proj/w", "1 (head d_head) d_model -> head d_head d_model"),
        Row("attn.b_O", "attn/c_proj/b"),
        Row("ln2.w", "ln_2/g"),
        Row("ln2.b", "ln_2/b"),
        Row("mlp.W_in", "mlp/c_fc/w", "1 d_model d_mlp -> d_model d_mlp"),
        Row("mlp.b_in", "mlp/c_fc/b"),
        Row("mlp.W_out", "mlp/c_proj/w", "1 d_mlp d_model -> d_mlp d_model"),
        Row("mlp.b_out", "mlp/c_proj/b"),
    ),
    block_prefix="model/h{layer}/",
)


CHECKPOINT = b"""\
model_checkpoint_path: "model.ckpt"
all_model_checkpoint_paths: "model.ckpt"
"""


# What hparams.json says, by our names. The rest is as in `Config`'s defaults, with d_mlp 4 d_model.
HPARAMS = {
    "n_vocab": "d_vocab",
    "n_ctx": "n_ctx",
    "n_embd": "d_model",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


def config_from_hparams(hparams: Mapping[str, Any]) -> Config:
    """The architecture that a hparams.json describes. Raises `WeightsError` if it is none."""
    if hparams.keys() != HPARAMS.keys():
        raise WeightsError(f"hparams.json says {[*hparams]}; it must say {[*HPARAMS]}")
    if wrong := {field: n for field, n in hparams.items() if type(n) is not int or n < 1}:
        raise WeightsError(f"hparams.json says {wrong}; these must be positive integers")
    d_model, n_heads = hparams["n_embd"], hparams["n_head"]
    if d_model % n_heads:
        raise WeightsError(f"hparams.json: n_embd {d_model} is not a multiple of {n_heads} heads")
    sizes = {ours: hparams[theirs] for theirs, ours in HPARAMS.items()}
    return Config(**sizes, d_head=d_model // n_heads, d_mlp=4 * d_model)


def config_to_hparams(cfg: Config) -> dict[str, int]:
    """The fields of a hparams.json. Raises `WeightsError` for what they cannot say."""
    given = cfg.to_dict()
    hparams = {theirs: given[ours] for theirs, ours in HPARAMS.items()}
    said = config_from_hparams(hparams).to_dict()
    if unsaid := {field: value for field, value in given.items() if value != said[field]}:
        meant = {field: said[field] for field in unsaid}
        raise WeightsError(
            f"OpenAI's hparams.json has no place for {unsaid}, and means {meant}; "
            "write Hugging Face's format instead"
        )
    return hparams


def read_openai(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and the weights under OpenAI's names, memory-mapped.

    Reads the bundle that `checkpoint` names, which is model.ckpt as OpenAI published it. Raises
    `WeightsError` for a damaged file, naming the tensor where it is in one, and
    `FileNotFoundError` for a missing file.
    """
    cfg = config_from_hparams(read_json(folder / "hparams.json"))
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{folder} has no 'checkpoint', which names the weights; copy it")
    # Where a folder was moved, the path before the name is still that of the machine it was on.
    named = re.match(
        r'model_checkpoint_path: "(?:.*[/\\])?([^"/\\]+)"',
        checkpoint.read_text(encoding="utf-8", errors="replace"),
    )
    if not named:
        raise WeightsError(f"{checkpoint} does not name the weights; copy or download it again")
    return cfg, read_bundle(folder / named[1])


def write_openai(folder: Path, cfg: Config, state: State) -> None:
    """Write our parameters as OpenAI published theirs, each file appearing whole or not at all.

    Raises `WeightsError` for what the format has no place for, before writing.
    """
    tensors, hparams = OPENAI.write(cfg, state), config_to_hparams(cfg)
    with atomic_folder(folder) as unfinished:
        write_bundle(unfinished / "model.ckpt", tensors)
        (unfinished / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n", "utf-8")
        (unfinished / "checkpoint").write_bytes(CHECKPOINT)
