"""Reads the state dicts of TransformerLens's `HookedTransformer` and `TransformerBridge`.

`HookedTransformer`, the model class up to TransformerLens 3, has the same parameter names and
shapes as this package. In `TransformerBridge`, the weights that compute queries, keys and values
are [out, in], as in `nn.Linear`. The other weight matrices of a block are [in, out], as in Hugging
Face's `Conv1D`.
"""

from clean_transformer.weights.rows import Row
from clean_transformer.weights.shapes import BLOCK, EMBEDDING, UNEMBEDDING
from clean_transformer.weights.table import Format

HOOKED_TRANSFORMER = Format(
    name="HookedTransformer",
    marker="embed.W_E",
    outer=tuple(Row(name, name) for name in EMBEDDING | UNEMBEDDING),
    block=tuple(Row(name, name) for name in BLOCK),
    block_prefix="blocks.{layer}.",
    buffers=r"blocks\.\d+\.attn\.(mask|IGNORE)",
)


LINEAR = "(head d_head) d_model -> head d_model d_head"


BIAS = "(head d_head) -> head d_head"


TRANSFORMER_BRIDGE = Format(
    name="TransformerBridge",
    marker="embed.weight",
    outer=(
        Row("embed.W_E", "embed.weight"),
        Row("pos_embed.W_pos", "pos_embed.weight"),
        Row("ln_final.w", "ln_final.weight"),
        Row("ln_final.b", "ln_final.bias"),
        Row("unembed.W_U", "unembed.weight", "d_vocab d_model -> d_model d_vocab"),
        Row("unembed.b_U", "unembed.bias"),
    ),
    block=(
        Row("ln1.w", "ln1.weight"),
        Row("ln1.b", "ln1.bias"),
        Row("attn.W_Q", "attn.q.weight", LINEAR),
        Row("attn.W_K", "attn.k.weight", LINEAR),
        Row("attn.W_V", "attn.v.weight", LINEAR),
        Row("attn.b_Q", "attn.q.bias", BIAS),
        Row("attn.b_K", "attn.k.bias", BIAS),
        Row("attn.b_V", "attn.v.bias", BIAS),
        Row("attn.W_O", "attn.o.weight", "(head d_head) d_model -> head d_head d_model"),
        Row("attn.b_O", "attn.o.bias"),
        Row("ln2.w", "ln2.weight"),
        Row("ln2.b", "ln2.bias"),
        Row("mlp.W_in", "mlp.in.weight"),
        Row("mlp.b_in", "mlp.in.bias"),
        Row("mlp.W_out", "mlp.out.weight"),
        Row("mlp.b_out", "mlp.out.bias"),
    ),
    block_prefix="blocks.{layer}.",
)
