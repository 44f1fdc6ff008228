"""Reads the checkpoints of nanoGPT and minGPT.

The tensors have Hugging Face's names, but the weight of every linear layer is [out, in], as in
`nn.Linear`.

GPT-2 uses the tanh approximation of GELU, called `gelu_new`. minGPT has computed `gelu_new` since
2022. nanoGPT computed `gelu_new` until June 2023, when its pull request 274 replaced
`gelu_new` by the exact GELU. The two functions differ by up to 5e-4. A loaded model always computes
`gelu_new`, because a checkpoint does not say which function the model was trained with. If the
model was trained with the exact GELU, replace the `mlp` of each block by `variants.ExactGeluMLP`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clean_transformer.config import Config
from clean_transformer.weights.files import read_tensors, state_dict_in
from clean_transformer.weights.formats.huggingface import (
    HUGGINGFACE,
    has_linear_layout,
)
from clean_transformer.weights.refusals import WeightsError, head_width
from clean_transformer.weights.rows import Row
from clean_transformer.weights.table import File, State

# The einops patterns for the weights of the linear layers, which are [out, in] (see `Row.pattern`).
LINEAR = {
    "attn.c_attn.weight": "(qkv head d_head) d_model -> qkv head d_model d_head",
    "attn.c_proj.weight": "d_model (head d_head) -> head d_head d_model",
    "mlp.c_fc.weight": "d_mlp d_model -> d_model d_mlp",
    "mlp.c_proj.weight": "d_model d_mlp -> d_mlp d_model",
}


def _has_biases(state: State) -> bool:
    return "transformer.h.0.attn.c_attn.bias" in state


def read_checkpoint(file: Path) -> tuple[Config | None, State]:
    """Return the architecture (or None) and the tensors in a file that `torch.save` wrote.

    nanoGPT saves {"model": …, "model_args": …}, where `model_args` describes the architecture. For
    a nanoGPT file, this function warns that the model may have been trained with the exact GELU.
    The returned architecture is None for other files: minGPT saves only a state dict, and some
    training scripts save {"state_dict": …}. Raises `WeightsError` for a damaged file, and for a
    file without a state dict.
    """
    saved = read_tensors(file)
    state = state_dict_in(file, saved)
    if "model_args" not in saved:
        return None, state
    warnings.warn(
        "nanoGPT has computed the exact GELU since June 2023; this model computes GPT-2's tanh "
        "form, which differs by up to 5e-4. If the checkpoint was trained since then, replace the "
        "mlp of each block: swap(model, 'blocks.*.mlp', variants.ExactGeluMLP).",
        stacklevel=5,  # the warning shows the line that calls from_pretrained
    )
    return _config(file, saved["model_args"]), state


def _config(file: Path, args: Mapping[str, Any]) -> Config:
    if not isinstance(args, Mapping):
        raise WeightsError(f"{file}: model_args is a {type(args).__name__}, not a dictionary")
    try:
        d_model, n_heads = args["n_embd"], args["n_head"]
        return Config(
            n_layers=args["n_layer"],
            n_heads=n_heads,
            d_model=d_model,
            d_head=head_width(str(file), d_model, n_heads),
            d_mlp=4 * d_model,
            d_vocab=args["vocab_size"],
            n_ctx=args["block_size"],
        )
    except KeyError as missing:
        raise WeightsError(f"{file}: model_args has no {missing}") from None


NANOGPT = replace(
    HUGGINGFACE,
    name="nanoGPT or minGPT",
    block=tuple(
        replace(row, pattern=LINEAR.get(str(row.theirs), row.pattern)) for row in HUGGINGFACE.block
    ),
    layout=lambda state: has_linear_layout(state) and _has_biases(state),
    folder=None,
    file=File(suffixes=(".pt", ".pth", ".ckpt"), read=read_checkpoint),
)


def _without_biases(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(
        replace(row, theirs=None) if str(row.theirs).endswith(".bias") else row for row in rows
    )


# nanoGPT's training script makes models without biases by default (bias=False). The biases that we
# read from their checkpoints are zeros.
NANOGPT_WITHOUT_BIASES = replace(
    NANOGPT,
    name="nanoGPT without biases",
    outer=_without_biases(NANOGPT.outer),
    block=_without_biases(NANOGPT.block),
    layout=lambda state: has_linear_layout(state) and not _has_biases(state),
    file=None,
)
