"""nanoGPT and minGPT: Hugging Face's names, but every matrix as nn.Linear keeps it, [out, in].

minGPT (since 2022) computes our gelu_new. So did nanoGPT until June 2023, when pull request 274
replaced it by the exact GELU, which differs by up to 5e-4: the weights of such a model are read as
they are, but give its very function only with `variants.ExactGeluMLP` for each block's `mlp`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, read_tensors
from clean_transformer.weights.table import Row, State, WeightsError, head_width

LINEAR = {
    "attn.c_attn.weight": "(qkv head d_head) d_model -> qkv head d_model d_head",
    "attn.c_proj.weight": "d_model (head d_head) -> head d_head d_model",
    "mlp.c_fc.weight": "d_mlp d_model -> d_model d_mlp",
    "mlp.c_proj.weight": "d_model d_mlp -> d_mlp d_model",
}


QKV = "transformer.h.0.attn.c_attn"


def _is_linear(state: State) -> bool:
    """Queries, keys and values side by side are never square, so that they tell the layout."""
    weight = state.get(f"{QKV}.weight")
    return weight is not None and weight.ndim == 2 and weight.shape[0] > weight.shape[1]


NANOGPT = replace(
    HUGGINGFACE,
    name="nanoGPT or minGPT",
    block=tuple(
        replace(row, pattern=LINEAR.get(str(row.theirs), row.pattern)) for row in HUGGINGFACE.block
    ),
    layout=lambda state: _is_linear(state) and f"{QKV}.bias" in state,
)


def _without_biases(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(
        replace(row, theirs=None) if str(row.theirs).endswith(".bias") else row for row in rows
    )


# What nanoGPT trains with bias=False, its default: no bias anywhere, which is a bias of zero.
NANOGPT_WITHOUT_BIASES = replace(
    NANOGPT,
    name="nanoGPT without biases",
    outer=_without_biases(NANOGPT.outer),
    block=_without_biases(NANOGPT.block),
    layout=lambda state: _is_linear(state) and f"{QKV}.bias" not in state,
)


def read_checkpoint(file: Path) -> tuple[Config | None, dict[str, Tensor]]:
    """The weights in a file that `torch.save` wrote, and the architecture if it tells that.

    nanoGPT's {"model": …, "model_args": …} does. A bare state dict, such as minGPT's, does not: its
    shapes have to. Warns of the GELU of a nanoGPT. Raises `WeightsError` for another content.
    """
    saved = read_tensors(file)
    state = saved["model"] if "model_args" in saved else saved
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(
            f"{file} is no state dict: {others[:3]} are not tensors; "
            "load it with torch.load, and pass its state dict to from_state_dict"
        )
    if "model_args" not in saved:
        return None, dict(state)
    warnings.warn(
        "nanoGPT has computed the exact GELU since June 2023; this model computes GPT-2's tanh "
        "form, which differs by up to 5e-4. For a checkpoint trained since then, replace each "
        "block's mlp: swap(model, 'blocks.*.mlp', variants.ExactGeluMLP).",
        stacklevel=5,  # at the line that calls from_pretrained
    )
    return _config(file, saved["model_args"]), dict(state)


def _config(file: Path, args: Mapping[str, Any]) -> Config:
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
        raise WeightsError(f"the model_args of {file} have no {missing}") from None
