"""What `import clean_transformer` offers, and that it imports nothing before somebody asks."""

import importlib
import inspect
import pickle
import pydoc
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import clean_transformer

CLASSES = {
    *("ActivationCache", "Config", "DemoTransformer", "HookPoint", "KVCache", "Tokenizer"),
    *("Attention", "Embed", "LayerNorm", "LayerNormPre", "MLP", "PosEmbed"),
    *("TransformerBlock", "Unembed"),
}
# Every room that somebody imports from. Nobody imports from `notebooks`; `cli` and `support` serve
# the others.
ROOMS = {
    *("analysis", "benchmark", "demo", "inference", "modules", "parity", "reports"),
    *("swapping", "text", "training", "variants", "weights"),
}
NAMES = CLASSES | ROOMS | {"swap", "transplant", "__version__"}


def in_a_fresh_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def test_the_package_offers_exactly_these_names():
    assert {*clean_transformer.__all__} == NAMES
    shown = {name for name in dir(clean_transformer) if not name.startswith("__")}
    assert shown == NAMES - {"__version__"}
    folders = Path(clean_transformer.__file__).parent.glob("*/__init__.py")
    assert {file.parent.name for file in folders} == ROOMS | {"cli", "notebooks", "support"}
    for name in CLASSES:
        assert inspect.isclass(getattr(clean_transformer, name))
    assert inspect.isfunction(clean_transformer.swap)
    assert inspect.isfunction(clean_transformer.transplant)
    for room in ROOMS:
        assert inspect.ismodule(getattr(clean_transformer, room))
    assert clean_transformer.__version__[0].isdigit()


def test_every_way_of_importing_gives_the_same_objects():
    every: dict[str, object] = {}
    exec("from clean_transformer import *", every)
    from clean_transformer import DemoTransformer, swap, variants
    from clean_transformer.model import DemoTransformer as of_its_module

    assert {*every} >= NAMES
    assert every["DemoTransformer"] is DemoTransformer is of_its_module
    assert every["swap"] is swap
    assert every["variants"] is variants is importlib.import_module("clean_transformer.variants")


def test_pickle_and_help():
    kept = pickle.loads(pickle.dumps(clean_transformer.Config.gpt2()))
    assert kept == clean_transformer.Config.gpt2()
    assert pickle.loads(pickle.dumps(clean_transformer.Attention)) is clean_transformer.Attention
    said = pydoc.plain(pydoc.render_doc(clean_transformer))
    assert "class DemoTransformer" in said
    assert "swap(" in said


def test_a_wrong_name():
    message = "module 'clean_transformer' has no attribute 'DemoTransfomer'"
    with pytest.raises(AttributeError, match=message) as caught:
        _ = clean_transformer.DemoTransfomer
    assert caught.value.name == "DemoTransfomer"
    with pytest.raises(ImportError, match="cannot import name 'DemoTransfomer'"):
        exec("from clean_transformer import DemoTransfomer")
    assert not hasattr(clean_transformer, "__wrapped__")


@pytest.mark.parametrize("package", ["", ".parity", ".support", ".text", ".training"])
def test_a_lazy_package_imports_no_pytorch(package: str):
    code = f"import sys, clean_transformer{package} as p; dir(p); print('torch' in sys.modules)"
    assert in_a_fresh_process(code) == "False\n"


def test_the_package_is_imported_from_a_zip_file(tmp_path: Path):
    package = Path(clean_transformer.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for file in package.rglob("*.py"):
            archive.write(file, file.relative_to(package.parent))
    code = (
        f"import sys; sys.path.insert(0, {str(archive.filename)!r})\n"
        "import clean_transformer\n"
        "print(clean_transformer.__file__, clean_transformer.Config.gpt2().n_layers)"
    )
    assert in_a_fresh_process(code) == f"{archive.filename}/clean_transformer/__init__.py 12\n"


def test_the_version_of_a_folder_that_is_not_installed():
    code = (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "import clean_transformer\n"
        "print(clean_transformer.__version__)"
    )
    assert in_a_fresh_process(code) == "unknown (clean-transformer is not installed)\n"


@pytest.mark.parametrize("package", ["parity", "text", "training"])
def test_a_lazy_room_gives_what_it_lists(package: str):
    room = importlib.import_module(f"clean_transformer.{package}")
    assert room.__all__
    assert [name for name in dir(room) if not name.startswith("__")] == sorted(room.__all__)
    for name in room.__all__:
        assert name in dir(room)
        assert getattr(room, name) is vars(room)[name]  # kept after the first use
