"""`DemoTransformer`: GPT-2 from tokens to logits."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookPoint
from clean_transformer.inference.optimized import Optimized, optimize
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.support.keywords import checks_keywords
from clean_transformer.text.generation import GenerationMixin
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.load import read_pretrained, read_state_dict
from clean_transformer.weights.processing import process_weights
from clean_transformer.weights.refusals import WeightsError

Output = Float[Tensor, "batch logit_pos d_vocab"] | Float[Tensor, "batch logit_pos d_model"]
SWAPPED_OUT = (
    "the unembedding is tied to an embedding that was swapped out, and whose weights are in no "
    "module; swap the unembedding too, or restore the embedding"
)


class DemoTransformer(GenerationMixin):
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
        if stop_at_layer is not None:
            raise ValueError("stop_at_layer leaves layers of the kv_cache empty; use one of them")
        kv_cache.require_fit(tokens, len(self.blocks))
        if isinstance(kv_cache, StaticKVCache) and tokens.shape[1] == 1 and unembed:
            output = self.read_one(tokens, kv_cache, last_only)
        else:
            output = self.read(tokens, kv_cache, last_only, unembed=unembed)
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
        """Compute what `forward` returns, without checking the arguments.

        The keys and values of `tokens` are stored in `kv_cache`, but `kv_cache.length` does not
        change.
        """
        positions = kv_cache.positions(tokens) if kv_cache is not None else None
        layers = kv_cache.layers if kv_cache is not None else [None] * len(self.blocks)
        embed = self.hook_embed(self.embed(tokens))
        pos_embed = self.hook_pos_embed(self.pos_embed(tokens, positions=positions))
        residual = embed + pos_embed
        blocks = list(zip(self.blocks, layers, strict=True))[:stop_at_layer]
        for block, layer in blocks:
            residual = block(residual, kv_cache=layer)
        if last_only:
            residual = residual[:, -1:]
        if stop_at_layer is not None:
            return residual
        normalized = self.ln_final(residual)
        return self.unembed(normalized) if unembed else normalized

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

        Raises `TypeError` if the tokens are not int64 or int32. Raises `ValueError` if their shape
        is not [batch pos], if there are no tokens, if there are more than n_ctx positions, or if an
        id is outside the vocabulary. `torch.export` records a graph without the check of the ids.
        """
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
        # Without ids, only with shapes, there is nothing more to check. Older versions of PyTorch
        # lack `is_exporting`.
        if tokens.is_meta or getattr(torch.compiler, "is_exporting", bool)():
            return
        # For an id outside the vocabulary, an accelerator could crash or return arbitrary numbers.
        lowest, highest = (int(bound) for bound in tokens.aminmax())
        if lowest < 0 or highest >= self.cfg.d_vocab:
            raise ValueError(
                f"token ids run from {lowest} to {highest}; "
                f"this vocabulary has ids 0 to {self.cfg.d_vocab - 1}"
            )

    @property
    def swapped_out_embedding(self) -> Embed | None:
        """The embedding that a tied unembedding reads, if it is no longer a part of the model.

        This happens if only the embedding is swapped. The state dict then lacks weights that the
        logits depend on.
        """
        if not isinstance(self.unembed, TiedUnembed):
            return None
        embed = self.unembed.embed
        return None if any(embed is each for each in self.modules()) else embed

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parameters by name. Warns about `swapped_out_embedding`, which it lacks."""
        if self.swapped_out_embedding is not None:
            warnings.warn(f"this state dict is incomplete: {SWAPPED_OUT}", stacklevel=2)
        return super().state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DemoTransformer":
        """Apply `fn` to all weights, as in `model.double()` and `model.to(device)`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and (embed := self.swapped_out_embedding) is not None:
            embed._apply(fn)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    @checks_keywords
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = torch.float32,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
    ) -> "DemoTransformer":
        """Return a GPT-2 with the weights that `source` names.

        The weights are converted to `dtype`, such as torch.float16 or "float16", and moved to
        `device`. The device "auto" is cuda if
        this machine has it, otherwise mps, otherwise cpu.

        By default, the weights stay as published. The last four arguments change the weights, but
        not the log-probabilities that the model computes; see `process_weights` in
        `weights/processing.py`. `source` is one of

        - a hub id ("openai-community/gpt2"), or an alias of a hub id ("gpt2");
        - "demo", the tiny model that comes with the package;
        - a folder with config.json, and with model.safetensors (one file or several shards) or
          pytorch_model.bin;
        - a folder that OpenAI published ("124M"), with hparams.json and a TensorFlow checkpoint;
        - a .gguf file of llama.cpp that is not quantized;
        - a .pt file that `torch.save` wrote. The file holds a nanoGPT checkpoint, or a state dict
          that `from_state_dict` accepts.

        Raises `WeightsError` for a damaged file, and for weights that do not fit the architecture
        exactly. The message names every weight that is missing, unused, or has the wrong shape.
        """
        cfg, state = read_pretrained(source, resolve_device(device), choose_dtype(dtype))
        processing = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
        }
        if any(processing.values()):
            cfg, processed = process_weights(cfg, state, **processing)
            state = dict(processed)
        with torch.device("meta"):  # allocates no memory for weights that are replaced below
            model = cls(cfg)
        model.load_state_dict(state, assign=True)
        model.source = source
        return model

    @classmethod
    @checks_keywords
    def from_state_dict(
        cls, state: Mapping[str, Tensor], cfg: Config | None = None
    ) -> "DemoTransformer":
        """Return a GPT-2 with a copy of the weights in `state`.

        The copy has the same dtype and device. `state` is the state dict of a `HookedTransformer`,
        `TransformerBridge`, `GPT2LMHeadModel`, nanoGPT, minGPT or `DemoTransformer`. `cfg` is the
        architecture; None derives it from the shapes of the weights. Raises `WeightsError` if the
        weights do not fit the architecture exactly, and if the number of heads cannot be derived.
        """
        cfg, state = read_state_dict(state, cfg)
        weight = state["embed.W_E"]
        with torch.device("meta"):
            model = cls(cfg)
        model = model.to(weight.dtype).to_empty(device=weight.device)
        model.load_state_dict(state)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, in Hugging Face's format.

        If the model has a tokenizer, its files are written, too (see `Tokenizer.files`). If an
        error occurs, no file is written. Raises `WeightsError`, before anything is
        written, if the format cannot represent the model. For example, a model with swapped modules
        cannot be saved, because config.json does not name the classes of modules.
        """
        if self.swapped_out_embedding is not None:
            raise WeightsError(f"the files would be incomplete: {SWAPPED_OUT}")
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
        write_folder(Path(folder), self.cfg, self.state_dict(), self._tokenizer_files())
