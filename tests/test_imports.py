"""Imports run from a higher layer to a lower one, never back, and import nothing heavy."""

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

Layers = tuple[tuple[str, ...], ...]

# A room imports from the lines above its own. Within a room anything but a circle is allowed.
LAYERS = (
    ("support/*",),
    ("reports/*",),
    ("config", "residual_stacks"),
    ("activation_cache",),
    ("hooks", "kv_cache"),
    ("weights/*",),
    ("text/*",),
    ("modules/*",),
    ("inference/*",),
    ("model",),
    ("variants/*",),
    ("analysis/*", "training/*"),
    ("swapping/*",),
    ("parity/*",),
    ("benchmark/*",),
    ("demo/*",),
    ("notebooks/*",),
    ("cli/*",),
    ("__init__", "__main__"),
)
# These two rooms also have an order inside.
SUB_LAYERS = {
    "parity": (
        (
            "verdict",
            "attempts",
            "elementary",
            "graphs",
            "oracle",
            "inputs",
            "modes",
            "limits",
            "scales",
        ),
        ("references/*", "operations/*", "activations/*", "rounding"),
        ("same_function", "invariants", "faults/*"),
        ("locate", "numpy_gpt2", "kernels"),
        ("uses/*",),
        ("results", "cliffs", "measurements"),
        ("lowered",),
        ("suite",),
        ("report/*",),
        ("assertion", "any_model/*"),
        ("pytest_plugin", "__init__"),
    ),
    "weights": (
        ("hub", "rows", "shapes", "refusals", "table", "infer", "files"),
        ("formats/*",),
        ("load", "processing", "synthetic"),
        ("__init__",),
    ),
}

OTHER_IMPLEMENTATIONS = {"transformer_lens", "transformers"}
HEAVY = OTHER_IMPLEMENTATIONS | {
    "gguf",
    "huggingface_hub",
    "jinja2",
    "nbclient",
    "nbformat",
    "plotly",
    "rich",
    "tokenizers",
    "typer",
}


def layer(file: str, layers: Layers = LAYERS) -> int:
    numbers = [
        number
        for number, patterns in enumerate(layers)
        if any(fnmatchcase(file, pattern) for pattern in patterns)
    ]
    assert len(numbers) == 1, f"{file} stands {len(numbers)} times in the table"
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
    file = module.removeprefix("clean_transformer").removeprefix(".").replace(".", "/")
    return file if file in FILES else f"{file}/__init__".removeprefix("/")


def own_imports(file: str) -> list[str]:
    own = [module for module in imports(file) if module.split(".")[0] == "clean_transformer"]
    return [as_file(module) for module in own]


@pytest.mark.parametrize("file", FILES)
def test_file_imports_only_from_lower_layers(file: str):
    for imported in own_imports(file):
        room, _, name = file.partition("/")
        other_room, _, other_name = imported.partition("/")
        if not (name and room == other_room):
            assert layer(imported) < layer(file), f"{file} imports {imported}"
        elif room in SUB_LAYERS and name.split("/")[0] != other_name.split("/")[0]:
            sub_layers = SUB_LAYERS[room]
            assert layer(other_name, sub_layers) <= layer(name, sub_layers), (
                f"{file} imports {imported}"
            )


def test_no_circle():
    TopologicalSorter({file: own_imports(file) for file in FILES}).prepare()


@pytest.mark.parametrize("file", FILES)
def test_only_the_references_import_other_implementations(file: str):
    packages = {module.split(".")[0] for module in imports(file)}
    # `QK` and `OV` are TransformerLens's own `FactoredMatrix`, so that its methods work on them.
    beside = file == "weights/stacked"
    beside |= file.startswith(("parity/references/", "benchmark/contestants/"))
    assert beside or not packages & OTHER_IMPLEMENTATIONS


def imported_by(code: str) -> set[str]:
    """The modules that a fresh Python imports to run the code."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    process = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, encoding="utf-8", check=True
    )
    return {line.split("|")[-1].strip() for line in process.stderr.splitlines()}


def test_importing_the_model_imports_nothing_heavy():
    modules = imported_by("from clean_transformer import DemoTransformer")
    imported = {module.split(".")[0] for module in modules}
    assert {"torch", "clean_transformer"} <= imported
    assert not imported & HEAVY
    assert "torch._dynamo" not in modules  # which takes as long as the rest of torch


def test_importing_the_rooms_imports_nothing_heavy():
    rooms = sorted(file.partition("/")[0] for file in FILES if file.endswith("/__init__"))
    imports = (f"import clean_transformer.{room}" for room in {*rooms} - {"cli"})
    modules = imported_by("; ".join(imports))
    assert not {module.split(".")[0] for module in modules} & HEAVY
