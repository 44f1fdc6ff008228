"""What to swap in is found by name, and errors in one's own file are told with their line."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from clean_transformer import MLP
from clean_transformer.swapping.from_name import chosen_make
from clean_transformer.swapping.swaps import swap
from clean_transformer.swapping.trial import SwapError

from ..helpers import random_model

OWN = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from beside import FACTOR


@dataclass
class Settings:
    factor: float = FACTOR


class Scaled(nn.Module):
    def __init__(self, cfg):
        super().__init__()

    def forward(self, x):
        return x * Settings().factor


def same(old, path):
    return old


class Broken(Scaled):
    def forward(self, x):
        return x.no_such_thing()


class Argumentless(nn.Module):
    def __init__(self):
        super().__init__()


constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where one's own files are, and what importing them leaves behind is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("FACTOR = 0.5\n")
    yield tmp_path
    sys.modules.pop("beside", None)


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Another `clean_transformer.variants`, of which all is known."""
    module = ModuleType("clean_transformer.variants")
    for name in ("ReluMLP", "RMSNorm"):
        setattr(module, name, type(name, (nn.Module,), {"__module__": f"{module.__name__}.mlp"}))
    module.MLP, module.function = MLP, len
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_variant(variants: ModuleType) -> None:
    with chosen_make("variants.ReluMLP") as make:
        assert make is variants.ReluMLP


@pytest.mark.parametrize(
    "name", ["variants.MLP", "variants.function", "variants.relu", "ReluMLP", "variants", ""]
)
def test_an_unknown_variant(variants: ModuleType, name: str) -> None:
    message = f"there is no '{name}'; choose from variants.ReluMLP, variants.RMSNorm, or FILE.py"
    with pytest.raises(ValueError, match=message), chosen_make(name):
        pass


@pytest.mark.parametrize("where", ["own.py", "{folder}/own.py", "../{name}/own.py"])
@pytest.mark.filterwarnings("ignore::clean_transformer.swapping.swaps.HookPointsLost")
def test_a_class_or_function_of_ones_own(folder: Path, where: str) -> None:
    model, file = random_model(), where.format(folder=folder, name=folder.name)
    with chosen_make(f"{file}:Scaled") as make, swap(model, "blocks.*.mlp", make):
        assert type(model.blocks[1].mlp).__name__ == "Scaled"
    old = model.blocks[1].mlp
    with chosen_make(f"{file}:same") as make, swap(model, "blocks.*.mlp", make):
        assert model.blocks[1].mlp is old


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.py:Scaled", "there is no Python file '.*none.py'; give FILE.py:NAME"),
        ("own.txt:Scaled", "there is no Python file"),
        (":Scaled", "there is no Python file"),
        ("own.py:Scalled", r"own.py has no class or function 'Scalled'; .* of \['Scaled'"),
        ("own.py:constant", "has no class or function 'constant'"),
        ("own.py:", r"has no class or function ''; did you mean one of \[.*'Settings'"),
    ],
)
def test_a_file_or_name_that_there_is_not(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), chosen_make(name):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\nclass :\n", "^bad.py, line 3: SyntaxError: invalid syntax$"),
        ("\nimport no_such_module\n", "^bad.py, line 2: ModuleNotFoundError: No module named"),
        ("import json\n\n\njson.loads('{')\n", "^bad.py, line 4: JSONDecodeError: Expecting"),
        ("def f():\n    return 1 / 0\n\nf()\n", "^bad.py, line 2: ZeroDivisionError: division"),
    ],
)
def test_an_error_in_the_file(folder: Path, text: str, message: str) -> None:
    (folder / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=message), chosen_make("bad.py:f"):
        pass


def test_an_error_when_the_module_is_tried(folder: Path) -> None:
    line = OWN.splitlines().index("        return x.no_such_thing()") + 1
    message = rf"own.py, line {line}: blocks\.0\.mlp: Broken, given .* raised AttributeError"
    with pytest.raises(ValueError, match=message), chosen_make("own.py:Broken") as make:
        swap(random_model(), "blocks.0.mlp", make)


def test_an_error_when_the_module_is_used(folder: Path) -> None:
    line = OWN.splitlines().index("        return x * Settings().factor") + 1
    message = rf"own.py, line {line}: TypeError: unsupported operand"
    with pytest.raises(ValueError, match=message), chosen_make("own.py:Scaled") as make:
        make(None)(None)


def test_a_class_that_does_not_take_the_config(folder: Path) -> None:
    message = r"wanted a torch.nn.Module, but Argumentless\(cfg\) raised TypeError: .* 1 positional"
    with pytest.raises(SwapError, match=message), chosen_make("own.py:Argumentless") as make:
        swap(random_model(), "blocks.0.mlp", make)


def test_other_errors_are_left_as_they_are(folder: Path) -> None:
    with pytest.raises(KeyError, match="mine"), chosen_make("own.py:Scaled"):
        raise KeyError("mine")
