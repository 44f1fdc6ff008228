"""The READMEs: their Python runs, their links lead somewhere, and each room has one."""

import re
from pathlib import Path

import pytest

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
BLOCKS = {
    name: found
    for name, text in READMES.items()
    if (found := re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
}
# [text](target), but no image's source and no address in the web.
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")


@pytest.mark.parametrize("readme", BLOCKS)
def test_the_python_runs(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All blocks of a README are one script, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(BLOCKS[readme]), readme, "exec"), {"__name__": "__main__"})


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
