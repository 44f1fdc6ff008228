"""Builds each notebook NAME.ipynb from NAME.md, and runs its cells. `make notebooks` runs this.

Each ```python block of NAME.md becomes a code cell. The text between two blocks becomes a Markdown
cell.
"""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.md") if file.stem != "README")

CODE = re.compile(r"^```python\n(.*?)^```$\n?", re.DOTALL | re.MULTILINE)


def notebook(source: str) -> "NotebookNode":
    """Return a notebook with the text and code of the Markdown `source`, without outputs."""
    from nbformat import v4

    made = v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    # `split` returns text at even indices and code at odd indices, because the pattern has one
    # group.
    for index, part in enumerate(CODE.split(source)):
        if part.strip():
            new_cell = v4.new_code_cell if index % 2 else v4.new_markdown_cell
            made.cells.append(new_cell(part.strip(), id=f"cell-{len(made.cells)}"))
    return made


def execute(made: "NotebookNode", folder: Path) -> None:
    """Run all cells of the notebook `made` in a new kernel, and store the outputs in the notebook.

    The kernel's working directory is `folder`. Raises `CellExecutionError` if a cell raises an
    error.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        made, timeout=300, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    # Without the package ipywidgets, tqdm (which huggingface_hub imports) warns in a kernel.
    client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"})


def main() -> None:
    """Build the notebooks whose names are on the command line; without names, build all."""
    import nbformat

    # Store figures as PNG pictures: they are small, and every notebook viewer can show them.
    os.environ["PLOTLY_RENDERER"] = "png"
    for name in sys.argv[1:] or NAMES:
        made = notebook((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
        execute(made, FOLDER)
        # `language_info` has the version of Python, which differs between machines.
        del made.metadata["language_info"]
        nbformat.write(made, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
