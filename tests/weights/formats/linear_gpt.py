"""A GPT-2 made of `nn.Linear`, with the module names that nanoGPT and minGPT share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.config import Config


class LinearGPT(nn.Module):
    """An independent implementation, written only from the names of the parameters.

    nanoGPT ties its unembedding and may have no biases. minGPT has a separate unembedding, and its
    masks are buffers.
    """

    def __init__(self, cfg: Config, *, bias: bool = True, masks: bool = False, gelu: str = "tanh"):
        super().__init__()
        self.n_heads, self.gelu, d = cfg.n_heads, gelu, cfg.d_model

        def block() -> nn.ModuleDict:
            attn = {"c_attn": nn.Linear(d, 3 * d, bias), "c_proj": nn.Linear(d, d, bias)}
            mlp = {"c_fc": nn.Linear(d, cfg.d_mlp, bias), "c_proj": nn.Linear(cfg.d_mlp, d, bias)}
            return nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(d, bias=bias),
                    "attn": nn.ModuleDict(attn),
                    "ln_2": nn.LayerNorm(d, bias=bias),
                    "mlp": nn.ModuleDict(mlp),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(cfg.d_vocab, d),
                "wpe": nn.Embedding(cfg.n_ctx, d),
                "h": nn.ModuleList(block() for _ in range(cfg.n_layers)),
                "ln_f": nn.LayerNorm(d, bias=bias),
            }
        )
        self.lm_head = nn.Linear(d, cfg.d_vocab, bias=False)
        if cfg.tied_unembed:
            self.transformer.wte.weight = self.lm_head.weight
        for layer in self.transformer.h:
            if masks:
                mask = torch.ones(cfg.n_ctx, cfg.n_ctx).tril()[None, None]
                layer.attn.register_buffer("bias", mask)

    def forward(self, tokens: Tensor) -> Tensor:
        names, length = self.transformer, tokens.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = names.wte(tokens) + names.wpe.weight[:length]
        for block in names.h:
            q, k, v = (
                part.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(x)).chunk(3, dim=2)
            )
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
            z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.c_proj(z)
            post = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=self.gelu)
            x = x + block.mlp.c_proj(post)
        return self.lm_head(names.ln_f(x))
