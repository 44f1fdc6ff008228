"""LevelDB's checksum, which shows whether the files of a TensorFlow checkpoint are damaged."""

from types import ModuleType
from typing import Any

from clean_transformer.weights.refusals import WeightsError


def masked_crc32c(data: Any) -> int:
    """Return LevelDB's checksum of `data`: its CRC-32C, rotated by 15 bits, plus a constant."""
    crc = crc32c_library().value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def crc32c_library() -> ModuleType:
    """Return the package google_crc32c. Raises `WeightsError` if it is not installed."""
    try:
        import google_crc32c
    except ImportError:
        raise WeightsError(
            "OpenAI's checkpoints need the google-crc32c package; "
            "pip install 'clean-transformer[tensorflow]'"
        ) from None
    return google_crc32c
