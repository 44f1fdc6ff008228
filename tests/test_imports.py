"""Imports run from a higher layer to a lower one, never back, and drag nothing heavy in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import clean_transformer

PACKAGE = Path(clean_transformer.__file__).parent
FILES = {
    path.relative_to(PACKAGE).as_posix().removesuffix(".py"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A file imports from the lines above its own only; the files of parity/ also from each other.
LAYERS = (
    ("config", "hooks", "device", "files", "weights/hub", "stories", "cross_entropy"),
    (
        *("tokenizer", "activations", "kv_cache", "samplers", "reports"),
        *("weights/shapes", "modules/initial"),
    ),
    ("generate",),
    ("beam_search",),
    ("language_model",),
    ("weights/table", "weights/leveldb", "data", "distributed"),
    ("checkpoint",),
    ("weights/huggingface", "weights/hooked_transformer", "weights/transformer_bridge"),
    ("weights/tensor_bundle", "weights/nanogpt", "weights/gguf"),
    ("weights/openai", "weights/processing", "weights/synthetic"),
    ("weights/load",),
    ("modules/affine",),
    ("modules/embed", "modules/pos_embed", "modules/layer_norm", "modules/attention"),
    ("modules/mlp", "modules/unembed"),
    ("modules/block", "products", "memory_layout"),
    ("optimize",),
    ("model",),
    ("conventions",),
    ("places",),
    ("predict", "swap", "variants", "train", "parity/*"),
    ("effect", "makes", "demo"),
    ("plots", "explain", "terminal", "effect_report"),
    ("cli_text", "cli_train", "cli_bench"),
    ("cli",),
    ("__init__",),
)
EMPTY = ("modules/__init__", "weights/__init__", "parity/__init__")

OTHER_IMPLEMENTATIONS = {"transformer_lens", "transformers"}
HEAVY = OTHER_IMPLEMENTATIONS | {"huggingface_hub", "gguf", "typer", "rich", "plotly"}


def layer(file: str) -> int:
    numbers = [
        number
        for number, patterns in enumerate(LAYERS)
        if any(fnmatchcase(file, pattern) for pattern in patterns)
    ]
    assert len(numbers) == 1, f"{file} stands {len(numbers)} times in LAYERS"
    return numbers[0]


def imports(file: str) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from package import module` imports the module too.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if as_file(name) in FILES]
            yield from modules or [str(node.module)]


def as_file(module: str) -> str:
    return module.removeprefix("clean_transformer.").replace(".", "/")


def own_imports(file: str) -> list[str]:
    own = [module for module in imports(file) if module.split(".")[0] == "clean_transformer"]
    return ["__init__" if module == "clean_transformer" else as_file(module) for module in own]


MODULES = [file for file in FILES if file not in EMPTY]


@pytest.mark.parametrize("file", MODULES)
def test_file_imports_only_from_lower_layers(file: str):
    own_layer = layer(file)
    for imported in own_imports(file):
        within_parity = file.startswith("parity/") and imported.startswith("parity/")
        assert layer(imported) < own_layer or within_parity, f"{file} imports {imported}"


@pytest.mark.parametrize("file", EMPTY)
def test_package_file_is_empty(file: str):
    assert FILES[file].read_text() == ""


def test_no_circle():
    TopologicalSorter({file: own_imports(file) for file in MODULES}).prepare()


@pytest.mark.parametrize("file", MODULES)
def test_only_the_references_import_other_implementations(file: str):
    packages = {module.split(".")[0] for module in imports(file)}
    if file == "parity/references":
        assert packages & OTHER_IMPLEMENTATIONS
    else:
        assert not packages & OTHER_IMPLEMENTATIONS


def test_importing_the_package_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-c", "import clean_transformer"]
    process = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, encoding="utf-8", check=True
    )
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    imported = {module.split(".")[0] for module in modules}
    assert {"torch", "clean_transformer"} <= imported
    assert not imported & HEAVY
    assert "torch._dynamo" not in modules  # which takes as long as the rest of torch
