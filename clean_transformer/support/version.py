"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clean-transformer")
except PackageNotFoundError:
    __version__ = "unknown (clean-transformer is not installed)"
