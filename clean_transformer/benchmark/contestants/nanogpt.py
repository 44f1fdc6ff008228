"""A compact GPT-2 of `nn.Linear` modules, for measuring a training step and the export to ONNX.

The model has the structure of Karpathy's nanoGPT: one linear layer that computes queries, keys and
values, the fused attention kernel, one matrix for embedding and unembedding, and no hooks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config

# The keys and values of earlier positions. Index 0 on the axis `two` has the keys, and index 1 has
# the values. The axis `past` has one entry for each earlier position.
Past = Float[Tensor, "layer two batch head past d_head"]

# The keys and the values of one block.
Present = tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos d_head"]]


class Block(nn.Module):
    """A transformer block: x = x + attention(norm(x)), then x = x + mlp(norm(x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.ln_1 = nn.LayerNorm(cfg.d_model, cfg.eps)
        self.c_attn = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.c_proj = nn.Linear(cfg.d_model, cfg.d_model)
        self.ln_2 = nn.LayerNorm(cfg.d_model, cfg.eps)
        self.c_fc = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.c_out = nn.Linear(cfg.d_mlp, cfg.d_model)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Present]:
        """Return the residual stream after the block, and the keys and values of all positions.

        `x` [batch pos d_model] is the residual stream before the block. `past` [two batch head past
        d_head] has the block's keys and values of earlier positions. With `past`, `x` must have
        only one position.
        """
        batch, n_pos, d_model = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(batch, n_pos, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.c_proj(z.transpose(1, 2).reshape(batch, n_pos, d_model))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return x, (k, v)


class NanoGPT(nn.Module):
    """GPT-2 in as few lines as possible. `wte` is also the unembedding matrix."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.wte = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.wpe = nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(cfg.d_model, cfg.eps)

    def read(
        self, tokens: Int[Tensor, "batch pos"], past: Past | None = None
    ) -> tuple[Float[Tensor, "batch pos d_model"], list[Present]]:
        """Return the output of the final LayerNorm, and the keys and values of each block.

        `past` has the keys and values of the positions before `tokens`. The output is for the
        positions of `tokens`; the returned keys and values are of all positions.
        """
        start = 0 if past is None else past.shape[4]
        positions = torch.arange(tokens.shape[1], device=tokens.device) + start
        x = self.wte(tokens) + self.wpe(positions)
        presents = []
        for layer, block in enumerate(self.h):
            x, present = block(x, None if past is None else past[layer])
            presents.append(present)
        return self.ln_f(x), presents

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits for every position."""
        return F.linear(self.read(tokens)[0], self.wte.weight)

    @classmethod
    def from_huggingface(cls, cfg: Config, state: dict[str, Tensor]) -> "NanoGPT":
        """Return a model with the weights of a state dict of Hugging Face's GPT-2.

        The matrices of the linear layers are [in out] in `state`, and [out in] in the result.
        """
        names = {
            "attn.c_attn": "c_attn",
            "attn.c_proj": "c_proj",
            "mlp.c_fc": "c_fc",
            "mlp.c_proj": "c_out",
        }
        renamed = {}
        for key, tensor in state.items():
            key = key.removeprefix("transformer.")
            for theirs, ours in names.items():
                if theirs in key:
                    key = key.replace(theirs, ours)
                    tensor = tensor.T if tensor.ndim == 2 else tensor
            renamed[key] = tensor
        renamed.pop("lm_head.weight", None)
        with torch.device("meta"):
            model = cls(cfg)
        model.load_state_dict({key: t.contiguous() for key, t in renamed.items()}, assign=True)
        return model
