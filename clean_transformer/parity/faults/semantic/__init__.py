"""Semantic faults: mistakes that people make when they implement GPT-2.

`edits.py` defines the class `SemanticFault`. Each other file has a table of the faults in one part
of the model. SEMANTIC_FAULTS joins the tables of faults that change a plain forward pass. The
faults in CACHE_FAULTS (in `kv_cache.py`) change only calls with a KV cache.
"""

from clean_transformer.parity.faults.semantic.attention import ATTENTION_FAULTS
from clean_transformer.parity.faults.semantic.block import BLOCK_FAULTS
from clean_transformer.parity.faults.semantic.embedding import EMBEDDING_FAULTS
from clean_transformer.parity.faults.semantic.kv_cache import CACHE_FAULTS as CACHE_FAULTS
from clean_transformer.parity.faults.semantic.layer_norm import LAYER_NORM_FAULTS
from clean_transformer.parity.faults.semantic.mlp import MLP_FAULTS
from clean_transformer.parity.faults.semantic.model import MODEL_FAULTS
from clean_transformer.parity.faults.semantic.projections import PROJECTION_FAULTS

SEMANTIC_FAULTS = (
    *EMBEDDING_FAULTS,
    *LAYER_NORM_FAULTS,
    *PROJECTION_FAULTS,
    *ATTENTION_FAULTS,
    *BLOCK_FAULTS,
    *MLP_FAULTS,
    *MODEL_FAULTS,
)
