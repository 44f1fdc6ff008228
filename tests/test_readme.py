"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
