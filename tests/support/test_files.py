from pathlib import Path

import pytest

from clean_transformer.support.files import (
    atomic_file,
    atomic_folder,
    remove_unfinished,
    require_folder,
    write_atomically,
)


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


def test_files_appear_together_beside_those_of_other_names(tmp_path: Path):
    folder = tmp_path / "new/folder"
    for content in ("old", "new"):
        with atomic_folder(folder) as unfinished:
            (unfinished / "a").write_text(content)
            (unfinished / content).touch()
            assert not (folder / content).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "new", "old"]
    assert (folder / "a").read_text() == "new"


def test_files_that_were_not_finished_never_appear(tmp_path: Path):
    (tmp_path / "a").write_text("old")

    def break_off() -> None:
        with atomic_folder(tmp_path) as unfinished:
            (unfinished / "a").write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]
    assert (tmp_path / "a").read_text() == "old"


def test_bytes_are_written_as_they_are(tmp_path: Path):
    file = tmp_path / "picture.png"
    write_atomically(file, b"\x89\r\n\x00")
    assert file.read_bytes() == b"\x89\r\n\x00"


def test_a_missing_folder_is_told_before_the_work(tmp_path: Path):
    require_folder(tmp_path / "report.json", None)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere' for 'report.json'"):
        require_folder(None, tmp_path / "nowhere" / "report.json")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path):
    (tmp_path / "report.json").touch()
    with pytest.MonkeyPatch.context() as patch, atomic_file(tmp_path / "report.json") as unfinished:
        patch.setattr("os.replace", lambda *paths: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        unfinished.touch()
    assert len([*tmp_path.iterdir()]) == 2
    remove_unfinished(tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "report.json"]
