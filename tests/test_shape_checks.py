"""While tests run, every shape and type in a signature of the package is checked."""

import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from clean_transformer.modules.mlp import MLP

from .helpers import TINY


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match=r"modules\.mlp\.MLP\.forward"):
        MLP(TINY)(torch.zeros(TINY.d_model))


def test_no_module_was_imported_before_the_checks_were_installed():
    """As our pytest plugin would do if this project's own tests loaded it."""
    loaders = {
        name: type(module.__loader__).__name__
        for name, module in sys.modules.items()
        if name.split(".")[0] == "clean_transformer"
    }
    unchecked = [name for name, loader in loaders.items() if loader != "_JaxtypingLoader"]
    assert len(loaders) > 10
    assert not unchecked
