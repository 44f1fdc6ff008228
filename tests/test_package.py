"""What users install: the source distribution, the wheel made from it, and both at work."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What is in a working folder, but not in the repository.
IGNORED = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "shared", "__pycache__", "*.egg-info", ".coverage*"),
    *(".hypothesis", ".*_cache"),
)
BUILD = "from setuptools import build_meta; print(build_meta.build_{what}({folder!r}))"
# As if no extra were installed: None makes an import fail, and a search find nothing.
NO_EXTRAS = """
import sys

extras = "transformer_lens transformers gguf google_crc32c plotly ctranslate2 onnxruntime llama_cpp"
sys.modules.update(dict.fromkeys(extras.split()))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in the folder, without this checkout on Python's path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def checked(command: list[str], folder: Path) -> str:
    """The output of a command that must succeed."""
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(what: str, source: Path, folder: Path) -> Path:
    """Build a "wheel" or an "sdist" of the source, as pip would, with the setuptools of here."""
    printed = checked([sys.executable, "-c", BUILD.format(what=what, folder=str(folder))], source)
    return folder / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    """The unpacked source distribution."""
    shutil.copytree(ROOT, folder / "checkout", ignore=IGNORED)
    file = build("sdist", folder / "checkout", folder)
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / file.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(folder: Path, sdist: Path) -> Path:
    """The wheel, which is built from the source distribution."""
    return build("wheel", sdist, folder)


@pytest.fixture(scope="module")
def installed_wheel(folder: Path, wheel: Path) -> Run:
    """Runs a program of a fresh environment, outside of the checkout, that has the wheel.

    What the package depends on is taken from this environment, so that nothing is downloaded.
    """
    venv.create(folder / "environment", symlinks=True)
    scripts = folder / "environment" / "bin"
    paths = {"base": str(folder / "environment"), "platbase": str(folder / "environment")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    (packages / "sitecustomize.py").write_text(NO_EXTRAS, encoding="utf-8")
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
    checked([str(scripts / "python"), "-m", *install, str(wheel)], folder)
    outside = folder / "outside"
    outside.mkdir()

    def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run([str(scripts / program), *arguments], outside)

    where = call("python", "-c", "import clean_transformer; print(clean_transformer.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(packages), where.stdout + where.stderr
    return call


def test_the_sdist_holds_the_repository(sdist: Path):
    """Every file that git tracks; without git, every file of this checkout."""
    try:
        listed = checked(["git", "ls-files"], ROOT).splitlines()
    except (AssertionError, OSError):
        copied = sdist.parent / "checkout"
        listed = [str(file.relative_to(copied)) for file in copied.rglob("*") if file.is_file()]
    assert len(listed) > 100
    missing = [file for file in listed if (ROOT / file).exists() and not (sdist / file).exists()]
    assert not missing


def test_the_tests_run_in_the_sdist(sdist: Path):
    """A fast part of them, which reads the test data, the READMEs and the command line."""
    parts = ("test_config.py", "test_imports.py", "weights/formats", "demo/test_stories.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    checked([*command, *(f"tests/{part}" for part in parts)], sdist)


def test_the_wheel_holds_what_is_no_python(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith(".py")}
        model = [info for info in archive.infolist() if "/demo/model/" in info.filename]
    package = ROOT / "clean_transformer"
    there = {
        str(file.relative_to(ROOT))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".py"
    }
    assert {"clean_transformer/py.typed", "clean_transformer/demo/model/config.json"} <= there
    assert there <= found
    assert not [name for name in found if not name.startswith(("clean_transformer",))]
    assert sum(info.file_size for info in model) < 2.2e6


def test_help_and_version(installed_wheel: Run):
    assert "parity" in installed_wheel("clean-transformer", "--help").stdout
    version = installed_wheel("clean-transformer", "--version")
    assert (version.returncode, version.stdout.split()[-1]) == (0, "0.1.0"), version.stderr
    as_module = installed_wheel("python", "-m", "clean_transformer", "--version")
    assert as_module.stdout == version.stdout


def test_generate(installed_wheel: Run):
    options = ("--weights", "demo", "--device", "cpu")
    done = installed_wheel("clean-transformer", "generate", "Once upon a time", *options)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time, " in done.stdout


def test_doctor(installed_wheel: Run):
    done = installed_wheel("clean-transformer", "doctor", "--weights", "demo", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout


def test_bench(installed_wheel: Run):
    done = installed_wheel("clean-transformer", "bench", "--quick", "--only", "ours")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward 1 × 128" in done.stdout
    assert "NOT MEASURED" not in done.stdout


PLUGIN_TEST = """
import torch
from clean_transformer import MLP, Config

def test_mine(assert_parity):
    cfg = Config(n_layers=1, n_heads=1, d_model=8, d_head=8, d_mlp=16)
    assert_parity(MLP(cfg), torch.randn(1, 3, 8))
"""


def test_pytest_finds_the_plugin(installed_wheel: Run, folder: Path):
    (folder / "outside" / "test_mine.py").write_text(PLUGIN_TEST, encoding="utf-8")
    options = ("-q", "-p", "no:cacheprovider", "--parity-device", "cpu", "test_mine.py")
    done = installed_wheel("python", "-m", "pytest", *options)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_plugin_does_not_import_torch(installed_wheel: Run):
    """Every run of pytest in the environment imports the plugin."""
    code = "import sys, clean_transformer.parity.pytest_plugin; print('torch' in sys.modules)"
    assert installed_wheel("python", "-c", code).stdout.strip() == "False"
