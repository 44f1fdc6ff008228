"""A readable GPT-2 in PyTorch. `parity` checks that its activations equal TransformerLens's."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# `import clean_transformer` does not import PyTorch, so that the command line shows its help at
# once. `lazy_names` imports each name below when it is first used.
if TYPE_CHECKING:
    from clean_transformer import analysis as analysis
    from clean_transformer import benchmark as benchmark
    from clean_transformer import demo as demo
    from clean_transformer import inference as inference
    from clean_transformer import modules as modules
    from clean_transformer import parity as parity
    from clean_transformer import reports as reports
    from clean_transformer import swapping as swapping
    from clean_transformer import text as text
    from clean_transformer import training as training
    from clean_transformer import variants as variants
    from clean_transformer import weights as weights
    from clean_transformer.activation_cache import ActivationCache as ActivationCache
    from clean_transformer.config import Config as Config
    from clean_transformer.hooks import HookPoint as HookPoint
    from clean_transformer.kv_cache import KVCache as KVCache
    from clean_transformer.model import DemoTransformer as DemoTransformer
    from clean_transformer.modules.attention import Attention as Attention
    from clean_transformer.modules.block import TransformerBlock as TransformerBlock
    from clean_transformer.modules.embed import Embed as Embed
    from clean_transformer.modules.layer_norm import LayerNorm as LayerNorm
    from clean_transformer.modules.layer_norm import LayerNormPre as LayerNormPre
    from clean_transformer.modules.mlp import MLP as MLP
    from clean_transformer.modules.pos_embed import PosEmbed as PosEmbed
    from clean_transformer.modules.unembed import Unembed as Unembed
    from clean_transformer.support.version import __version__ as __version__
    from clean_transformer.swapping.swaps import swap as swap
    from clean_transformer.swapping.swaps import transplant as transplant
    from clean_transformer.text.tokenizer import Tokenizer as Tokenizer
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
