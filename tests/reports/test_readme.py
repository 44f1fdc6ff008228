"""The READMEs of these rooms print what they say that they print."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import clean_transformer

ROOMS = Path(clean_transformer.__file__).parent


@pytest.mark.parametrize("room", ["analysis", "reports"])
def test_a_text_block_after_a_python_block_is_its_output(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (ROOMS / room / "README.md").read_text(encoding="utf-8")
    pairs = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", readme, re.DOTALL)
    assert any(told for _, told in pairs)
    names: dict[str, object] = {}
    for code, told in pairs:
        output = StringIO()
        with redirect_stdout(output):
            exec(compile(code, f"{room}/README.md", "exec"), names)
        if told:
            assert [line.rstrip() for line in output.getvalue().splitlines()] == told.splitlines()
