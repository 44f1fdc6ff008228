"""Training: from text or tokens to a checkpoint and a model."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

# The command line reads the settings of this room for its help, and shows that without PyTorch.
if TYPE_CHECKING:
    from clean_transformer.training.checkpoint import Measured as Measured
    from clean_transformer.training.loop import train as train
    from clean_transformer.training.settings import Training as Training
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
