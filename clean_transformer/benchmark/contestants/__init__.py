"""The contestants: the models and libraries whose speed is compared."""

from collections.abc import Callable
from pathlib import Path

from clean_transformer.benchmark.contestants.base import Contestant
from clean_transformer.benchmark.contestants.engines import CTranslate2, LlamaCpp, OnnxRuntime
from clean_transformer.benchmark.contestants.limit import Limit
from clean_transformer.benchmark.contestants.ours import (
    Compiled,
    NanoGPTStyle,
    Optimized,
    OptimizedCompiled,
    Ours,
    Watched,
)
from clean_transformer.benchmark.contestants.peers import (
    HookedTransformer,
    NNsight,
    TransformerBridge,
    Transformers,
    TransformersCompiled,
    TransformersEager,
    TransformersStatic,
)

# The keys are the names of the contestants in reports, and the values are their classes. A class is
# called with the model's folder, a device and a dtype (a key of `base.DTYPES`).
CONTESTANTS: dict[str, Callable[[Path, str, str], Contestant]] = {
    "limit": Limit,
    "ours": Ours,
    "optimized": Optimized,
    "optimized compiled": OptimizedCompiled,
    "compiled": Compiled,
    "watched": Watched,
    "nanoGPT-style": NanoGPTStyle,
    "transformers sdpa": Transformers,
    "transformers eager": TransformersEager,
    "transformers compiled": TransformersCompiled,
    "transformers static": TransformersStatic,
    "HookedTransformer": HookedTransformer,
    "TransformerBridge": TransformerBridge,
    "nnsight": NNsight,
    "CTranslate2": CTranslate2,
    "onnxruntime": OnnxRuntime,
    "llama.cpp": LlamaCpp,
}

# The contestants that run our own code.
OURS = ("ours", "optimized", "optimized compiled", "compiled", "watched")
