"""TransformerLens's `HookedTransformer` up to 3.x, whose names and shapes are our own."""

from clean_transformer.weights.shapes import BLOCK, EMBEDDING, UNEMBEDDING
from clean_transformer.weights.table import Format, Row

HOOKED_TRANSFORMER = Format(
    name="HookedTransformer",
    marker="embed.W_E",
    outer=tuple(Row(name, name) for name in EMBEDDING | UNEMBEDDING),
    block=tuple(Row(name, name) for name in BLOCK),
    block_prefix="blocks.{layer}.",
    buffers=r"blocks\.\d+\.attn\.(mask|IGNORE)",
)
