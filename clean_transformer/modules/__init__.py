"""The modules of GPT-2. `contract.CONTRACT` lists the input and output shapes of all modules."""

from clean_transformer.modules.attention import Attention as Attention
from clean_transformer.modules.block import TransformerBlock as TransformerBlock
from clean_transformer.modules.embed import Embed as Embed
from clean_transformer.modules.layer_norm import LayerNorm as LayerNorm
from clean_transformer.modules.layer_norm import LayerNormPre as LayerNormPre
from clean_transformer.modules.mlp import MLP as MLP
from clean_transformer.modules.pos_embed import PosEmbed as PosEmbed
from clean_transformer.modules.unembed import TiedUnembed as TiedUnembed
from clean_transformer.modules.unembed import Unembed as Unembed
