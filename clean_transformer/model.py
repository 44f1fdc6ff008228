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
from clean_transformer.modules.contract import call_with_cache, embed_positions
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
        """Logits of the token that follows each position, or `last_only` the last one.

        With `kv_cache`, the tokens are those after the ones that were read into it, and are added
        to it. Raises `TypeError` or `ValueError` for tokens that GPT-2 cannot read, before any
        work.
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
        """`forward` without the checks, and without counting the tokens as read."""
        positions = None if kv_cache is None else kv_cache.positions(tokens)
        layers = [None] * len(self.blocks) if kv_cache is None else kv_cache.layers
        embed = self.hook_embed(self.embed(tokens))
        pos_embed = self.hook_pos_embed(embed_positions(self.pos_embed, tokens, positions))
        residual = embed + pos_embed
        for block, layer in zip(self.blocks, layers, strict=True):
            residual = call_with_cache(block, (residual,), layer)
        if last_only:
            residual = residual[:, -1:]
        return self.unembed(self.ln_final(residual))

    # Of one more token, with a `StaticKVCache`; `optimize` puts a compiled one in its place.
    read_one = read

    def optimize(
        self, weights: Literal["int8"] | None = None, *, compile: bool = False
    ) -> Optimized:
        """Make the model faster for inference, until `undo()`; see `inference.optimize`."""
        return optimize(self, weights, compile=compile)

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse what the embeddings cannot look up: an accelerator would crash or make it up.

        Raises `TypeError` for tokens that are not integers, `ValueError` for a wrong shape, none
        at all, more than n_ctx, or ids outside the vocabulary.
        """
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}; they must be int64 or int32 token ids")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens have shape {[*tokens.shape]}; they must be [batch pos], with one or more"
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
        """GPT-2 from a hub id ("openai-community/gpt2"), its alias ("gpt2"), a folder, or a file.

        A folder has config.json and model.safetensors, shards of it, or pytorch_model.bin; or it is
        OpenAI's own ("124M"), with hparams.json, checkpoint, and model.ckpt in TensorFlow's format.
        A file is llama.cpp's (.gguf, not quantized), or what `torch.save` wrote (.pt): nanoGPT's
        checkpoint, or a state dict as for `from_state_dict`. Raises `WeightsError` for a damaged
        file, and for weights that are not exactly this architecture's, naming every key.
        """
        cfg, state = read_pretrained(source, resolve_device(device), dtype)
        with torch.device("meta"):  # nothing is initialized that is overwritten at once
            model = cls(cfg)
        model.load_state_dict(state, assign=True)
        model.source = source
        return model

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], cfg: Config | None = None
    ) -> "DemoTransformer":
        """GPT-2 with a copy of the weights of `HookedTransformer`, `TransformerBridge`,
        `GPT2LMHeadModel`, nanoGPT, minGPT or `DemoTransformer`, in their dtype and on their device.

        Without `cfg` the architecture is read off the shapes. Raises `WeightsError` as
        `from_pretrained` does, and where the shapes leave the number of heads open.
        """
        cfg, state = read_state_dict(state, cfg)
        weight = state["embed.W_E"]
        with torch.device("meta"):
            model = cls(cfg)
        model = model.to(weight.dtype).to_empty(device=weight.device)
        model.load_state_dict(state)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors in Hugging Face's format, atomically.

        Raises `WeightsError` for a model that the format cannot hold, before writing: one of other
        modules than GPT-2's, too, as it would come back with those.
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
                "save the weights with torch.save(model.state_dict(), file), and swap again"
            )
        write_folder(Path(folder), self.cfg, self.state_dict())
