"""Reads checkpoints, writes GGUF files, and simplifies weights, for example with `fold_ln`."""

from typing import TYPE_CHECKING

from clean_transformer.support.lazy import lazy_names

if TYPE_CHECKING:
    from clean_transformer.weights.formats.gguf import write_gguf as write_gguf
    from clean_transformer.weights.load import read_pretrained as read_pretrained
    from clean_transformer.weights.processing import center_unembed as center_unembed
    from clean_transformer.weights.processing import (
        center_writing_weights as center_writing_weights,
    )
    from clean_transformer.weights.processing import fold_ln as fold_ln
    from clean_transformer.weights.processing import fold_value_biases as fold_value_biases
    from clean_transformer.weights.processing import process_weights as process_weights
    from clean_transformer.weights.refusals import WeightsError as WeightsError
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
