"""Alternative modules for `swap`. The docstring of a class cites the paper that introduced it."""

from clean_transformer.variants.attention import AlibiAttention as AlibiAttention
from clean_transformer.variants.attention import GroupedQueryAttention as GroupedQueryAttention
from clean_transformer.variants.attention import RotaryAttention as RotaryAttention
from clean_transformer.variants.attention import SlidingWindowAttention as SlidingWindowAttention
from clean_transformer.variants.block import ParallelBlock as ParallelBlock
from clean_transformer.variants.kernels import FlexAttention as FlexAttention
from clean_transformer.variants.kernels import SdpaAttention as SdpaAttention
from clean_transformer.variants.layer_norm import RMSNorm as RMSNorm
from clean_transformer.variants.linear_attention import LinearAttention as LinearAttention
from clean_transformer.variants.mlp import ExactGeluMLP as ExactGeluMLP
from clean_transformer.variants.mlp import ReluMLP as ReluMLP
from clean_transformer.variants.mlp import SwigluMLP as SwigluMLP
from clean_transformer.variants.pos_embed import NoPositions as NoPositions
