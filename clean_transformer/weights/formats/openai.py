"""Reads GPT-2 in OpenAI's own format, TensorFlow checkpoints, without using TensorFlow."""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from clean_transformer.config import Config
from clean_transformer.weights.files import read_json
from clean_transformer.weights.formats.huggingface import QKV_BIAS, QKV_WEIGHT
from clean_transformer.weights.formats.tensorflow import read_bundle
from clean_transformer.weights.refusals import AGAIN, WeightsError, head_width
from clean_transformer.weights.rows import Row
from clean_transformer.weights.table import Folder, Format, State

# In OpenAI's code, each linear layer is a convolution of width 1, so its weight is [1, in, out].
# There is no row for `unembed.W_U`, because the unembedding is always tied to the embedding.
OUTER = (
    Row("embed.W_E", "model/wte"),
    Row("pos_embed.W_pos", "model/wpe"),
    Row("ln_final.w", "model/ln_f/g"),
    Row("ln_final.b", "model/ln_f/b"),
    Row("unembed.b_U", None),
)


BLOCK = (
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
)


# Maps each field of hparams.json to the field of `Config` with the same meaning.
HPARAMS = {
    "n_vocab": "d_vocab",
    "n_ctx": "n_ctx",
    "n_embd": "d_model",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}


def config_from_hparams(hparams: Mapping[str, Any]) -> Config:
    """Return the architecture that the fields of hparams.json describe.

    d_mlp is 4 × d_model, and d_head is d_model / n_heads. All other fields of `Config` that are not
    in hparams.json, such as eps, have their defaults. Raises `WeightsError` for missing or unknown
    fields, and for values that are not positive integers.
    """
    if hparams.keys() != HPARAMS.keys():
        given = shorten([*hparams])
        raise WeightsError(f"hparams.json has the fields {given}; expected {[*HPARAMS]}")
    if wrong := {field: n for field, n in hparams.items() if type(n) is not int or n < 1}:
        raise WeightsError(f"hparams.json says {shorten(wrong)}; these must be positive integers")
    sizes = {ours: hparams[theirs] for theirs, ours in HPARAMS.items()}
    d_head = head_width("hparams.json", sizes["d_model"], sizes["n_heads"])
    return Config(**sizes, d_head=d_head, d_mlp=4 * sizes["d_model"])


def read_openai(folder: Path) -> tuple[Config, State]:
    """Return the architecture, and the memory-mapped tensors under OpenAI's names.

    The text file `checkpoint` in the folder contains the name of the TensorFlow checkpoint to read,
    which is model.ckpt in OpenAI's releases. Raises `FileNotFoundError` for a missing file and
    `WeightsError` for a damaged file. If the data of a tensor is damaged, the error message names
    the tensor.
    """
    cfg = config_from_hparams(read_json(folder / "hparams.json"))
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{folder} has no file 'checkpoint', which names the weights")
    # The file may contain the full path of the checkpoint on the machine that saved the model. We
    # use only the last component of this path.
    named = re.match(
        r'model_checkpoint_path: "(?:.*[/\\])?([^"/\\]+)"',
        checkpoint.read_text(encoding="utf-8", errors="replace"),
    )
    if not named or not named[1].isprintable():
        raise WeightsError(f"{checkpoint} does not name the weights; {AGAIN}")
    return cfg, read_bundle(folder / named[1])


OPENAI = Format(
    name="OpenAI GPT-2",
    marker="model/wte",
    outer=OUTER,
    block=BLOCK,
    block_prefix="model/h{layer}/",
    folder=Folder(
        file_sets=(
            ("hparams.json", "checkpoint", "model.ckpt.index", "model.ckpt.data-?????-of-?????"),
        ),
        read=read_openai,
        priority=0,
    ),
)
