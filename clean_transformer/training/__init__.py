"""Trains a model on tokens and saves checkpoints: `train`, with the settings in `Training`."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# The imports are lazy, because the command line reads `Training` for its help texts and must not
# import PyTorch for them.
if TYPE_CHECKING:
    from clean_transformer.training.checkpoint import Measured as Measured
    from clean_transformer.training.distributed import joined as joined
    from clean_transformer.training.distributed import rank as rank
    from clean_transformer.training.identity import WeightsReplaced as WeightsReplaced
    from clean_transformer.training.loop import train as train
    from clean_transformer.training.loss import cross_entropy as cross_entropy
    from clean_transformer.training.settings import Training as Training
    from clean_transformer.training.windows import load_tokens as load_tokens
    from clean_transformer.training.windows import tokenize as tokenize
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
