"""Counts the cells of notebooks for TransformerLens that run here as they are.

The script runs notebooks that were written for `HookedTransformer` or `TransformerBridge`, such as
TransformerLens's demos. It changes only the construction of the model: with `--reference`, the
model is a `HookedTransformer`, otherwise a `DemoTransformer`, both with the same weights. A run
with `--reference` says which cells can work at all: some need a package or a download.

    python -m benchmarks.walkthroughs Main_Demo.ipynb --weights gpt2
"""

import contextlib
import io
import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.hooked_transformer import plain_model

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


def run(notebook: Path, weights: str, reference: bool) -> list[str | None]:
    """Run a notebook, and return the error of each cell of code. None: the cell has run.

    A cell that fails does not end the run.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from plotly.basedatatypes import BaseFigure

    BaseFigure.show = lambda *_, **__: None
    shell: Any = InteractiveShell.instance()
    shell.extension_manager.load_extension("autoreload")
    shell.user_ns["construct"] = partial(construct, weights, reference)
    errors = list[str | None]()
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = shell.run_cell(changed("".join(cell["source"])))
        error = result.error_before_exec or result.error_in_exec
        errors.append(None if error is None else f"{type(error).__name__}: {error}")
    return errors


def main(
    notebooks: Annotated[list[Path], typer.Argument(exists=True, help="The notebooks to run.")],
    weights: Annotated[str, typer.Option(help="A folder or a hub id of GPT-2 weights.")] = "gpt2",
    reference: Annotated[bool, typer.Option(help="Run TransformerLens's model.")] = False,
) -> None:
    """Print how many cells of each notebook run, and the errors of the others."""
    for notebook in notebooks:
        # A notebook changes global settings, so each one has a process of its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            errors = process.submit(run, notebook, weights, reference).result()
        failed = {index: error for index, error in enumerate(errors) if error is not None}
        print(f"{notebook.stem}: {len(errors) - len(failed)} of {len(errors)} cells run")
        for index, error in failed.items():
            print(f"  cell {index}: {error.splitlines()[0]}")


if __name__ == "__main__":
    typer.run(main)
