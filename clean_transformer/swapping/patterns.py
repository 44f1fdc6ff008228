"""`matching`: finds the modules of a model whose paths match a pattern."""

import difflib
import re

from torch import nn

from clean_transformer.config import Config
from clean_transformer.modules.contract import parts
from clean_transformer.swapping.libraries.base import Library
from clean_transformer.swapping.trial import SwapError


def matching(home: Library, model: nn.Module, cfg: Config, pattern: str) -> dict[str, nn.Module]:
    """Return the modules of `model` whose paths match a pattern, such as "blocks.*.mlp", by path.

    Raises `SwapError` if no path matches, or if the pattern is not a string.
    """
    if not isinstance(pattern, str):
        raise SwapError(f"the pattern {pattern!r} is not a string such as 'blocks.*.mlp'")
    words = [re.escape(word) for word in pattern.split(".")]
    for place, word in enumerate(pattern.split(".")):
        if word == "*":
            words[place] = r"[^.]+"
        elif layers := re.fullmatch(r"\[(\d{1,9})-(\d{1,9})\]", word):
            inside = range(int(layers[1]), min(int(layers[2]) + 1, cfg.n_layers))
            words[place] = "|".join(map(str, inside)) or "(?!)"
    wanted = re.compile(r"\.".join(f"({word})" for word in words))
    every = {path: home.find(model, path) for path in parts(cfg.n_layers)}
    known = {path: part for path, part in every.items() if part is not None}
    found = {path: part for path, part in known.items() if wanted.fullmatch(path)}
    if not found:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
        raise SwapError(
            f"{pattern!r} matches nothing in this model of {cfg.n_layers} layers; did you mean one "
            f"of {near}? Examples of patterns: 'embed', 'blocks.3', 'blocks.*.attn', "
            "'blocks.[3-7].mlp', 'ln_final'"
        )
    return found
