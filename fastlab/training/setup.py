"""What is set up before the first step: devices, precision, compilation and the dataset."""

import argparse
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import nn

from fastlab import config, models
from fastlab.compiling import compiled, cpp_compiler
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.dataset.manifest import Manifest, check_sizes, read_manifest
from fastlab.machine import has_bf16
from fastlab.models.sync_norm import synchronise
from fastlab.runs import RunDir
from fastlab.training.distributed import agreed
from fastlab.training.optim import make_optimizer
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
_COMPILING = "compiling the first step; this takes minutes on a CPU"


def resolve(args: argparse.Namespace) -> tuple[Config, RunDir]:
    """The configuration and the run directory that the options of `add_training_options` name."""
    if args.resume and (args.config or args.overrides or args.out):
        raise UserError("--resume takes the run's own configuration: drop --config, --set, --out")
    if not args.resume and not args.config:
        raise UserError("--config FILE is missing; such as --config configs/demo.toml")
    if args.resume:
        directory = RunDir(args.resume)
        cfg = directory.load_config()
    else:
        directory = RunDir(args.out or Path("runs") / args.config.stem)
        cfg = config.load(args.config, args.overrides)
    if args.profile:
        cfg = replace(cfg, profile=replace(cfg.profile, enabled=True))
    return cfg, directory


def make_accelerator(cfg: Config) -> Accelerator:
    """Collective. Raises `UserError` where precision or batch size do not suit the processes."""
    precision = cfg.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError('train.precision = "fp16" needs a GPU; use "bf16" or "fp32" here')
    # Running statistics drift apart a little within an epoch and are averaged at its end;
    # broadcasting them would cost a reduction in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[ddp],
    )
    world = accelerator.num_processes
    with agreed(accelerator):
        if cfg.train.batch_size % world:
            raise UserError(
                f"train.batch_size = {cfg.train.batch_size}: expected a multiple of {world} "
                f"(processes)"
            )
    return accelerator


@contextmanager
def torch_settings(cfg: Config) -> Generator[None]:
    """Process-wide settings of a run, restored afterwards: the seed of the initial weights; TF32
    for matrix products and convolutions where precision is mixed; cuDNN's algorithms chosen by
    trial, or deterministic ones."""
    mixed, deterministic = cfg.train.precision not in ("fp32", "fp64"), cfg.train.deterministic
    products = torch.get_float32_matmul_precision()
    algorithms = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=not deterministic, deterministic=deterministic, allow_tf32=mixed
    )
    if deterministic:
        # Read where cuBLAS is first used: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high" if mixed else "highest")
    torch.use_deterministic_algorithms(deterministic)
    set_seed(cfg.train.seed)
    try:
        with cudnn:
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(algorithms)


def open_dataset(cfg: Config) -> Manifest:
    """The manifest of `data.path`. Raises `UserError` where files are missing or the model needs
    larger images."""
    manifest = read_manifest(Path(cfg.data.path))
    check_sizes(Path(cfg.data.path), manifest)
    smallest = models.SMALLEST_IMAGE.get(cfg.model.name, 1)
    if manifest.image_size < smallest:
        raise UserError(
            f"{cfg.data.path}: images of {manifest.image_size} pixels a side are too small for "
            f"{cfg.model.name}; convert with --image-size {smallest}, or take another model.name"
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
    lines = [_SLOW_BF16] if slow_bf16(device, cfg.train.precision) else []
    compiles = cfg.train.compile and device.type == "cpu" and cpp_compiler()
    return lines + ([_COMPILING] if compiles else [])


def slow_bf16(device: torch.device, precision: str) -> bool:
    """Whether bf16 is asked of a CPU that has no instructions for it."""
    return device.type == "cpu" and precision == "bf16" and not has_bf16()
