"""How many tokens a piece of work has, and how work and values are written for people."""

import pytest

from clean_transformer.benchmark.work import Part, Work, format_value

from .made_up import part


@pytest.mark.parametrize(
    ("work", "tokens", "name"),
    [
        (Work(kind="forward", batch=4, length=256), 1024, "forward 4 × 256, all logits"),
        (Work(kind="forward", length=8, last_only=True), 8, "forward 1 × 8, last logits"),
        (Work(kind="generate", batch=2, length=16, new=64), 128, "generate 2 × 16 + 64"),
        (Work(kind="generate", length=16, new=1), 0, "first token after 1 × 16"),
        (Work(kind="step", batch=3, length=100, new=16), 3, "decode step after 3 × 100"),
        (Work(kind="capture", batch=2, length=4), 8, "capture 2 × 4"),
        (Work(kind="train", batch=2, length=4), 8, "train 2 × 4"),
        (Work(kind="first_use"), 0, "first use"),
    ],
)
def test_tokens_and_names(work: Work, tokens: int, name: str):
    assert work.tokens == tokens
    assert str(work) == name


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (1.234, "load", "1.23 s"),
        (0.01234, "load", "12.3 ms"),
        (1.234e9, "memory", "1,234 MB"),
        (6.2e-3, "divergence", "0.0062 nats"),
    ],
)
def test_values_have_units(value: float, kind: str, said: str):
    assert format_value(value, Work(kind=kind)) == said


def test_the_same_work_by_another():
    mine = part("ours", "bfloat16")
    assert mine.by("limit") == part("limit", "bfloat16")
    assert mine.by("limit", "float32") == Part(part("limit").setup, mine.work)
