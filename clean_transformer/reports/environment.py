"""Describes the software, the processor and the settings with which a report was made."""

import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

# The environment variables that a report records. They choose kernels, their precision, or the
# number of threads.
VARIABLES = re.compile(
    r"(ATEN_CPU|BLIS|CUBLAS|CUDA(?!_HOME|_PATH)|DNNL|GOMP|KMP|MKL|NVIDIA|OMP|ONEDNN|OPENBLAS"
    r"|PYTORCH|TORCH(?!_HOME)|VECLIB)_\w+"
)
# By type of device: the environment variables that set the precision of float32 products. oneDNN
# has two names for one variable; the first name that is set decides.
FPMATH = {
    "cpu": ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    "cuda": ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
}
# The values of settings that do not lower the precision of float32 products.
FULL_PRECISION = ("none", "ieee", "highest", "False", "0", "STRICT")
# How the values of other settings begin if nobody changed them.
DEFAULTS = {
    "deterministic algorithms": "False",
    "onednn enabled": "True",
    "attention kernels": "flash, mem_efficient, math",
}
# The values of a key that a report does not have: of an environment variable, and of another key.
NOT_SET, NOT_RECORDED = "not set", "not recorded"


def environment() -> dict[str, str]:
    """Return what can change a result: versions, build, processor, threads, and settings.

    The result also has the environment variables whose names match the regular expression
    `VARIABLES`, such as OMP_NUM_THREADS.
    """
    build = torch.__config__.show()
    found = {
        "torch": torch.__version__,
        "blas": _first(r"BLAS_INFO=(\w+)", build),
        "mkl": _first(r"Math Kernel Library Version ([\d.]+)", build),
        "onednn": _first(r"MKL-DNN v([\d.]+)", build),
        "build": " ".join(
            re.findall(r"\b(?:COMMIT_SHA|BUILD_TYPE|USE_\w+|PERF_WITH_\w+)=\w+|GCC [\d.]+", build)
        ),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "transformer_lens": _version("transformer_lens"),
        "transformers": _version("transformers"),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "onednn enabled": str(getattr(torch.backends.mkldnn, "enabled", True)),
        "attention kernels": ", ".join(
            kind
            for kind in ("flash", "mem_efficient", "math", "cudnn")
            if getattr(torch.backends.cuda, f"{kind}_sdp_enabled", bool)()
        ),
    } | float32_precision("cpu")
    return found | {key: value for key, value in sorted(os.environ.items()) if VARIABLES.match(key)}


def build_lines(found: Mapping[str, str]) -> list[str]:
    """Return one to three lines that describe the result of `environment()`.

    The first line has the versions, the processor's instructions, and the operating system. If the
    program has changed settings, a line lists them. If environment variables matter, a line lists
    them.
    """
    libraries = [
        f"{name} {found[key]}"
        for name, key in (("MKL", "mkl"), ("oneDNN", "onednn"))
        if found.get(key)
    ]
    # Without MKL, PyTorch does not say the version of its BLAS.
    libraries = libraries if found.get("mkl") else [f"BLAS {found.get('blas')}", *libraries]
    line = (
        f"PyTorch {found.get('torch')} ({', '.join(libraries)}), {found.get('isa')}, "
        f"{found.get('threads')} threads, {found.get('system')}"
    )
    changed = [
        f"{key} = {value or 'none'}"
        for key, value in found.items()
        if not key.isupper()
        and (
            not value.startswith(DEFAULTS[key])
            if key in DEFAULTS
            else key.startswith("torch.") and value not in FULL_PRECISION
        )
    ]
    variables = [f"{key}={value}" for key, value in found.items() if VARIABLES.match(key)]
    return [
        line,
        *([f"Settings: {'; '.join(changed)}"] if changed else []),
        *([f"Set: {', '.join(variables)}"] if variables else []),
    ]


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return (key, old value, new value) for each key whose value differs.

    The value of the key "build" has many words. Only the words that differ are returned.
    """
    found = []
    for key in dict.fromkeys([*before, *after]):
        missing = NOT_SET if key.isupper() else NOT_RECORDED
        old, new = before.get(key, missing), after.get(key, missing)
        if key == "build" and key in before and key in after:
            words, others = old.split(), new.split()
            old = " ".join(word for word in words if word not in others)
            new = " ".join(word for word in others if word not in words)
        if old != new:
            found.append((key, old, new))
    return found


def device_settings(device: torch.device) -> dict[str, str]:
    """Return the settings that change how precisely `device` multiplies float32 numbers.

    On CUDA, the result also has the name of the GPU and the versions of CUDA and cuDNN.
    """
    settings = float32_precision(device.type)
    if device.type == "cuda":
        settings |= {
            "name": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    return settings


def float32_precision(device_type: str) -> dict[str, str]:
    """Return the settings that can lower the precision of float32 products on a type of device.

    The result maps names, such as "torch.backends.cuda.matmul.fp32_precision", to values.
    """
    setting = _precision_setting(device_type)
    settings = {setting.name: str(setting.read())} if setting else {}
    variables = FPMATH.get(device_type, ())
    return settings | {key: os.environ[key] for key in variables if key in os.environ}


def lowered_precision() -> dict[str, str]:
    """Return the settings of this process that lower the precision of float32 products.

    Settings of CUDA are left out if this machine has no CUDA.
    """
    types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    settings = {key: value for kind in types for key, value in float32_precision(kind).items()}
    return {key: value for key, value in settings.items() if value not in FULL_PRECISION}


@contextmanager
def full_float32_precision(device_type: str) -> Iterator[None]:
    """Inside a `with` block, multiply float32 numbers in float32 and not, for example, in TF32.

    This changes PyTorch's setting. It cannot change the effect of environment variables, which
    libraries read only once.
    """
    setting = _precision_setting(device_type)
    if setting is None:
        yield
        return
    before = setting.read()
    setting.write(setting.full)
    try:
        yield
    finally:
        setting.write(before)


class _Setting(NamedTuple):
    """A setting of PyTorch. With the value `full`, float32 products keep their precision."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    full: str | bool


def _precision_setting(device_type: str) -> _Setting | None:
    """Return PyTorch's setting of the precision of float32 products, or None if it has none."""
    backend = {"cpu": "mkldnn", "cuda": "cuda"}.get(device_type, "")
    owner = getattr(getattr(torch.backends, backend, None), "matmul", None)
    full: str | bool
    for attribute, full in (("fp32_precision", "ieee"), ("allow_tf32", False)):
        if hasattr(owner, attribute):
            name = f"torch.backends.{backend}.matmul.{attribute}"
            return _Setting(
                name, partial(getattr, owner, attribute), partial(setattr, owner, attribute), full
            )
    if device_type != "cpu":
        return None
    # Before torch 2.9, the CPU has no setting of its own.
    read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    return _Setting("torch.get_float32_matmul_precision()", read, write, "highest")


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
