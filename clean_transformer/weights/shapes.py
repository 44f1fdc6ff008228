"""Lists the name, the axes and the shape of every parameter in a state dict of this package."""

from clean_transformer.config import Config

EMBEDDING = {
    "embed.W_E": "d_vocab d_model",
    "pos_embed.W_pos": "n_ctx d_model",
}


BLOCK = {
    "ln1.w": "d_model",
    "ln1.b": "d_model",
    "attn.W_Q": "head d_model d_head",
    "attn.W_K": "head d_model d_head",
    "attn.W_V": "head d_model d_head",
    "attn.W_O": "head d_head d_model",
    "attn.b_Q": "head d_head",
    "attn.b_K": "head d_head",
    "attn.b_V": "head d_head",
    "attn.b_O": "d_model",
    "ln2.w": "d_model",
    "ln2.b": "d_model",
    "mlp.W_in": "d_model d_mlp",
    "mlp.b_in": "d_mlp",
    "mlp.W_out": "d_mlp d_model",
    "mlp.b_out": "d_model",
}


# READERS maps each LayerNorm of a block to the weights by which the LayerNorm's output is
# multiplied. WRITERS lists the parameters of a block that write to the residual stream: the output
# weights and the output biases.
READERS = {"ln1": ("attn.W_Q", "attn.W_K", "attn.W_V"), "ln2": ("mlp.W_in",)}
WRITERS = ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")


UNEMBEDDING = {
    "ln_final.w": "d_model",
    "ln_final.b": "d_model",
    "unembed.W_U": "d_model d_vocab",
    "unembed.b_U": "d_vocab",
}


def parameter_axes(cfg: Config) -> dict[str, str]:
    """Return a dictionary from the name of every parameter to its axes, such as "d_vocab d_model".

    The parameters are in the order embedding, blocks, unembedding. A tied model has no
    `unembed.W_U`, and a model with `normalization_type="LNPre"` has no LayerNorm parameters.
    `Config.axes` gives the length of each axis.
    """
    blocks = {
        f"blocks.{layer}.{name}": axes
        for layer in range(cfg.n_layers)
        for name, axes in BLOCK.items()
    }
    return {
        name: axes
        for name, axes in (EMBEDDING | blocks | UNEMBEDDING).items()
        if not (cfg.tied_unembed and name == "unembed.W_U")
        and not (cfg.normalization_type == "LNPre" and ".ln" in f".{name}")
    }


def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of `parameter_axes`."""
    lengths = cfg.axes()
    return {
        name: tuple(lengths[axis] for axis in axes.split())
        for name, axes in parameter_axes(cfg).items()
    }
