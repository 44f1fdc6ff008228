"""The command `clean-transformer notebook`."""

import json
from pathlib import Path
from typing import Annotated

import typer

FOLDER = Path(__file__).parents[1] / "notebooks"


def notebook(
    name: Annotated[
        str | None, typer.Argument(help="The notebook to copy. Without a name, all are listed.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Copy it into this folder.")] = Path("."),
) -> None:
    """List the example notebooks, or copy one of them, to open it in Jupyter.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    files = {file.stem: file for file in sorted(FOLDER.glob("*.ipynb"))}
    if name is None:
        width = max(map(len, files))
        for each, file in files.items():
            print(f"{each:{width}}  {title(file)}")
        print("\n`clean-transformer notebook NAME` copies one of them into this folder.")
        return
    if name not in files:
        raise ValueError(f"no notebook is called {name!r}; choose from {', '.join(files)}")

    from clean_transformer.support.files import require_folder, write_atomically

    copy = to / files[name].name
    require_folder(copy)
    if copy.exists():
        raise ValueError(f"{copy} exists; move it away, or copy to another folder with --to")
    write_atomically(copy, files[name].read_bytes())
    print(f"wrote {copy}; open it with `jupyter lab {copy}`, and run its cells")


def title(file: Path) -> str:
    """Return the heading of a notebook: the first line of its first cell."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
