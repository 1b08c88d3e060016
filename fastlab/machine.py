"""This machine: the record that every figure carries, and what of fastlab works here (`doctor`)."""

import functools
import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import fastlab
from fastlab import shipped
from fastlab.compiling import c_compiler, cpp_compiler
from fastlab.console import first_line, public_command

DISTRIBUTION = "fastlab-train"


def installing(extra: str) -> str:
    """What installs an extra of pyproject.toml. It is not "fastlab[EXTRA]": the package index has
    another project of that name."""
    if shipped.INSTALLED:
        return f'run `pip install "{DISTRIBUTION}[{extra}]"`'
    return f'run `make extras` in the checkout, or there `pip install -e ".[{extra}]"`'


def missing_tracker(name: str) -> str:
    """What installs the tracker `name`; empty where it is installed."""
    spec = importlib.util.find_spec(name)
    # Without an origin it is a folder of that name, such as one of W&B's files.
    return "" if spec and spec.origin else f"{name} is not installed here; {installing('trackers')}"


FFCV_MISSING = (
    "FFCV is not installed here; install libopencv-dev, libturbojpeg0-dev and pkg-config, then "
    f"{installing('ffcv')} and `pip install --no-deps ffcv==1.0.2`"
)

_RECORDED = (
    "accelerate",
    "datasets",
    "ffcv",
    "fsspec",
    "grain",
    "litdata",
    "numba",
    "numpy",
    "nvidia-dali-cuda130",
    "pillow",
    "pyarrow",
    "s3fs",
    "safetensors",
    "simplejpeg",
    "spdl",
    "timm",
    "torch",
    "torchcodec",
    "torchvision",
    "triton",
)
_REQUIRED = ("torch", "torchvision", "accelerate", "numpy", "numba", "simplejpeg")


def environment(processes: int) -> dict[str, Any]:
    """Date, command, machine and versions: what a figure must carry to be believed."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bf16 = ", bf16" if has_bf16() else ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": public_command(sys.argv),
        "machine": {
            "cpu": _cpu_name(),
            # One name stands for CPUs with and without these instructions.
            "instructions": torch.backends.cpu.get_cpu_capability() + bf16,
            "cores": cores(),
            "memory_gib": round(memory / 2**30, 1),
            "gpus": gpus,
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "processes": processes,
        "threads": torch.get_num_threads(),  # of each process
        "fastlab": fastlab.__version__,
        "git": _git_revision(),
    }


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 matrices."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _versions() -> dict[str, str]:
    versions = {}
    for name in _RECORDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_revision() -> str | None:
    """The revision of the checkout that holds this package; None where it is installed, perhaps
    in an environment within the checkout of another project."""
    if shipped.INSTALLED:
        return None
    # `git describe --dirty` writes the index, and leaves its lock behind where it is killed.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    commands = ("describe --always", "status --porcelain --untracked-files=no")
    try:
        revision, changes = (
            subprocess.check_output(
                [*git, *command.split()], stderr=subprocess.DEVNULL, text=True, timeout=10
            ).strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}-dirty" if changes else revision or None


class Finding(NamedTuple):
    """One line of `fastlab doctor`."""

    group: str
    name: str
    usable: bool
    detail: str


def examine() -> list[Finding]:
    """Every finding, in the order in which to print them. Imports all engines."""
    findings = [*_packages(), *_devices(), *_sources(), *_engines(), *_models()]
    return [*findings, *_trackers(), *_extras()]


def table(findings: list[Finding]) -> str:
    """The findings in aligned lines, under a heading for each group."""
    lines, group = [], ""
    for finding in findings:
        if finding.group != group:
            lines += ["", finding.group] if lines else [finding.group]
            group = finding.group
        usable = "yes" if finding.usable else "no "
        lines.append(f"  {finding.name:<13}{usable:<5}{finding.detail}".rstrip())
    return "\n".join(lines)


def _packages() -> list[Finding]:
    return [
        Finding("versions", "fastlab", True, fastlab.__version__),
        Finding("versions", "python", True, platform.python_version()),
        *(_installed(name) for name in _REQUIRED),
    ]


def _installed(name: str) -> Finding:
    try:
        return Finding("versions", name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("versions", name, False, f"not installed; `pip install {name}`")


def _devices() -> list[Finding]:
    import torch

    cpu = Finding("devices", "cpu", True, f"{cores()} cores, {platform.machine()}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = Finding("devices", "cuda", True, ", ".join(names))
    elif torch.version.cuda is None:
        cuda = Finding("devices", "cuda", False, "this torch is built without CUDA")
    else:
        detail = f"torch is built for CUDA {torch.version.cuda}, but finds no device or driver"
        cuda = Finding("devices", "cuda", False, detail)
    compiler = c_compiler() if torch.cuda.is_available() else cpp_compiler()
    detail = compiler or "needs a compiler: install g++; until then, training is eager"
    compiling = Finding("devices", "compile", compiler is not None, f"torch.compile: {detail}")
    bf16 = torch.cuda.is_available() or has_bf16()
    detail = "in hardware" if bf16 else "works, but not in hardware: slower than fp32"
    return [cpu, cuda, compiling, Finding("devices", "bf16", bf16, detail)]


def _sources() -> list[Finding]:
    found = [
        ("pyarrow", "sources", "Parquet, and datasets saved by Hugging Face"),
        ("datasets", "sources", "datasets of the Hugging Face hub"),
        ("s3fs", "remote", "files behind s3://"),
        ("gcsfs", "remote", "files behind gs://"),
        ("aiohttp", "remote", "files behind https://"),
    ]
    return [
        _import("sources", name, name, use, f"{name} is not installed here; {installing(extra)}")
        for name, extra, use in found
    ]


def _engines() -> list[Finding]:
    dali = f"DALI is not installed here; {installing('dali')}"
    return [
        Finding("engines", "resident", True, "reads the array format"),
        Finding("engines", "torchvision", True, "reads the tar format"),
        _stream(),
        _import("engines", "ffcv", "ffcv", "reads the ffcv format", FFCV_MISSING),
        _import("engines", "dali", "nvidia.dali", "reads the tar format", dali),
    ]


def _models() -> list[Finding]:
    missing = f"timm is not installed here; {installing('timm')}"
    return [_import("models", "timm", "timm", 'model.name = "timm:NAME"', missing)]


def _stream() -> Finding:
    remote = _import("engines", "stream", "s3fs", "reads the tar format, also from URLs", "")
    local = f"reads the tar format of local folders; for URLs, {installing('remote')}"
    return remote if remote.usable else Finding("engines", "stream", True, local)


def _trackers() -> list[Finding]:
    """They are not imported: MLflow reports its use as soon as it is."""
    found = []
    for name in ("tensorboard", "wandb", "mlflow", "trackio"):
        missing = missing_tracker(name)
        usable = f"records trainings; version {_version(name)}"
        found.append(Finding("trackers", name, not missing, missing or usable))
    return found


def _import(group: str, name: str, module: str, usable: str, missing: str) -> Finding:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            return Finding(group, name, False, missing)
        return _broken(group, name, error)
    except Exception as error:  # a missing library, or one of another version, can raise anything
        return _broken(group, name, error)
    return Finding(group, name, True, f"{usable}; version {_version(module)}")


def _broken(group: str, name: str, error: Exception) -> Finding:
    problem = f"installed, but cannot be imported ({first_line(error)})"
    return Finding(group, name, False, problem)


def _version(module: str) -> str:
    """The version of the distribution whose name holds that of `module`: `nvidia` is shared."""
    names = _distributions().get(module.partition(".")[0], [])
    wanted = module.replace(".", "-").replace("_", "-")
    matching = [name for name in names if wanted in name.lower()]
    return metadata.version(matching[0]) if matching else "unknown"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """The distributions of each module, read once from the files of all that is installed."""
    return metadata.packages_distributions()


def _extras() -> list[Finding]:
    import torch

    backends: list[tuple[str, Callable[[], bool], str]] = [
        ("gloo", torch.distributed.is_gloo_available, "several processes on CPUs"),
        ("nccl", torch.distributed.is_nccl_available, "several processes on GPUs"),
    ]
    missing = f"torch-tb-profiler is not installed here; {installing('profile')}"
    deprecated = f"torchvision's deprecated decoder takes its place; {installing('torchcodec')}"
    codec = "JPEGs on a GPU, from version 0.16 on"
    return [
        *(Finding("processes", name, works(), detail) for name, works, detail in backends),
        _import("decoders", "torchcodec", "torchcodec", codec, deprecated),
        _import("traces", "tensorboard", "torch_tb_profiler", "traces in TensorBoard", missing),
    ]
