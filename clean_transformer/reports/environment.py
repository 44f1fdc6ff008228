"""Describes the software, the processor and the settings with which a report was made."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torch


def environment() -> dict[str, str]:
    """Return the versions of Python, packages and math libraries, and the kind of machine."""
    build = torch.__config__.show()
    libraries = re.findall(
        r"(BLAS_INFO=\w+|Intel\(R\) oneAPI Math Kernel Library|MKL-DNN v[\d.]+)", build
    )
    return {
        "torch": torch.__version__,
        "libraries": ", ".join(dict.fromkeys(libraries)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "transformer_lens": _version("transformer_lens"),
        "transformers": _version("transformers"),
    }


def device_settings(device: torch.device) -> dict[str, str]:
    """Return the settings that change how precisely `device` computes.

    On CUDA, the result also has the name of the GPU and the version of CUDA.
    """
    settings = {"float32 matmul precision": torch.get_float32_matmul_precision()}
    if device.type == "cuda":
        settings |= {
            "name": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "allow_tf32": str(torch.backends.cuda.matmul.allow_tf32),
            "cudnn.allow_tf32": str(torch.backends.cudnn.allow_tf32),
        }
    return settings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
