"""A library is one file in `libraries/`, and needs no edit elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.swapping import libraries, swap, transplant
from clean_transformer.swapping.libraries import find

from ..helpers import TINY, random_model, random_tokens

NEW_FILE = """
from clean_transformer.swapping.libraries.base import Adapter, Library, place_at


class Doubling(Adapter):
    def forward(self, x):
        return self.module(x, 2)


class Newcomer(Library):
    MODELS = ("tests.NewModel",)
    AS_OURS = {("mlp", "tests.NewMLP"): Doubling}

    def config(self, model):
        return model.cfg

    def places(self, model, path, module):
        return [place_at(model, path, module)]

    def lost(self, model, path, places, idle):
        return []
"""


class NewMLP(nn.Module):
    def forward(self, x: Tensor, factor: int) -> Tensor:
        return x * factor


class NewModel(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.mlp = NewMLP()
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab).double()


@pytest.fixture
def new_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the folder of libraries."""
    (tmp_path / "newcomer.py").write_text(NEW_FILE)
    monkeypatch.setattr(libraries, "__path__", [*libraries.__path__, str(tmp_path)])
    caches = (find.known_libraries, find.adapters)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_the_libraries_that_are_known():
    names = {name for each in find.known_libraries() for name in each.MODELS}
    assert names == {
        "clean_transformer.HookedModule",
        "transformer_lens.HookedTransformer",
        "transformer_lens.TransformerBridge",
        "transformers.GPT2LMHeadModel",
    }


@pytest.mark.filterwarnings("ignore::clean_transformer.swapping.swaps.HookPointsLost")
@pytest.mark.usefixtures("new_library")
def test_a_new_file_is_a_new_library():
    theirs, ours, tokens = NewModel(TINY), random_model(), random_tokens()
    with transplant(theirs, "unembed", ours):
        assert theirs.unembed is ours.unembed
    _, cache = ours.run_with_cache(tokens, names_filter="blocks.0.ln2")
    with swap(ours, "blocks.0.mlp", theirs.mlp):
        _, with_theirs = ours.run_with_cache(tokens, names_filter="blocks.0.hook_mlp_out")
    assert torch.equal(with_theirs["blocks.0.hook_mlp_out"], 2 * cache["blocks.0.ln2"])
