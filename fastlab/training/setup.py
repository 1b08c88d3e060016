"""What is set up before the first step: devices, precision, compilation and the dataset."""

import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from torch import nn

from fastlab import models
from fastlab.compiling import compiled, cpp_compiler
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.dataset.manifest import Manifest, check_sizes, read_manifest
from fastlab.machine import has_bf16
from fastlab.models.foreign import check_foreign
from fastlab.models.sync_norm import synchronise
from fastlab.processes import SPIN_COUNT
from fastlab.runs import RunDir
from fastlab.training.code import code_of
from fastlab.training.distributed import agreed, processes_asked_for
from fastlab.training.optim import make_optimizer
from fastlab.training.resizing import schedule_text
from fastlab.training.warm_start import warm_start
from pipelines import PipelineSpec, make_pipeline
from pipelines.base import Pipeline, Shard

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""The dtype of images and activations for each `train.precision`."""

_SLOW_BF16 = (
    'train.precision = "bf16" is slow on this CPU, which has no instructions for it; '
    "with --set train.precision=fp32 it trains faster"
)
_compiled: dict[str, Any] = {}
"""What `code_of` says of the last training of this process that compiled."""
_COMPILING = "compiling the first step; this takes minutes on a CPU"


def make_accelerator(cfg: Config, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """Collective: begin a training that `trackers` record; what earlier ones of this process
    compiled is forgotten unless it fits. Raises `UserError` where precision or batch size do not
    suit the processes, or where the launcher started fewer processes than it was asked for."""
    precision = cfg.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError('train.precision = "fp16" needs a GPU; use "bf16" or "fp32" here')
    # Running statistics drift apart a little within an epoch and are averaged at its end;
    # broadcasting them would cost a reduction in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Accelerate keeps the precision of the process's first training; a second may have another.
    AcceleratorState._reset_state()
    if cfg.train.compile:
        _forget_other_code(cfg)
    asked = processes_asked_for()
    accelerator = Accelerator(
        # Without this, Accelerate makes several processes of a CPU into as many separate trainings.
        cpu=asked > 1 and not torch.accelerator.is_available(),
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        step_scheduler_with_optimizer=False,
        log_with=list(trackers) or None,
        kwargs_handlers=[ddp],
    )
    world = accelerator.num_processes
    if world < asked:
        raise UserError(
            f"the launcher started {asked} processes, but Accelerate takes this one for a training "
            f"of its own; start them with: torchrun --nproc_per_node {asked} -m fastlab.train"
        )
    with agreed(accelerator):
        if cfg.train.batch_size % world:
            raise UserError(
                f"train.batch_size = {cfg.train.batch_size}: expected a multiple of {world} "
                f"(processes)"
            )
    return accelerator


def _forget_other_code(cfg: Config) -> None:
    """A process keeps eight compiled variants of a function and runs further ones eagerly: those of
    other trainings must not count."""
    code = code_of(cfg)
    if code != _compiled:
        torch.compiler.reset()
        _compiled.clear()
        _compiled.update(code)


@contextmanager
def torch_settings(cfg: Config, *, seeded: bool = True) -> Generator[None]:
    """Process-wide settings of a run, restored afterwards: TF32 for matrix products and
    convolutions where precision is mixed; cuDNN's algorithms chosen by trial, or deterministic
    ones; the number of threads, which a resumed run sets to its own. If `seeded`, the random
    numbers of Python, NumPy and torch, which decide the initial weights, start anew from the
    run's seed."""
    mixed, deterministic = cfg.train.precision not in ("fp32", "fp64"), cfg.train.deterministic
    products = torch.get_float32_matmul_precision()
    algorithms = torch.are_deterministic_algorithms_enabled()
    count = torch.get_num_threads()
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=not deterministic, deterministic=deterministic, allow_tf32=mixed
    )
    if deterministic:
        # Read where cuBLAS is first used: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if mixed else "highest")
    _use_deterministic_algorithms(deterministic)
    if seeded:
        set_seed(cfg.train.seed)
    try:
        with cudnn:
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        _use_deterministic_algorithms(algorithms)
        torch.set_num_threads(count)


def _use_deterministic_algorithms(mode: bool) -> None:
    """torch's function imports its compiler, which takes a second, also where nothing changes."""
    if mode != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(mode)


def open_dataset(cfg: Config) -> Manifest:
    """The manifest of `data.path`. Raises `UserError` where files are missing, the model needs
    larger images, or `train.image_size` asks for some that do not exist."""
    manifest = read_manifest(cfg.data.path)
    check_sizes(cfg.data.path, manifest)
    smallest = models.SMALLEST_IMAGE.get(cfg.model.name, 1)
    if manifest.image_size < smallest:
        raise UserError(
            f"{cfg.data.path}: images of {manifest.image_size} pixels a side are too small for "
            f"{cfg.model.name}; convert with --image-size {smallest}, or take another model.name"
        )
    for _, side in cfg.train.image_size:
        if not smallest <= side <= manifest.image_size:
            raise UserError(
                f"train.image_size: {side} pixels; expected {max(smallest, 8)} (the least that "
                f"{cfg.model.name} takes) to {manifest.image_size} (those of {cfg.data.path})"
            )
    return manifest


def open_split(
    cfg: Config, manifest: Manifest, accelerator: Accelerator, split: str, *, train: bool = False
) -> Pipeline:
    """This rank's share of a split, for training or for evaluation."""
    spec = PipelineSpec(
        cfg.data,
        cfg.augment if train else None,
        manifest,
        split,
        batch_size=cfg.train.batch_size if train else cfg.train.eval_batch_size,
        device=accelerator.device,
        dtype=DTYPES[cfg.train.precision],
        shard=Shard(accelerator.process_index, accelerator.num_processes),
        seed=cfg.train.seed,
        train=train,
        compile=cfg.train.compile,
    )
    return make_pipeline(spec)


def build(cfg: Config, manifest: Manifest, init: str | None) -> tuple[nn.Module, str]:
    """The model, in fp32 on the CPU, and which weights it begins with; empty: random ones. `init`
    names a run or a file of weights; empty: those that `model.arguments` asks for, if any; None:
    random ones in any case. Raises `UserError` where the model cannot be made, or the weights do
    not fit."""
    classes = [each.id for each in manifest.classes]
    pretrained = init == "" and bool(cfg.model.arguments.get("pretrained"))
    model = models.build(cfg.model, len(classes), pretrained=pretrained)
    if not cfg.model.built_in:
        sides = {manifest.image_size, *(stage.side for stage in cfg.train.image_size)}
        check_foreign(model, cfg.model, len(classes), sorted(sides))
    if init:
        return model, warm_start(model, init, classes)
    return model, f"pretrained, of {cfg.model.name}" if pretrained else ""


def prepare(
    cfg: Config, model: nn.Module, accelerator: Accelerator
) -> tuple[nn.Module, nn.Module, AcceleratedOptimizer]:
    """Collective: place, compile and wrap `model`. Returns (model, net, optimizer): `net` is the
    model inside DDP and autocast. fastlab sets memory format and compilation, Accelerate the rest.
    """
    if cfg.model.sync_batch_norm:
        model = synchronise(model, accelerator.device)
    double = cfg.train.precision == "fp64"
    model.to(accelerator.device, torch.float64 if double else torch.float32)
    models.set_memory_format(model, cfg.train.channels_last)
    optimizer = make_optimizer(cfg.optim, model)
    if cfg.train.compile:
        compile_forward(model, cfg.train.deterministic)
    with warnings.catch_warnings():
        # torch 2.15 has another name for it, which torch 2.11 and Accelerate do not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return model, *accelerator.prepare(model, optimizer)


def compile_forward(model: nn.Module, deterministic: bool) -> None:
    """Compile `model.forward` in place, inside DDP and autocast: names of weights do not change."""
    if deterministic:
        import torch._inductor.config as inductor  # slow to import

        inductor.deterministic = True  # no kernel is chosen by trial either
    model.forward = compiled(model.forward, dynamic=False)


def captures(cfg: Config, accelerator: Accelerator) -> bool:
    """Whether steps are captured as `train.step` asks. Reports where they cannot be, but should."""
    refusal = refuses_capture(accelerator)
    if cfg.train.step == "captured" and refusal:
        accelerator.print(f'train.step = "captured" is not possible here: {refusal}')
    return cfg.train.step != "eager" and not refusal


def refuses_capture(accelerator: Accelerator) -> str:
    """Why a step cannot be captured as a CUDA graph; empty where it can be."""
    if accelerator.device.type != "cuda":
        return "there is no GPU"
    if accelerator.num_processes > 1:
        return "several processes take part"
    return "fp16 reads the scale of its loss in each step" if accelerator.scaler else ""


def hints(cfg: Config, device: torch.device) -> list[str]:
    """What to tell a person before the first step."""
    lines = [f"computing with {threads()}"] if device.type == "cpu" else []
    lines += [_SLOW_BF16] if slow_bf16(device, cfg.train.precision) else []
    lines += [schedule_text(cfg.train)] if cfg.train.image_size else []
    compiles = cfg.train.compile and device.type == "cpu" and cpp_compiler()
    return lines + ([_COMPILING] if compiles else [])


def threads() -> str:
    """The threads of this process that compute on the CPU, and how they wait for each other."""
    count = torch.get_num_threads()
    if count == 1:
        return "1 thread"
    briefly = os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT
    return f"{count} threads, which {'spin briefly' if briefly else 'wait as the environment says'}"


def keep_threads(run: RunDir, accelerator: Accelerator) -> None:
    """Compute with as many threads as the run began with, since sums on a CPU depend on their
    number, and report where that changes it. Raises `UserError` where the record is damaged."""
    count = run.threads()
    if accelerator.device.type == "cpu" and count and count != torch.get_num_threads():
        torch.set_num_threads(count)
        accelerator.print(f"threads: {count}, as at the run's start; another number changes bits")


def slow_bf16(device: torch.device, precision: str) -> bool:
    """Whether bf16 is asked of a CPU that has no instructions for it."""
    return device.type == "cpu" and precision == "bf16" and not has_bf16()
