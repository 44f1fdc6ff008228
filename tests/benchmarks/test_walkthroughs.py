"""Notebooks run with only the construction of the model changed."""

from pathlib import Path

import pytest

from benchmarks import walkthroughs


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        ("model = HookedTransformer.from_pretrained('gpt2')", "model = construct('gpt2')"),
        ("m = TransformerBridge.boot_transformers('gpt2')", "m = construct('gpt2')"),
        ("model = HookedTransformer(cfg)", "model = construct(cfg)"),
        ("def f(model: HookedTransformer): ...", "def f(model: HookedTransformer): ..."),
        ("cfg = HookedTransformerConfig(n=1)", "cfg = HookedTransformerConfig(n=1)"),
        ("'`HookedTransformer.from_pretrained(NAME)`'",) * 2,
        ("if colab:\n    %pip install einops\nx = 1", "if colab:\n    pass\nx = 1"),
        ("model.enable_compatibility_mode()", "pass"),
    ],
)
def test_only_the_construction_is_changed(cell: str, changed: str):
    assert walkthroughs.changed(cell) == changed


@pytest.mark.slow
def test_each_cell_that_fails_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sources = [
        "model = HookedTransformer.from_pretrained('gpt2', fold_ln=False)",
        "model.set_use_attn_result(True)",
        "import types\nshallow = HookedTransformer(types.SimpleNamespace(n_layers=1))",
        "assert (len(model.blocks), len(shallow.blocks)) == (2, 1)\n"
        "assert hasattr(model.ln_final, 'w') and not hasattr(shallow.ln_final, 'w')\n"
        "shallow('a text')",
    ]
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    v4 = nbformat.v4
    cells = [v4.new_markdown_cell("A talk."), *map(v4.new_code_cell, sources)]
    notebook = tmp_path / "talk.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), notebook)
    walkthroughs.main([notebook], "demo")
    first, failed = capsys.readouterr().out.splitlines()
    assert first == "talk: 3 of 4 cells run"
    assert failed.startswith("  cell 1: AttributeError: 'DemoTransformer' has no attribute 'set_us")
