"""Counts the cells of notebooks for TransformerLens that run here as they are.

The script runs notebooks that were written for `HookedTransformer` or `TransformerBridge`, such as
TransformerLens's demos. It changes only the construction of the model: with `--reference`, the
model is a `HookedTransformer`, otherwise a `DemoTransformer`, both with the same weights. A run
with `--reference` says which cells can work at all: some need a package or a download.

    python -m benchmarks.walkthroughs Main_Demo.ipynb --weights gpt2
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.hooked_transformer import plain_model

if TYPE_CHECKING:
    from nbformat import NotebookNode

CONSTRUCTION = re.compile(
    r"(?<!`)\b(HookedTransformer(\.from_pretrained)?|TransformerBridge\.boot_transformers)(?=\()"
)
# Installs packages, or changes the model that was constructed.
LEFT_OUT = re.compile(r"^( *)(%pip|!|\w+\.enable_compatibility_mode\().*$", re.MULTILINE)
# The arguments of `from_pretrained` that change the weights, and TransformerLens's defaults.
PROCESSING = dict.fromkeys(
    ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True
)


def changed(cell: str) -> str:
    """Return the source of a cell that constructs its models with `construct`."""
    return LEFT_OUT.sub(r"\1pass", CONSTRUCTION.sub("construct", cell))


def construct(weights: str, reference: bool, *arguments: Any, **flags: Any) -> Any:
    """Return a model with `weights`, in the place of the one that a notebook constructs.

    If the notebook gives a configuration, the model has as many blocks as that.
    """
    chosen = {name: flags.get(name, default) for name, default in PROCESSING.items()}
    model = DemoTransformer.from_pretrained(weights, device="cpu", **chosen)
    n_layers = getattr([*arguments, None][0], "n_layers", model.cfg.n_layers)
    model.blocks, model.cfg = model.blocks[:n_layers], replace(model.cfg, n_layers=n_layers)
    if not reference:
        return model
    from transformers import AutoTokenizer

    hooked = plain_model(model.cfg, model.state_dict(), model.device)
    hooked.set_tokenizer(AutoTokenizer.from_pretrained(weights))
    return hooked


def setup(weights: str, reference: bool) -> str:
    """Return the source of a first cell, which defines `construct` for the cells of a notebook."""
    return (
        "from functools import partial\n"
        "from plotly.basedatatypes import BaseFigure\n"
        "from benchmarks import walkthroughs\n"
        f"construct = partial(walkthroughs.construct, {weights!r}, {reference})\n"
        "BaseFigure.show = lambda *_, **__: None  # a picture needs a browser\n"
        "del partial, BaseFigure, walkthroughs\n"
        "%load_ext autoreload"
    )


def run(path: Path, weights: str, reference: bool) -> list[str | None]:
    """Run a notebook, and return the error of each cell of code. None: the cell has run.

    A cell that fails does not end the run.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.source = changed(cell.source)
    first = nbformat.v4.new_code_cell(setup(weights, reference))
    notebook.cells = [first, *cells]
    NotebookClient(notebook, timeout=None, allow_errors=True).execute()
    if error(first):
        raise RuntimeError(error(first))
    return [error(cell) for cell in cells]


def error(cell: "NotebookNode") -> str | None:
    """Return the name and the message of the error that a cell raised, or None."""
    raised = [each for each in cell.outputs if each.output_type == "error"]
    return f"{raised[0].ename}: {raised[0].evalue}" if raised else None


def main(
    notebooks: Annotated[list[Path], typer.Argument(exists=True, help="The notebooks to run.")],
    weights: Annotated[str, typer.Option(help="A folder or a hub id of GPT-2 weights.")] = "gpt2",
    reference: Annotated[bool, typer.Option(help="Run TransformerLens's model.")] = False,
) -> None:
    """Print how many cells of each notebook run, and the errors of the others."""
    for notebook in notebooks:
        errors = run(notebook, weights, reference)
        failed = {index: error for index, error in enumerate(errors) if error is not None}
        print(f"{notebook.stem}: {len(errors) - len(failed)} of {len(errors)} cells run")
        for index, error in failed.items():
            print(f"  cell {index}: {error.splitlines()[0]}")


if __name__ == "__main__":
    typer.run(main)
