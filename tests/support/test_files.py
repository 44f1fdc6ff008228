import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from safetensors.torch import load_file, save_file

from clean_transformer.support.files import (
    atomic_file,
    atomic_folder,
    finish,
    made_folder,
    remove_unfinished,
    require_folder,
    require_output_folder,
    write_atomically,
)
from clean_transformer.weights.load import read_pretrained

from ..helpers import random_model, tiny


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


def test_folders_that_an_error_leaves_empty_are_deleted(tmp_path: Path):
    (tmp_path / "old").mkdir()

    def break_off(folder: Path, *written: str) -> None:
        with made_folder(folder):
            for name in written:
                (folder / name).touch()
            raise KeyboardInterrupt

    for folder in ("old/a/b", "old", "new"):
        with pytest.raises(KeyboardInterrupt):
            break_off(tmp_path / folder)
    assert [*tmp_path.rglob("*")] == [tmp_path / "old"]
    with pytest.raises(KeyboardInterrupt):
        break_off(tmp_path / "new", "file")
    assert (tmp_path / "new/file").exists()


def test_bytes_are_written_as_they_are(tmp_path: Path):
    file = tmp_path / "picture.png"
    write_atomically(file, b"\x89\r\n\x00")
    assert file.read_bytes() == b"\x89\r\n\x00"


def test_a_missing_folder_is_told_before_the_work(tmp_path: Path):
    require_folder(tmp_path / "report.json", None)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere' for 'report.json'"):
        require_folder(None, tmp_path / "nowhere" / "report.json")


@pytest.mark.parametrize(
    ("name", "error"), [("folder", IsADirectoryError), ("protected/report.json", PermissionError)]
)
def test_what_cannot_be_written_is_told_before_the_work(
    name: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "protected").mkdir()
    monkeypatch.setattr("os.access", lambda path, _: "protected" not in str(path))  # root may all
    with pytest.raises(error, match=name.split("/")[0]):
        require_folder(tmp_path / name)


def kill_in_the_middle(folder: Path, seconds: float) -> None:
    """Save a model and a report again and again, in another process, and kill the process."""
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()  # all files have been saved once
    time.sleep(seconds)
    process.kill()
    process.communicate()


SAVING = """
import itertools, json, sys
from pathlib import Path
import numpy
from safetensors.numpy import save_file
from clean_transformer.support.files import atomic_folder, write_atomically

folder = Path(sys.argv[1])
for number in itertools.count():
    print(number, flush=True)
    with atomic_folder(folder) as unfinished:
        save_file({"a": numpy.full(2**18, number)}, unfinished / "model.safetensors")
        (unfinished / "config.json").write_text(json.dumps([number] * 2**14))
    write_atomically(folder / "report.json", json.dumps([number] * 2**16))
"""


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_whole_files_and_the_next_one_tidies_up(times: int, tmp_path: Path):
    generator = random.Random(0)
    for _ in range(times):
        kill_in_the_middle(tmp_path, generator.uniform(0.02, 0.1))
        names = ("model.safetensors", "config.json", "report.json")
        finish(tmp_path)
        numbers = load_file(tmp_path / "model.safetensors")["a"].unique().tolist()
        assert {*numbers} == {*json.loads((tmp_path / "config.json").read_text())}
        assert len(set(json.loads((tmp_path / "report.json").read_text()))) == 1
    write_atomically(tmp_path / "report.json", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_config_and_its_weights_are_replaced_together(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = (random_model(tiny(n_heads=n, d_head=12 // n), seed=n) for n in (3, 2))
    old.save_pretrained(tmp_path)
    replace, done = os.replace, []

    def killed(*paths: Path) -> None:
        if len(done) == moves:
            raise SystemExit
        done.append(replace(*paths))

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(SystemExit) if moves < 2 else nullcontext():
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    cfg, state = read_pretrained(tmp_path, torch.device("cpu"), torch.float64)
    assert cfg.n_heads == 2
    assert state["blocks.0.attn.W_Q"].equal(new.blocks[0].attn.W_Q)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_link_in_place_of_the_finished_files_moves_nothing(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "letter").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".finished").symlink_to(tmp_path / "elsewhere")
    finish(tmp_path / "model")
    assert (tmp_path / "elsewhere" / "letter").exists()


def test_a_folder_in_place_of_a_file_is_refused_and_nothing_is_moved(tmp_path: Path):
    (tmp_path / "b").mkdir()

    def write() -> None:
        with atomic_folder(tmp_path) as unfinished:
            for name in "ab":
                (unfinished / name).touch()

    with pytest.raises(IsADirectoryError, match="is a folder"):
        write()
    assert [*tmp_path.iterdir()] == [tmp_path / "b"]


def test_a_process_that_tidies_up_does_not_take_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []

    def tidied(**options) -> str:
        made.append(mkdtemp(**options))
        if len(made) == 1:
            remove_unfinished(tmp_path)  # as another process can, before the folder is locked
        return made[-1]

    monkeypatch.setattr("clean_transformer.support.files.mkdtemp", tidied)
    write_atomically(tmp_path / "report.json", "text")
    assert (tmp_path / "report.json").read_text() == "text"
    assert len(made) == 2


def test_what_another_process_still_writes_stays(tmp_path: Path):
    with atomic_file(tmp_path / "report.json") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "report.json") as second:
            second.write_text("second")
        assert (tmp_path / "report.json").read_text() == "second"
    assert (tmp_path / "report.json").read_text() == "first"
    assert [*tmp_path.iterdir()] == [tmp_path / "report.json"]


def test_a_link_stays_and_its_file_is_written(tmp_path: Path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "report.json"
    link.symlink_to("there/report.json")
    for content in ("new file", "old file"):
        require_folder(link)
        write_atomically(link, content)
        assert link.is_symlink()
        assert (tmp_path / "there/report.json").read_text() == content


def test_a_pipe_gets_the_content_and_stays(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    require_folder(pipe)
    write_atomically(pipe, "text")
    assert reader.communicate()[0] == b"text"
    assert pipe.is_fifo()


@pytest.mark.parametrize("to_a_file", [False, True])
def test_standard_output_gets_the_content(to_a_file: bool, tmp_path: Path):
    script = (
        "from pathlib import Path; from clean_transformer.support.files import *;"
        "require_folder(Path('/dev/stdout')); print('before', flush=True);"
        "write_atomically(Path('/dev/stdout'), 'text\\n')"
    )
    with (tmp_path / "out").open("w") as file:
        output = file if to_a_file else subprocess.PIPE
        process = subprocess.run([sys.executable, "-c", script], stdout=output, check=True)
        same = os.fstat(file.fileno()).st_ino == (tmp_path / "out").stat().st_ino
    assert same
    printed = (tmp_path / "out").read_bytes() if to_a_file else process.stdout
    assert printed.endswith(b"text\n")
    assert Path("/dev/stdout").is_symlink()


def test_permissions_are_kept_and_those_of_new_files_are_alike(tmp_path: Path):
    (tmp_path / "plain").touch()
    with atomic_folder(tmp_path / "model") as unfinished:
        for name in "ab":
            (unfinished / name).touch(mode=0o600)
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "model/a", "model/b")}
    assert len(modes) == 1
    (tmp_path / "plain").chmod(0o640)
    write_atomically(tmp_path / "plain", "new")
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o640


FULL = {
    "python": lambda file: file.write_bytes(bytes(2**20)),
    "safetensors": lambda file: save_file({"a": torch.zeros(2**18)}, file),
    "torch": lambda file: torch.save(torch.zeros(2**18), file),
}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 64 KiB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_is_named_and_leaves_the_old_file(writer: str, tmp_path: Path, full_disk: None):
    file = tmp_path / "model"
    file.write_text("old")

    def write() -> None:
        with atomic_file(file) as unfinished:
            FULL[writer](unfinished)

    cause = "Input/output error" if writer == "torch" else "File too large"
    with pytest.raises(OSError, match=rf"{cause}: '{re.escape(str(file))}'$"):
        write()
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_a_model_saved_on_a_full_disk_leaves_nothing(tmp_path: Path, full_disk: None):
    model = random_model(tiny(d_vocab=2000))
    with pytest.raises(OSError, match=f"File too large: '{re.escape(str(tmp_path))}"):
        model.save_pretrained(tmp_path / "runs/model")
    assert not [*tmp_path.iterdir()]


def test_two_results_in_one_file_are_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to("report")
    require_folder(tmp_path / "report", tmp_path / "other")
    require_folder(Path("/dev/stdout"), Path("/dev/stdout"))
    with pytest.raises(ValueError, match="two results cannot be written to the same file"):
        require_folder(tmp_path / "report", None, tmp_path / "link")


def test_a_folder_for_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    require_output_folder(tmp_path)
    require_output_folder(tmp_path / "new/folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for inside in ("file", "file/new"):
        with pytest.raises(NotADirectoryError, match="file' is a file; give the name of a folder"):
            require_output_folder(tmp_path / inside)
    monkeypatch.setattr(os, "access", lambda path, right: False)
    with pytest.raises(PermissionError, match="this user may not write in"):
        require_output_folder(tmp_path / "new")
