"""`DemoTransformer`: GPT-2 from tokens to logits."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookPoint, name_hook_points, observed
from clean_transformer.inference.optimized import Optimized, optimize
from clean_transformer.kv_cache import KVCache, LeftPadding, StaticKVCache
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.text.generation import GenerationMixin
from clean_transformer.text.pretrained import PretrainedMixin
from clean_transformer.text.token_ids import are_known

Output = Float[Tensor, "batch logit_pos d_vocab"] | Float[Tensor, "batch logit_pos d_model"]


class DemoTransformer(GenerationMixin, PretrainedMixin):
    """GPT-2 (Radford et al. 2019): embed + pos_embed → blocks → ln_final → unembed → logits."""

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        self.pos_embed = PosEmbed(cfg)
        self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = NORMALIZATIONS[cfg.normalization_type](cfg)
        self.unembed = TiedUnembed(cfg, self.embed) if cfg.tied_unembed else Unembed(cfg)
        name_hook_points(self)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        kv_cache: KVCache | None = None,
        *,
        last_only: bool = False,
        stop_at_layer: int | None = None,
        unembed: bool = True,
    ) -> Output:
        """Return the logits of all positions, or of only the last position if `last_only` is True.

        With `stop_at_layer`, the index of a block, run only the earlier blocks, and return the
        residual stream instead of the logits; -1 means the last block. If `unembed` is False,
        return the output of ln_final instead. `LanguageModel.__call__` describes more arguments.

        If `kv_cache` is given, `tokens` are the tokens that follow the text in the cache. The model
        stores the keys and values of `tokens` in the cache.

        Before the model computes anything, it raises the errors of `check_tokens`, and `ValueError`
        for a cache that does not fit (see `KVCache.require_fit`), or for `stop_at_layer` with
        `kv_cache`.
        """
        self.check_tokens(tokens)
        if kv_cache is None:
            return self.read(tokens, None, last_only, stop_at_layer, unembed)
        if stop_at_layer is not None and not isinstance(kv_cache, LeftPadding):
            raise ValueError("stop_at_layer leaves layers of the kv_cache empty; use one of them")
        kv_cache.require_fit(tokens, len(self.blocks), self.cfg.n_ctx)
        if isinstance(kv_cache, StaticKVCache) and tokens.shape[1] == 1 and unembed:
            output = self.read_one(tokens, kv_cache, last_only)
        else:
            output = self.read(tokens, kv_cache, last_only, stop_at_layer, unembed)
        kv_cache.advance(tokens.shape[1])
        return output

    def read(
        self,
        tokens: Int[Tensor, "batch pos"],
        kv_cache: KVCache | None,
        last_only: bool,
        stop_at_layer: int | None = None,
        unembed: bool = True,
    ) -> Output:
        """Return the logits or the residual stream, as `forward` does, without checking arguments.

        The keys and values of `tokens` are stored in `kv_cache`, but `kv_cache.length` does not
        change.
        """
        positions = kv_cache.positions(tokens) if kv_cache is not None else None
        layers = kv_cache.layers if kv_cache is not None else [None] * len(self.blocks)
        embed = self.hook_embed(self.embed(tokens))
        pos_embed = self.hook_pos_embed(self.pos_embed(tokens, positions=positions))
        residual = embed + pos_embed
        for block, layer in list(zip(self.blocks, layers, strict=True))[:stop_at_layer]:
            residual = block(residual, kv_cache=layer)
        if last_only and not observed(*self.ln_final.modules(), *self.unembed.modules()):
            residual = residual[:, -1:]  # a hook gets all positions
        output = residual
        if stop_at_layer is None:
            normalized = self.ln_final(residual)
            output = self.unembed(normalized) if unembed else normalized
        return output[:, -1:] if last_only else output

    # For one new position and a `StaticKVCache`, `forward` calls `read_one` instead of `read`.
    # `optimize` can replace `read_one` with a compiled graph.
    read_one = read

    def optimize(
        self, weights: Literal["int8"] | None = None, *, compile: bool = False
    ) -> Optimized:
        """Make inference with this model faster, until you call `undo()` of the returned object.

        See `clean_transformer.inference.optimized.optimize` for the arguments.
        """
        return optimize(self, weights, compile=compile)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise an error for tokens that the model cannot read.

        Raises `TypeError` if the tokens are no tensor of int64 or int32. Raises `ValueError` if
        their shape is not [batch pos], if there are no tokens, if there are more than n_ctx
        positions, or if an id is outside the vocabulary. `torch.export` records a graph without the
        check of the ids.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens are a {type(tokens).__name__}; call the model: model(tokens)")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}; they must be int64 or int32 token ids")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens have shape {[*tokens.shape]}; they must be [batch pos], and not empty"
            )
        if tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the n_ctx={self.cfg.n_ctx} positions that "
                "the model has; shorten or split the text"
            )
        if not are_known(tokens):
            return
        # For an id outside the vocabulary, an accelerator could crash or return arbitrary numbers.
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ValueError(
                f"token ids run from {lowest} to {highest}; "
                f"this vocabulary has ids 0 to {self.cfg.d_vocab - 1}"
            )


# A subclass may have modules of other classes, which config.json does not name.
DemoTransformer.saved_class = DemoTransformer
