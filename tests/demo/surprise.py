"""The entropy of the stories, for comparison with the loss of a model."""

import math
from collections.abc import Iterator

from clean_transformer.demo import stories


def surprise(text: str) -> float:
    """−log of the probability that `stories.generate` writes this text, in nats.

    It is inf for a text that is not a story. Its mean over stories is their entropy: no model can
    have a lower loss.
    """
    ways = [choices for rest, _, choices in _read("{story}", text, {}) if not rest]
    return -math.log(sum(1 / choices for choices in ways)) if ways else math.inf


def _read(line: str, text: str, facts: dict[str, str]) -> Iterator[tuple[str, dict[str, str], int]]:
    """As `stories._read`, and also the number of equally likely draws of each way."""
    found = stories.SYMBOL.search(line)
    literal = line[: found.start()] if found else line
    if not text.startswith(literal):
        return
    text = text[len(literal) :]
    if found is None:
        yield text, facts, 1
        return
    symbol = found[1]
    lines = [facts[symbol]] if symbol in facts else stories.RULES[symbol]
    for choice in lines:
        for rest, known, drawn in _read(choice, text, facts):
            if symbol in stories.FACTS:
                known = known | {symbol: text[: len(text) - len(rest)]}
            for left, all_facts, later in _read(line[found.end() :], rest, known):
                yield left, all_facts, len(lines) * drawn * later
