from pathlib import Path

import pytest

from clean_transformer.files import write_atomically


def test_the_text_is_in_the_file_and_nothing_else_is_left(tmp_path: Path):
    file = tmp_path / "report.json"
    write_atomically(file, "old")
    write_atomically(file, "new ×")
    assert file.read_text(encoding="utf-8") == "new ×"
    assert [*tmp_path.iterdir()] == [file]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "report.json"
    write_atomically(file, "old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]
