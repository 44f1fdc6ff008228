"""Builds the notebooks: runs NAME.md, the text and code of a walkthrough, and writes NAME.ipynb.

`make notebooks` runs this file. In NAME.md, each ```python block becomes a cell of code. The text
between these blocks becomes a cell of text.
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
    """Return the notebook with the text and code of `source`, without outputs."""
    from nbformat import v4

    made = v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    # `split` returns text and code by turns, because the pattern has one group.
    for index, part in enumerate(CODE.split(source)):
        if part.strip():
            new_cell = v4.new_code_cell if index % 2 else v4.new_markdown_cell
            made.cells.append(new_cell(part.strip(), id=f"cell-{len(made.cells)}"))
    return made


def execute(made: "NotebookNode", folder: Path) -> None:
    """Run all cells of the notebook in a new kernel, in `folder`, and add the outputs.

    Raises `CellExecutionError` if a cell raises an error.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        made, timeout=300, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    # tqdm, which huggingface_hub imports, warns in a kernel without the package ipywidgets.
    client.execute(env=os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"})


def main() -> None:
    """Build the notebooks that the command line names, or all of them."""
    import nbformat

    # Figures become pictures, which are small, and which every viewer of notebooks can show.
    os.environ["PLOTLY_RENDERER"] = "png"
    for name in sys.argv[1:] or NAMES:
        made = notebook((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
        execute(made, FOLDER)
        # The version of Python, which would change with every build.
        del made.metadata["language_info"]
        nbformat.write(made, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
