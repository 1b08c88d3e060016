"""What of fastlab works on this machine, and why the rest does not."""

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import fastlab
from fastlab.dataset.formats import FFCV_MISSING
from fastlab.errors import first_line

_VERSIONS = ("torch", "torchvision", "accelerate", "numpy", "numba", "simplejpeg", "webdataset")


class Finding(NamedTuple):
    group: str
    name: str
    usable: bool
    detail: str


def examine() -> list[Finding]:
    """Every finding, in the order in which to print them. Imports all engines."""
    return [*_versions(), *_devices(), *_engines(), *_extras()]


def table(findings: list[Finding]) -> str:
    lines, group = [], ""
    for found in findings:
        if found.group != group:
            lines += ["", found.group] if lines else [found.group]
            group = found.group
        lines.append(
            f"  {found.name:<13}{'yes' if found.usable else 'no ':<5}{found.detail}".rstrip()
        )
    return "\n".join(lines)


def _versions() -> list[Finding]:
    found = [
        Finding("versions", "fastlab", True, fastlab.__version__),
        Finding("versions", "python", True, platform.python_version()),
    ]
    return found + [_installed(name) for name in _VERSIONS]


def _installed(name: str) -> Finding:
    try:
        return Finding("versions", name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("versions", name, False, f"not installed; `pip install {name}`")


def _devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    found = [Finding("devices", "cpu", True, f"{cores} cores, {platform.machine()}")]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found.append(Finding("devices", "cuda", True, ", ".join(names)))
    elif torch.version.cuda is None:
        found.append(Finding("devices", "cuda", False, "this torch is built without CUDA"))
    else:
        detail = f"torch is built for CUDA {torch.version.cuda}, but finds no device or driver"
        found.append(Finding("devices", "cuda", False, detail))
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    detail = compiler or "needs a C++ compiler: install g++, or set train.compile = false"
    found.append(Finding("devices", "compile", compiler is not None, f"torch.compile: {detail}"))
    bf16 = torch.cuda.is_available() or has_bf16()
    detail = "in hardware" if bf16 else "works, but not in hardware: slower than fp32"
    return [*found, Finding("devices", "bf16", bf16, detail)]


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 matrices."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _engines() -> list[Finding]:
    return [
        Finding("engines", "resident", True, "reads the array format"),
        Finding("engines", "torchvision", True, "reads the tar format"),
        _import("ffcv", "ffcv", "reads the ffcv format", FFCV_MISSING),
        _import(
            "dali",
            "nvidia.dali",
            "reads the tar format",
            'DALI is not installed here; `pip install "fastlab[dali]"`',
        ),
    ]


def _import(name: str, module: str, usable: str, missing: str, group: str = "engines") -> Finding:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            return Finding(group, name, False, missing)
        return _broken(group, name, error)
    except Exception as error:  # a library is missing or of another version: anything is raised
        return _broken(group, name, error)
    return Finding(group, name, True, f"{usable}; version {_version(module)}")


def _broken(group: str, name: str, error: Exception) -> Finding:
    problem = f"installed, but cannot be imported ({first_line(error)})"
    return Finding(group, name, False, problem)


def _version(module: str) -> str:
    found = metadata.packages_distributions().get(module.partition(".")[0], [])
    names = [name for name in found if module.replace(".", "-").replace("_", "-") in name.lower()]
    return metadata.version(names[0]) if names else "unknown"


def _extras() -> list[Finding]:
    distributed: list[tuple[str, Callable[[], bool]]] = [
        ("gloo", torch.distributed.is_gloo_available),
        ("nccl", torch.distributed.is_nccl_available),
    ]
    return [
        *(
            Finding("processes", name, works(), "several processes on " + where)
            for (name, works), where in zip(distributed, ("CPUs", "GPUs"), strict=True)
        ),
        _import(
            "tensorboard",
            "torch_tb_profiler",
            "traces in TensorBoard",
            'torch-tb-profiler is not installed here; `pip install "fastlab[profile]"`',
            group="traces",
        ),
    ]
