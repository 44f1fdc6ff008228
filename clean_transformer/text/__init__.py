"""Text in, text out: `Tokenizer`, `Sampling`, and the `generate` of `GenerationMixin`."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# The command line reads `Sampling` for its help, and shows that without importing PyTorch.
if TYPE_CHECKING:
    from clean_transformer.text.generation import GenerationMixin as GenerationMixin
    from clean_transformer.text.settings import Sampling as Sampling
    from clean_transformer.text.tokenizer import END_OF_TEXT as END_OF_TEXT
    from clean_transformer.text.tokenizer import Tokenizer as Tokenizer
    from clean_transformer.text.tokenizer import visible as visible
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
