"""`DemoTransformer`: GPT-2 from tokens to logits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint
from clean_transformer.inference.optimized import Optimized, optimize
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.support.devices import resolve_device
from clean_transformer.text.generation import GenerationMixin
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.load import read_pretrained, read_state_dict
from clean_transformer.weights.table import WeightsError


class DemoTransformer(GenerationMixin):
    """GPT-2: tokens → embed → blocks → unembed → logits (Radford et al. 2019)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        self.pos_embed = PosEmbed(cfg)
        self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = NORMALIZATIONS[cfg.normalization_type](cfg)
        self.unembed = TiedUnembed(cfg, self.embed) if cfg.tied_unembed else Unembed(cfg)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        kv_cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch logit_pos d_vocab"]:
        """The logits after each position, or with `last_only` after the last position only.

        With `kv_cache`, the tokens follow those in the cache, and are added to it. Before any work,
        raises what `check_tokens` raises, and `ValueError` if the cache has no room.
        """
        self.check_tokens(tokens)
        if kv_cache is None:
            return self.read(tokens, None, last_only)
        kv_cache.require_room(tokens.shape[1])
        is_step = isinstance(kv_cache, StaticKVCache) and tokens.shape[1] == 1
        logits = (self.read_one if is_step else self.read)(tokens, kv_cache, last_only)
        kv_cache.advance(tokens.shape[1])
        return logits

    def read(
        self, tokens: Int[Tensor, "batch pos"], kv_cache: KVCache | None, last_only: bool
    ) -> Float[Tensor, "batch logit_pos d_vocab"]:
        """The forward pass, without the checks of `forward` and without advancing the cache."""
        positions = kv_cache.positions(tokens) if kv_cache is not None else None
        layers = kv_cache.layers if kv_cache is not None else [None] * len(self.blocks)
        embed = self.hook_embed(self.embed(tokens))
        pos_embed = self.hook_pos_embed(self.pos_embed(tokens, positions=positions))
        residual = embed + pos_embed
        for block, layer in zip(self.blocks, layers, strict=True):
            residual = block(residual, kv_cache=layer)
        if last_only:
            residual = residual[:, -1:]
        return self.unembed(self.ln_final(residual))

    # `read` of one token with a `StaticKVCache`. `optimize` can replace it with a compiled graph.
    read_one = read

    def optimize(
        self, weights: Literal["int8"] | None = None, *, compile: bool = False
    ) -> Optimized:
        """Make the model faster for inference, until `undo()`; see `inference.optimize`."""
        return optimize(self, weights, compile=compile)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise an error for tokens that have no embedding.

        `TypeError` if the tokens are not integers; `ValueError` if they have the wrong shape, if
        there are none or more than n_ctx, or if an id is outside the vocabulary. Without this
        check, an accelerator would crash or return arbitrary numbers.
        """
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}; they must be int64 or int32 token ids")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens have shape {[*tokens.shape]}; they must be [batch pos], with at least one "
                "token"
            )
        if tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the n_ctx={self.cfg.n_ctx} positions that "
                "the model has; shorten or split the text"
            )
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ValueError(
                f"token ids run from {lowest} to {highest}; "
                f"this vocabulary has ids 0 to {self.cfg.d_vocab - 1}"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> "DemoTransformer":
        """GPT-2 from a hub id ("openai-community/gpt2"), an alias ("gpt2"), a folder, or a file.

        "demo" is the tiny model that comes with the package. A folder holds config.json and
        model.safetensors (whole or in shards) or pytorch_model.bin; or it is one of OpenAI's
        ("124M"), with hparams.json and a TensorFlow checkpoint. A file is llama.cpp's (.gguf, not
        quantized) or one that `torch.save` wrote (.pt): nanoGPT's checkpoint, or a state dict as
        for `from_state_dict`. Raises `WeightsError` for a damaged file, and for weights that do not
        fit the architecture exactly; the error names every missing, unused and misshapen key.
        """
        cfg, state = read_pretrained(source, resolve_device(device), dtype)
        with torch.device("meta"):  # drawing weights here would be wasted time
            model = cls(cfg)
        model.load_state_dict(state, assign=True)
        model.source = source
        return model

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], cfg: Config | None = None
    ) -> "DemoTransformer":
        """GPT-2 with a copy of the weights, in their dtype and on their device.

        The state dict is that of a `HookedTransformer`, `TransformerBridge`, `GPT2LMHeadModel`,
        nanoGPT, minGPT or `DemoTransformer`. Without `cfg`, the architecture follows from the
        shapes. Raises `WeightsError` as `from_pretrained` does, and if the shapes do not tell the
        number of heads.
        """
        cfg, state = read_state_dict(state, cfg)
        weight = state["embed.W_E"]
        with torch.device("meta"):
            model = cls(cfg)
        model = model.to(weight.dtype).to_empty(device=weight.device)
        model.load_state_dict(state)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in Hugging Face's format, all or nothing.

        Raises `WeightsError` before it writes, if the format cannot hold the model. It cannot hold
        a model with swapped-in modules, because config.json does not name them.
        """
        with torch.device("meta"):
            written = dict(DemoTransformer(self.cfg).named_modules())
        other = [
            f"{name} is {type(module).__name__}"
            for name, module in self.named_modules()
            if name and type(module) is not type(written.get(name))
        ]
        if other:
            raise WeightsError(
                f"{', '.join(other[:3])}{', …' * bool(other[3:])}, which config.json cannot say; "
                "save the weights with torch.save(model.state_dict(), file), load them with "
                "load_state_dict, and swap again"
            )
        write_folder(Path(folder), self.cfg, self.state_dict())
