"""Reads the architecture and the parameters from a checkpoint in any known format.

The known formats are the `Format` objects that the modules in the folder `formats/` define.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.support.files import finish
from clean_transformer.weights import formats
from clean_transformer.weights.hub import FileSets, complete_set, fetch
from clean_transformer.weights.infer import infer_config
from clean_transformer.weights.refusals import WeightsError, refuse_unreal
from clean_transformer.weights.table import Folder, Format, State, detect, plain_names


def discover() -> Iterator[Format]:
    """Yield every `Format` object that a module in the folder `formats/` defines or imports."""
    for module in iter_modules(formats.__path__):
        contents = vars(import_module(f"{formats.__name__}.{module.name}"))
        yield from (value for value in contents.values() if isinstance(value, Format))


# If one module defines a format and another module imports it, `discover` yields the format twice.
# The dictionary has one entry per name, so FORMATS has each format once.
FORMATS = tuple({known.name: known for known in discover()}.values())


# Maps each suffix of a format that is stored in a single file to the format's `File`.
FILES = {suffix: known.file for known in FORMATS if known.file for suffix in known.file.suffixes}


# The formats that are stored in folders, as pairs (`Folder`, `Format`), highest priority first.
FOLDERS = sorted(
    ((known.folder, known) for known in FORMATS if known.folder),
    key=lambda pair: pair[0].priority,
    reverse=True,
)


# The alternative sets of files that `fetch` looks for. The preferred set comes first.
WEIGHTS: FileSets = tuple(files for folder, _ in FOLDERS for files in folder.file_sets)


def read_pretrained(
    source: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """Return the architecture of a model, and its parameters under this package's names.

    `source` is a folder, a file, a Hugging Face hub id ("owner/name"), an alias such as "gpt2", or
    "demo", the model in this package. The parameters are on `device` and have the dtype `dtype`. If
    a tensor in the checkpoint already has this device and dtype, the parameter is a view of the
    memory-mapped file, not a copy.

    Raises `WeightsError` for a damaged file or for weights that do not fit the architecture, and
    `FileNotFoundError` for missing files. Raises `ValueError` for an unknown `source`, and
    `HubError` if the download fails.
    """
    path = Path(source)
    if path.is_file() or (path.suffix in FILES and not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.suffix not in FILES:
            raise WeightsError(
                f"{path} is not a {' or '.join(FILES)} file; pass the folder that contains it"
            )
        read, known = FILES[path.suffix].read, None
    else:
        path = fetch(source, WEIGHTS)
        finish(path)
        folder, known = _choose_folder(path)
        read = folder.read
    try:
        cfg, state = read(path)
        return _parameters(known, cfg, state, device, dtype)
    except FileNotFoundError:
        raise
    except Exception as error:  # what a stranger's file holds can raise every kind of exception
        if isinstance(error, WeightsError) and str(path) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise WeightsError(f"{path}: {kind}{error}") from error


def _parameters(
    known: Format | None, cfg: Config | None, state: State, device: torch.device, dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """Check the tensors of a checkpoint. Return the architecture and the converted parameters."""
    known = known or detect(FORMATS, state)
    state = known.full_names(plain_names(state))
    cfg = cfg or infer_config(known, state)
    known.read(cfg, state)
    parameters = {row.theirs: state[row.theirs] for row in known.rows(cfg) if row.theirs}
    refuse_unreal(parameters)
    return cfg, known.read(
        cfg, {key: tensor.to(device, dtype) for key, tensor in parameters.items()}
    )


def _choose_folder(path: Path) -> tuple[Folder, Format]:
    """Return the `Folder` and `Format` objects for the checkpoint in the folder `path`.

    This function chooses the format with the highest priority whose files are all in the folder.
    Raises `FileNotFoundError` if the folder has no file that describes an architecture, such as
    config.json.
    """
    names = os.listdir(path)
    # If no format has all its files, we take a format whose first file exists. Later, the format's
    # `Folder.read` raises an error that names the missing file.
    complete = [pair for pair in FOLDERS if complete_set(pair[0].file_sets, names)]
    begun = [pair for pair in FOLDERS if any(files[0] in names for files in pair[0].file_sets)]
    if not (complete or begun):
        first = dict.fromkeys(files[0] for files in WEIGHTS)
        raise FileNotFoundError(f"{path} has no {' or '.join(first)}; is it the folder of a model?")
    return (complete or begun)[0]


def read_state_dict(state: State, cfg: Config | None = None) -> tuple[Config, dict[str, Tensor]]:
    """Return the architecture of a state dict, and its parameters under this package's names.

    This function recognizes the format of the state dict by its keys (see `detect`). If `cfg` is
    None, the function infers the architecture from the shapes (see `infer_config`). Raises
    `WeightsError` for an unknown format, and if the keys or shapes do not fit the architecture.
    """
    known = detect(FORMATS, state)
    state = known.full_names(plain_names(state))
    cfg = cfg or infer_config(known, state)
    return cfg, known.read(cfg, state)
