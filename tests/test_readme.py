"""The READMEs: their Python runs and prints what they say, their links lead somewhere."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from .helpers import needs_torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clean_transformer"
ROOMS = sorted(file.parent for file in PACKAGE.glob("*/__init__.py"))
READMES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (
        *(ROOT / name for name in ("README.md", "benchmarks/README.md", ".github/CONTRIBUTING.md")),
        *sorted(PACKAGE.rglob("README.md")),
    )
}
# Each block of Python, and the text block right after it, or "".
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
BLOCKS = {name: found for name, text in READMES.items() if (found := BLOCK.findall(text))}
# [text](target), but no image's source and no address in the web.
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")


# They show a known issue since 2.8, and text that was drawn with the random numbers of 2.8.
NEWER = {f"clean_transformer/{room}/README.md" for room in ("parity", "text")}
NEEDS = needs_torch("2.8", "the output is another")


@pytest.mark.parametrize(
    "readme", [pytest.param(each, marks=NEEDS if each in NEWER else ()) for each in BLOCKS]
)
def test_the_python_prints_the_text_after_it(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All blocks of a README are one script, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    names: dict[str, object] = {"__name__": "__main__"}
    for code, told in BLOCKS[readme]:
        output = StringIO()
        with redirect_stdout(output):
            exec(compile(code, readme, "exec"), names)
        if told:
            printed = "".join(f"{line.rstrip()}\n" for line in output.getvalue().splitlines())
            assert as_pattern(told).fullmatch(printed), f"printed:\n{printed}\ntold:\n{told}"


def as_pattern(told: str) -> re.Pattern[str]:
    """The text, where "…" stands for any characters, and a line "…" for any lines."""
    lines = (
        "(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + "\n"
        for line in told.splitlines()
    )
    return re.compile("".join(lines))


def test_dots_stand_for_characters_and_for_lines():
    assert as_pattern("a … c\n…\nd\n").fullmatch("a b c\n1\n2\nd\n")
    assert as_pattern("a\n…\nd\n").fullmatch("a\nd\n")
    assert not as_pattern("a … c\n").fullmatch("a b\n c\n")
    assert not as_pattern("a\n").fullmatch("ab\n")


def test_the_front_page_has_examples():
    assert len(BLOCKS["README.md"]) >= 3


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_each_room_has_a_readme(room: Path):
    assert (room / "README.md").is_file()


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme: str):
    for link in LINK.findall(READMES[readme]):
        path, _, anchor = link.partition("#")
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), f"{readme} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(as_anchor, headings), f"{readme} links to {link}"


def as_anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_front_page_is_short():
    assert len(READMES["README.md"].splitlines()) <= 250
