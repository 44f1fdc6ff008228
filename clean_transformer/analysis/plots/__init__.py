"""Functions that plot what a model computes, as plotly figures, and `save`, which writes a figure.

Most functions take the activations of one text, with or without a batch dimension of length 1, and
the tokens of the text as strings: `model.to_str_tokens(text)`.
"""

from importlib.util import find_spec

if find_spec("plotly") is None:
    raise ImportError(
        "pictures are drawn by plotly, which is not installed: "
        "pip install 'clean-transformer[plots]'"
    )

from clean_transformer.analysis.plots.attention import attention_pattern as attention_pattern
from clean_transformer.analysis.plots.predictions import logit_lens as logit_lens
from clean_transformer.analysis.plots.predictions import losses as losses
from clean_transformer.analysis.plots.predictions import token_probabilities as token_probabilities
from clean_transformer.analysis.plots.style import STYLE as STYLE
from clean_transformer.analysis.plots.style import save as save
from clean_transformer.analysis.plots.vectors import embedding_similarity as embedding_similarity
from clean_transformer.analysis.plots.vectors import position_similarity as position_similarity
from clean_transformer.analysis.plots.vectors import residual_norms as residual_norms
