"""Text in, text out: the tokenizer, sampling, and `generate`."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# The command line reads the settings of this room for its help, and shows that without PyTorch.
if TYPE_CHECKING:
    from clean_transformer.text.generation import GenerationMixin as GenerationMixin
    from clean_transformer.text.sampling import Sampling as Sampling
    from clean_transformer.text.tokenizer import Tokenizer as Tokenizer
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
