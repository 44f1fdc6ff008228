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
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What is in a working folder, but not in the repository.
IGNORED = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "shared", "__pycache__", "*.egg-info", ".coverage*"),
    *(".hypothesis", ".*_cache"),
)
BUILD = "from setuptools import build_meta; print(build_meta.build_{what}({folder!r}))"
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


def required_by(requirements: list[str]) -> set[str]:
    """The names of all packages that the requirements need, and those need in turn."""
    names: set[str] = set()
    while requirements:
        requirement = Requirement(requirements.pop())
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name not in names:
            names.add(requirement.name)
            requirements.extend(distribution(requirement.name).requires or ())
    return names


def link(name: str, packages: Path) -> None:
    """Put links to an installed package, and to its metadata, into a folder of packages."""
    installed = distribution(name)
    for part in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        if not (packages / part).exists():
            (packages / part).symlink_to(Path(str(installed.locate_file(part))))


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

    It has what the wheel requires, and pytest, but no extra. These packages are taken from this
    environment, so that nothing is downloaded.
    """
    venv.create(folder / "environment", symlinks=True)
    scripts = folder / "environment" / "bin"
    paths = {"base": str(folder / "environment"), "platbase": str(folder / "environment")}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    metadata = zipfile.Path(wheel, f"{wheel.name.partition('-py3')[0]}.dist-info/")
    for name in required_by([*(PathDistribution(metadata).requires or ()), "pytest"]):
        link(name, packages)
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install"]
    checked([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], folder)
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


def test_figures_need_an_extra(installed_wheel: Run):
    done = installed_wheel("clean-transformer", "bench", "--figures", "figures")
    assert done.returncode == 2
    assert "pip install 'clean-transformer[plots]'" in done.stderr


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
