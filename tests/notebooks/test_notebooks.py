"""The walkthroughs: they run from top to bottom, and what is shipped is what their text says."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from clean_transformer.notebooks import make
from clean_transformer.text.tokenizer import Tokenizer

from ..cli.running import assert_one_line, call
from ..helpers import GPT2, needs_gpt2

SHIPPED = {name: make.FOLDER / f"{name}.ipynb" for name in make.NAMES}


def source(name: str) -> str:
    return (make.FOLDER / f"{name}.md").read_text(encoding="utf-8")


def read(name: str) -> dict:
    return json.loads(SHIPPED[name].read_text(encoding="utf-8"))


def test_there_are_seven():
    assert len(make.NAMES) == 7
    assert sorted(file.stem for file in make.FOLDER.glob("*.ipynb")) == make.NAMES


@pytest.mark.parametrize("name", make.NAMES)
def test_what_is_shipped_is_the_text_with_outputs(name: str):
    """The cells are those of the Markdown file. All code compiles, and ran without an error."""
    parts = [part.strip() for part in make.CODE.split(source(name))]
    kinds = ["code" if index % 2 else "markdown" for index in range(len(parts))]
    expected = [(kind, part) for kind, part in zip(kinds, parts, strict=True) if part]
    cells = read(name)["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == expected
    assert cells[0]["source"][0].startswith("# ")
    assert "**Result.**" in "".join(cells[-1]["source"])
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    for cell in code:
        compile("".join(cell["source"]), name, "exec")
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output
    text = SHIPPED[name].read_text(encoding="utf-8")
    # No path of the machine on which the notebook was made.
    for private in (Path.home(), Path.cwd(), tempfile.gettempdir(), sys.prefix):
        assert f"{private}/" not in text
    assert len(text) < 1_000_000


@pytest.mark.parametrize("name", make.NAMES)
def test_it_is_a_valid_notebook(name: str):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(read(name)))
    built = make.notebook(source(name))
    nbformat.validate(built)
    shipped = nbformat.from_dict(read(name))
    assert [cell.id for cell in built.cells] == [cell.id for cell in shipped.cells]


@pytest.mark.slow
@pytest.mark.parametrize("name", make.NAMES)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every cell runs in a kernel of its own, without a network."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = make.notebook(source(name))
    make.execute(made, tmp_path)
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]


@needs_gpt2("vocab.json")
def test_the_tokens_are_those_of_gpt2():
    """What `a_closer_look` says of GPT-2's tokens, which needs only the tokenizer."""
    names: dict[str, dict] = {}
    [cell] = [code for code in make.CODE.findall(source("a_closer_look")) if "GPT2_TOKENS" in code]
    table = cell[cell.index("    GPT2_TOKENS") : cell.index("    for text")]
    exec("if True:\n" + table, names)
    tokenizer = Tokenizer.from_pretrained(GPT2)
    assert len(names["GPT2_TOKENS"]) == 7
    for text, expected in names["GPT2_TOKENS"].items():
        assert tokenizer.to_str_tokens(text, prepend_bos=False) == expected


# --- the command ---


def test_the_command_lists_them():
    lines = call("notebook").stdout.splitlines()
    for name, line in zip(make.NAMES, lines, strict=False):
        assert line.split(maxsplit=1) == [name, source(name).splitlines()[0].removeprefix("# ")]


def test_the_command_copies_one(tmp_path: Path):
    name = make.NAMES[0]
    told = call("notebook", name, "--to", tmp_path).stdout
    copy = tmp_path / f"{name}.ipynb"
    assert told.startswith(f"wrote {copy}")
    assert copy.read_bytes() == SHIPPED[name].read_bytes()
    # Your own changes are never overwritten.
    copy.write_text("mine")
    assert_one_line(call("notebook", name, "--to", tmp_path), f"{copy} exists")
    assert copy.read_text() == "mine"


def test_what_the_command_cannot_do(tmp_path: Path):
    assert_one_line(call("notebook", "--to", tmp_path), "name the notebook that --to copies")
    assert_one_line(call("notebook", "nothing"), "no notebook is called 'nothing'; choose from")
    gone = tmp_path / "gone"
    assert_one_line(call("notebook", make.NAMES[0], "--to", gone), "no folder")
