"""Unembedding: from the residual stream to logits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule, HookPoint
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.linear import affine, normal


class Unembed(HookedModule):
    """x W_U + b_U, with W_U [d_model d_vocab] and b_U [d_vocab]. Published models have b_U = 0."""

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.W_U = normal(cfg.d_model, cfg.d_vocab, std=cfg.initializer_range)
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(
        self, normalized_resid_post: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits. Their softmax is the probability distribution of the next token."""
        return self.hook_out(affine(self.hook_in(normalized_resid_post), self.W_U, self.b_U))


class TiedUnembed(HookedModule):
    """An `Unembed` that shares its weights with an embedding: W_U is always W_E transposed."""

    def __init__(self, cfg: Config, embed: Embed):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        # PyTorch does not register modules inside a tuple as submodules. So the state dict contains
        # W_E only once.
        self._embed = (embed,)
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    @property
    def embed(self) -> Embed:
        """The embedding whose weights are used."""
        return self._embed[0]

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The embedding's W_E, transposed. The result is a view, not a copy."""
        return self.embed.W_E.T

    forward = Unembed.forward
