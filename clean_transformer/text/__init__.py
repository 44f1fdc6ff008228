"""Generates text after a prompt: `Tokenizer`, `Sampling` and `GenerationMixin.generate`."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# The imports are lazy, because the command line reads `Sampling` for its help texts and must not
# import PyTorch for them.
if TYPE_CHECKING:
    from clean_transformer.text.generation import GenerationMixin as GenerationMixin
    from clean_transformer.text.settings import Sampling as Sampling
    from clean_transformer.text.symbols import visible as visible
    from clean_transformer.text.tokenizer import Tokenizer as Tokenizer
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
