"""Text in, text out: `Tokenizer`, `Sampling`, and the `generate` of `GenerationMixin`."""

from clean_transformer.text.generation import GenerationMixin as GenerationMixin
from clean_transformer.text.sampling import Sampling as Sampling
from clean_transformer.text.tokenizer import END_OF_TEXT as END_OF_TEXT
from clean_transformer.text.tokenizer import Tokenizer as Tokenizer
from clean_transformer.text.tokenizer import visible as visible
