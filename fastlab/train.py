"""Train one classifier.

accelerate launch fastlab/train.py --config configs/resnet11.toml    # one or many devices
fastlab train --config configs/demo.toml --set train.epochs=3        # one process
fastlab train --resume runs/resnet11                                 # go on where it stopped

# two processes on a CPU (accelerate launch --cpu starts one, whatever --num_processes says)
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 fastlab/train.py --config configs/demo.toml
"""

import argparse
import math
import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from fastlab.processes import STARTED, die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # before the imports, which take seconds

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from fastlab import config, models
from fastlab.config import Config
from fastlab.console import UserError, first_line, tell
from fastlab.dataset.manifest import Manifest, check_sizes, fingerprint, read_manifest
from fastlab.machine import has_bf16
from fastlab.models.dropout import DropoutKeys
from fastlab.models.sync_norm import synchronise
from fastlab.predict import sample_predictions
from fastlab.runs import RunDir
from fastlab.tracing import Tracer, span
from fastlab.training import checkpoint
from fastlab.training import guards as memory
from fastlab.training.delayed import DelayedRead
from fastlab.training.metrics import Figures, Sums, loss_and_sums
from fastlab.training.optim import Rate, WeightAverage, make_optimizer
from fastlab.training.step import Step
from pipelines import FORMATS, make_pipeline
from pipelines.base import Batch, Pipeline, Shard

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# Steps of a process that compile, tune and fill caches: not counted in images/s.
_WARMUP_STEPS = 5
_SLOW_BF16 = (
    'train.precision = "bf16" is slow on this CPU, which has no instructions for it; '
    "with --set train.precision=fp32 it trains faster"
)
_LARGE_DATA = 'data.placement = "{}": the images do not fit into memory; set it to "stream"'
_LARGE_MODEL = "model.width = {}: the model does not fit into memory; take a smaller one"
_COMPILING = "compiling the first step; minutes on a CPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a configuration, such as configs/demo.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one value; may be repeated",
    )
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<config name>)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with an unfinished run")
    parser.add_argument("--profile", action="store_true", help="record a trace ([profile])")


@dataclass
class Progress:
    """Where a training stands: with the tensors, all that resuming needs."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Steps done in the epoch under way."""
    best_top1: float = -1.0
    best_epoch: int = 0
    lr: float = 0.0
    """Rate of the first step of the epoch under way."""
    seconds: float = 0.0
    """Training and evaluation, over all resumptions."""
    wall: float = 0.0
    """Seconds from start to last checkpoint of the processes before this one."""


class Stop(Exception):
    """A signal asked for a clean end; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Trainer:
    """One run: everything that lives from its first step to its last."""

    def __init__(self, cfg: Config, run: RunDir, accelerator: Accelerator) -> None:
        self.cfg, self.run, self.accelerator = cfg, run, accelerator
        self.device, rank = accelerator.device, accelerator.process_index
        with agreed(accelerator):
            self.manifest = open_dataset(cfg)
            with memory.fitting(_LARGE_DATA.format(cfg.data.placement)):
                self.train_data = self.pipeline("train", train=True)
                self.val_data = self.pipeline("val", train=False)
            with memory.fitting(_LARGE_MODEL.format(cfg.model.width)):
                self.model = models.build(cfg.model, len(self.manifest.classes))
        with memory.fitting(_LARGE_MODEL.format(cfg.model.width)):
            self.net, self.optimizer = self._prepare()
            self.average = WeightAverage(self.model, cfg.train.ema) if cfg.train.ema else None
        self.parameters = models.count_parameters(self.model)
        steps = cfg.train.epochs * self.train_data.steps()
        self.rate = Rate(cfg.schedule, cfg.optim.lr, steps, self.device)
        self.rate.attach(self.optimizer)
        self.sums = Sums(self.device)
        self.loss_and_sums = loss_and_sums
        if cfg.train.compile:
            self.loss_and_sums = torch.compile(loss_and_sums, dynamic=False)
        refusal = refuses_capture(accelerator)
        self.captures = cfg.train.step != "eager" and not refusal
        if cfg.train.step == "captured" and refusal:
            accelerator.print(f'train.step = "captured" is not possible here: {refusal}')
        self.tracer = Tracer(cfg.profile, run.traces, rank, self.device)
        self.progress = Progress()
        self.own_steps = 0  # done by this process
        self.wanted_stop = 0
        self.saved = time.perf_counter()  # when the last checkpoint was written
        self.best_weights: dict[str, torch.Tensor] = {}  # not written yet
        # The loss of each step of the epoch under way, and the one that its last step's weights
        # would give: looked at every train.log_every steps, not step by step.
        self.losses = torch.zeros(self.train_data.steps() + 1, device=self.device)
        self.remaining = torch.arange(len(self.losses), 0, -1, device=self.device)
        self.dropout = DropoutKeys(self.model, cfg.train.seed, rank, self.device)
        self.step = self.make_step()
        self.looks = DelayedRead(7, self.device)

    def pipeline(self, split: str, train: bool) -> Pipeline:
        cfg, accelerator = self.cfg, self.accelerator
        return make_pipeline(
            cfg.data,
            cfg.augment if train else None,
            self.manifest,
            split,
            batch_size=cfg.train.batch_size if train else cfg.train.eval_batch_size,
            device=self.device,
            dtype=DTYPES[cfg.train.precision],
            shard=Shard(accelerator.process_index, accelerator.num_processes),
            seed=cfg.train.seed,
            train=train,
            compile=cfg.train.compile,
        )

    def make_step(self) -> Step:
        return Step(
            lambda batch: train_step(self, batch),
            self.optimizer,
            self.dropout,
            self.rate,
            self.losses,
            # On a CPU that takes longer than it saves.
            compile=self.cfg.train.compile and self.device.type == "cuda",
        )

    def batches(self, epoch: int, first: int = 0) -> Iterable[Batch | None]:
        """What to call `step` with, from step `first` of `epoch` on."""
        capture = self.captures and self.tracer.over
        return self.step.batches(self.train_data, epoch, first, capture=capture)

    def _prepare(self) -> tuple[nn.Module, Any]:
        """Memory format and compilation are fastlab's; placement and DDP are Accelerate's."""
        settings, model = self.cfg.train, self.model
        if self.cfg.model.sync_batch_norm:
            model = self.model = synchronise(model, self.device)
        model.to(self.device, torch.float64 if settings.precision == "fp64" else torch.float32)
        models.set_memory_format(model, settings.channels_last)
        optimizer = make_optimizer(self.cfg.optim, model)
        if settings.compile:
            compile_forward(model, settings.deterministic)
        with warnings.catch_warnings():
            # torch 2.15 has another name for it, which torch 2.11 and Accelerate do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def steps_done(self) -> int:
        return self.progress.epoch * self.train_data.steps() + self.progress.step

    def state_dict(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = self.rate.at(self.steps_done())  # a number, as exact as the schedule's
        return {
            "progress": {**asdict(self.progress), "wall": self.wall()},
            "optimizer": optimizer,
            "schedule": self.rate.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            # Of all processes: a resumed run puts it on the main one.
            "sums": self.accelerator.reduce(self.sums.values.clone(), "sum").cpu(),
        }

    def wall(self) -> float:
        """Seconds of all processes of this run, from their starts."""
        return self.progress.wall + time.perf_counter() - STARTED

    def keep_best(self) -> None:
        """Note the weights that the model holds now as the best; `save` writes them."""
        state = self.model.state_dict()
        self.best_weights = {name: tensor.detach().clone() for name, tensor in state.items()}

    def save(self) -> None:
        with span("checkpoint"):  # a review leaves it out of the step around it
            self.refuse_divergence()
            if self.best_weights and self.accelerator.is_main_process:
                checkpoint.save_weights(self.best_weights, self.run.best)
            self.best_weights = {}
            state = self.state_dict()
            own = self.average.buffers if self.average else ()
            checkpoint.save(
                self.run.checkpoints, self.steps_done(), self.model, state, self.accelerator, own
            )
            self.saved = time.perf_counter()
            self.looks.forget()  # the last one may have asked for this checkpoint

    def restore(self) -> None:
        form = FORMATS[self.cfg.data.pipeline]
        self.run.check_dataset(fingerprint(self.manifest), form, self.cfg.data.path)
        path = checkpoint.last(self.run.checkpoints)
        if path is not None:
            state, own = checkpoint.load(path, self.model, self.accelerator.process_index)
            state["progress"].pop("rates", None)  # of checkpoints before this
            self.progress = Progress(**state["progress"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rate.load_state_dict(
                state["schedule"], float(self.optimizer.param_groups[0]["lr"])
            )
            self.rate.attach(self.optimizer)
            if self.average:
                self.average.load_state_dict(state["average"])
                for buffer, value in zip(self.average.buffers, own, strict=False):
                    buffer.copy_(value)
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if self.accelerator.is_main_process:
                self.sums.values.copy_(state["sums"])
        if self.accelerator.is_main_process:
            self.run.keep_metrics(self.progress.epoch)

    def checkpoint_due(self) -> bool:
        return time.perf_counter() - self.saved >= self.cfg.train.checkpoint_seconds

    def agree_to_stop(self) -> None:
        """Collective: every process calls this between two epochs. Raises `UserError` where a loss
        was not finite, `Stop` where a signal reached any process."""
        self.refuse_divergence()
        if wanted := self._most(self.wanted_stop):
            raise Stop(wanted)

    def look(self) -> tuple[bool, list[float]]:
        """Collective: every process calls this every `train.log_every` steps. Raises `UserError`
        and `Stop` as `agree_to_stop` does; returns whether a checkpoint is due, and this process's
        sums of the epoch. All of it is as of the look before, since the device need not be
        drained for that; the first look of an epoch returns no sums."""
        due = self.cfg.train.checkpoint_seconds > 0 and self.checkpoint_due()
        own = torch.tensor([self.wanted_stop, due], dtype=torch.float64)
        own = own.to(self.device, non_blocking=True)
        largest = torch.cat([self._steps_since_divergence().double()[None], own])
        if self.accelerator.num_processes > 1:
            largest = self.accelerator.gather(largest[None]).amax(dim=0)
        before = self.looks.exchange(torch.cat([largest, self.sums.values]))
        if not before:
            return False, []
        diverged, wanted, due, *sums = before
        self._refuse(int(diverged))
        if wanted:
            raise Stop(int(wanted))
        return bool(due), sums

    def refuse_divergence(self) -> None:
        """Collective: every process calls this before anything is saved. Raises `UserError` where
        a loss of the epoch under way was not finite. Waits for the device."""
        self._refuse(self._most(int(self._steps_since_divergence())))

    def _steps_since_divergence(self) -> torch.Tensor:
        """int64 scalar on the device: entries of `losses` from the first that is not finite on."""
        return torch.where(self.losses.isfinite(), 0, self.remaining).amax()

    def _refuse(self, steps_since_divergence: int) -> None:
        if steps_since_divergence:
            step = len(self.losses) - steps_since_divergence + 1
            after_all = step == len(self.losses)
            self.diverged("loss", "after the last step" if after_all else f"at step {step}")

    def diverged(self, what: str, where: str) -> NoReturn:
        """Collective: every process calls this."""
        last = checkpoint.last(self.run.checkpoints)
        kept = f"{last} is whole" if last else "there was no checkpoint yet"
        write_summary(self, "diverged")
        with agreed(self.accelerator):
            raise UserError(
                f"{self.run.path}: the {what} is not a finite number {where} of epoch "
                f"{self.progress.epoch + 1}; {kept}; try a lower optim.lr or train.grad_clip"
            )

    @torch.no_grad()
    def try_weights(self) -> None:
        """Note the loss that the weights give now, as that of the step to come: no loss so far came
        of the last update, and a checkpoint that diverged must not replace a good one. Of every
        process, within an epoch; leaves statistics as they were."""
        batch = self.step.batch
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with span("checkpoint"):
            # Eagerly: to compile for it takes longer than it is worth.
            with self.accelerator.autocast():
                logits = type(self.model).forward(self.model, batch.images)
            self.losses[self.progress.step] = loss_and_sums(
                logits, batch.labels, batch.mask, self.cfg.train.label_smoothing
            )[0]
            for buffer, before in buffers:
                buffer.copy_(before)

    def _most(self, value: int) -> int:
        """Collective: the largest `value` over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    from fastlab.console import run_command

    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    cfg, directory = resolve(args)
    if args.profile:
        cfg = replace(cfg, profile=replace(cfg.profile, enabled=True))
    accelerator = make_accelerator(cfg)
    with torch_settings(cfg):
        try:
            trainer = Trainer(cfg, directory, accelerator)
            with (
                run_held(trainer, bool(args.resume)),
                memory.explained(trainer),
                disk_explained(trainer),
                worker_explained(trainer),
            ):
                return train(trainer)
        finally:
            accelerator.end_training()


@contextmanager
def run_held(trainer: Trainer, resume: bool) -> Iterator[None]:
    """The run's directory, new or as it was left, held by the main process to the end."""
    directory, accelerator = trainer.run, trainer.accelerator
    with ExitStack() as held:
        with agreed(accelerator), disk_explained(trainer):
            if accelerator.is_main_process:
                if not resume:
                    directory.claim()
                held.enter_context(directory.locked())
                if not resume:
                    dataset = fingerprint(trainer.manifest)
                    directory.create(trainer.cfg, dataset, accelerator.num_processes)
            if resume:
                trainer.restore()
        yield


@contextmanager
def agreed(accelerator: Accelerator) -> Iterator[None]:
    """A mistake that any process finds ends all of them, with the line of the first that found one.
    Every process enters this, and nothing inside waits for the others."""
    if accelerator.num_processes == 1:
        yield
        return
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    found = torch.tensor([int(failure is not None)], device=accelerator.device)
    failed = accelerator.gather(found).tolist()
    if not any(failed):
        return
    if failed.index(1) == accelerator.process_index:
        tell(failure)
    accelerator.wait_for_everyone()  # the launcher ends the others as soon as one has left
    raise SystemExit(2)


@contextmanager
def disk_explained(trainer: Trainer) -> Iterator[None]:
    """A run directory that cannot be written becomes a `UserError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{trainer.run.path}: cannot be written ({error.strerror or error}); mend that, then "
            f"go on with: --resume {trainer.run.path}"
        ) from None


@contextmanager
def worker_explained(trainer: Trainer) -> Iterator[None]:
    """A decoding worker that was killed becomes a `UserError` wherever PyTorch notices: its signal
    handler raises at whatever line runs then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a decoding worker failed ({first_line(error)}); go on with: "
            f"--resume {trainer.run.path}"
        ) from None


def resolve(args: argparse.Namespace) -> tuple[Config, RunDir]:
    if args.resume:
        if args.config or args.overrides or args.out:
            raise UserError(
                "--resume takes the run's own configuration: drop --config, --set, --out"
            )
        directory = RunDir(args.resume)
        return directory.load_config(), directory
    if not args.config:
        raise UserError("--config FILE is missing; such as --config configs/demo.toml")
    out = args.out or Path("runs") / args.config.stem
    return config.load(args.config, args.overrides), RunDir(out)


def make_accelerator(cfg: Config) -> Accelerator:
    precision = cfg.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError('train.precision = "fp16" needs a GPU; use "bf16" or "fp32" here')
    # Statistics differ a little between processes in an epoch and are averaged at its end; to
    # broadcast them at every step costs a reduction each.
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


def compile_forward(model: nn.Module, deterministic: bool) -> None:
    """In place and inside DDP and autocast: names of weights stay as they are."""
    if deterministic:
        import torch._inductor.config as inductor  # slow to import

        inductor.deterministic = True  # its kernels are not chosen by trial either
    model.forward = torch.compile(model.forward, dynamic=False)


def refuses_capture(accelerator: Accelerator) -> str:
    """Why a step cannot be captured there; empty if it can."""
    if accelerator.device.type != "cuda":
        return "there is no GPU"
    if accelerator.num_processes > 1:
        return "several processes take part"
    return "fp16 reads the scale of its loss in each step" if accelerator.scaler else ""


def open_dataset(cfg: Config) -> Manifest:
    manifest = read_manifest(Path(cfg.data.path))
    check_sizes(Path(cfg.data.path), manifest)
    smallest = models.SMALLEST_IMAGE.get(cfg.model.name, 1)
    if manifest.image_size < smallest:
        raise UserError(
            f"{cfg.data.path}: images of {manifest.image_size} pixels a side are too small for "
            f"{cfg.model.name}; convert with --image-size {smallest}, or take another model.name"
        )
    return manifest


@contextmanager
def torch_settings(cfg: Config) -> Iterator[None]:
    """The same initial weights on every process; TF32 where precision is mixed anyway, in matrix
    products and, by a switch of its own that is on by default, in convolutions; convolutions that
    cuDNN chooses by trial, or deterministic ones."""
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


@contextmanager
def signals_to(trainer: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a clean stop; a second one acts at once."""

    def ask(number: int, frame: Any) -> None:
        trainer.wanted_stop = number
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    for name in before:
        signal.signal(name, ask)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def slow_bf16(device: torch.device, precision: str) -> bool:
    """Whether bf16 is asked of a CPU without instructions for it."""
    return device.type == "cpu" and precision == "bf16" and not has_bf16()


def train(trainer: Trainer) -> int:
    """All epochs that are left. Returns the exit status: 0, or 128 and the signal's number."""
    progress, accelerator = trainer.progress, trainer.accelerator
    write_summary(trainer, "running")
    if slow_bf16(trainer.device, trainer.cfg.train.precision):
        accelerator.print(_SLOW_BF16)
    if trainer.cfg.train.compile and trainer.device.type == "cpu":
        accelerator.print(_COMPILING, flush=True)
    status = 0
    with signals_to(trainer), tensorboard(trainer) as board, trainer.tracer:
        try:
            while progress.epoch < trainer.cfg.train.epochs:
                trainer.agree_to_stop()
                epoch(trainer, board)
        except Stop as stop:
            trainer.save()
            status = 128 + stop.number
    write_summary(trainer, "interrupted" if status else "finished")
    if status:
        accelerator.print(
            f"stopped by signal {status - 128} after epoch {progress.epoch}, step {progress.step}; "
            f"go on with: --resume {trainer.run.path}"
        )
        return status
    finish(trainer)
    return 0


def epoch(trainer: Trainer, board: Any) -> None:
    """Train and validate one epoch, or what is left of it; record it; checkpoint."""
    progress = trainer.progress
    started = time.perf_counter()
    if progress.step == 0:
        progress.lr = trainer.rate.at(trainer.steps_done())
    trained, rate = train_epoch(trainer, started)
    trainer.tracer.end_epoch()
    average_buffers(trainer)
    with trainer.average.applied() if trainer.average else nullcontext():
        found = evaluate(trainer.net, trainer.val_data, trainer.accelerator)
        if not math.isfinite(found.loss):
            trainer.diverged("validation loss", "at the end")
        if found.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = found.top1, progress.epoch + 1
            trainer.keep_best()
    trainer.rate.end_epoch(found.top1)
    progress.epoch, progress.step = progress.epoch + 1, 0
    trainer.sums.values.zero_()
    trainer.looks.forget()
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    if trainer.accelerator.is_main_process:
        record(trainer, board, trained, found, rate, seconds)
    last = progress.epoch == trainer.cfg.train.epochs
    if last or trainer._most(trainer.checkpoint_due()):
        trainer.save()


def train_epoch(trainer: Trainer, started: float) -> tuple[Figures, float]:
    """The steps that are left of the epoch. Returns its figures, in training mode, weights
    changing; and images/s over all processes, the first steps of the process left out."""
    progress, settings = trainer.progress, trainer.cfg.train
    steps, first = trainer.train_data.steps(), progress.step
    # The first steps of the process: where an epoch, or what is left of it, is short, half of them.
    warm = first + min(max(0, _WARMUP_STEPS - trainer.own_steps), (steps - first) // 2)
    trainer.model.train()
    trainer.net.train()
    clock = time.perf_counter()
    batches = trainer.batches(progress.epoch, first)
    with progress_bar(trainer, steps, first) as bar:
        for batch in trainer.tracer.steps(batches, trainer.steps_done()):
            trainer.step(batch)
            progress.step += 1
            trainer.own_steps += 1
            if progress.step == warm:
                wait_for_device(trainer.device)
                clock = time.perf_counter()
            if progress.step == steps:
                break  # a stop, and the checkpoint, wait for the validation
            try:
                save_or_stop(trainer, started, bar)
            except Stop:
                trainer.try_weights()
                progress.seconds += time.perf_counter() - started
                raise
    if trainer.average:  # then validation tries other weights
        trainer.try_weights()
    trainer.refuse_divergence()
    figures = trainer.sums.reduce(trainer.accelerator)
    return figures, (steps - warm) * settings.batch_size / (time.perf_counter() - clock)


def save_or_stop(trainer: Trainer, started: float, bar: Any) -> None:
    """What may be due after a step within an epoch: a look, a checkpoint, a stop."""
    step, settings = trainer.progress.step, trainer.cfg.train
    due = settings.checkpoint_every and step % settings.checkpoint_every == 0
    if step % settings.log_every == 0:
        clock_due, sums = trainer.look()
        due = due or clock_due
        show(bar, sums, step)
    if due:
        save_within(trainer, started)
    # Several processes stop together, by a look or between two epochs.
    if trainer.wanted_stop and trainer.accelerator.num_processes == 1:
        raise Stop(trainer.wanted_stop)


def train_step(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Forward, backward, update. Returns this process's loss. Nothing here reads the device or
    differs from one step to the next: on a GPU it is captured, and repeated without Python."""
    settings, optimizer = trainer.cfg.train, trainer.optimizer
    with span("forward"):
        logits = trainer.net(batch.images)
        loss, sums = trainer.loss_and_sums(
            logits, batch.labels, batch.mask, settings.label_smoothing
        )
    with span("backward"):
        trainer.accelerator.backward(loss)
    with span("optimizer"):
        if settings.grad_clip:
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if trainer.average:
            trainer.average.update(trainer.step.done)
    trainer.sums.values += sums
    return loss.detach()


@torch.no_grad()
def evaluate(net: nn.Module, data: Pipeline, accelerator: Accelerator) -> Figures:
    """Figures over every image of the split, each counted once."""
    model = accelerator.unwrap_model(net)
    model.eval()
    sums = Sums(accelerator.device)
    for batch in data.epoch(0):
        sums.add(model(batch.images), batch.labels, batch.mask)
    return sums.reduce(accelerator)


def average_buffers(trainer: Trainer) -> None:
    """Running statistics, and their moving averages, become their mean over the processes."""
    if trainer.accelerator.num_processes == 1:
        return
    for buffer in (*trainer.model.buffers(), *(trainer.average.buffers if trainer.average else ())):
        if buffer.is_floating_point():
            buffer.copy_(trainer.accelerator.reduce(buffer, "mean"))


def save_within(trainer: Trainer, started: float) -> None:
    """A checkpoint in the middle of an epoch, with the time it took so far."""
    trainer.try_weights()
    before = trainer.progress.seconds
    trainer.progress.seconds += time.perf_counter() - started
    trainer.save()
    trainer.progress.seconds = before


def wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def record(
    trainer: Trainer, board: Any, trained: Figures, found: Figures, rate: float, s: float
) -> None:
    progress = trainer.progress
    values = {
        "lr": progress.lr,
        "train_loss": trained.loss,
        "train_top1": trained.top1,
        "train_top5": trained.top5,
        "val_loss": found.loss,
        "val_top1": found.top1,
        "val_top5": found.top5,
        "images_per_second": rate,
        "seconds": s,
        "wall_seconds": trainer.wall(),
    }
    step = progress.epoch * trainer.train_data.steps()
    counts = {
        "val_images": found.images,
        "val_correct1": found.correct1,
        "val_correct5": found.correct5,
    }
    trainer.run.append_metrics({"epoch": progress.epoch, "step": step, **values, **counts})
    for name, value in values.items():
        group, _, metric = name.partition("_")
        tag = f"{metric}/{group}" if group in ("train", "val") else name
        board.add_scalar(tag, value, progress.epoch)
    print(
        f"epoch {progress.epoch:3d}/{trainer.cfg.train.epochs}  lr {progress.lr:.2e}  "
        f"train loss {trained.loss:.4f} top-1 {trained.top1:.2%}  "
        f"val loss {found.loss:.4f} top-1 {found.top1:.2%} top-5 {found.top5:.2%}  "
        f"{rate:,.0f} images/s  {s:.1f} s",
        flush=True,
    )


@contextmanager
def tensorboard(trainer: Trainer) -> Iterator[Any]:
    if not trainer.accelerator.is_main_process:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    purge = trainer.progress.epoch + 1
    with SummaryWriter(str(trainer.run.tensorboard), purge_step=purge) as board:
        yield board


@contextmanager
def progress_bar(trainer: Trainer, steps: int, first: int) -> Iterator[Any]:
    off = None if trainer.accelerator.is_main_process else True  # None: off where no terminal
    name = f"epoch {trainer.progress.epoch + 1}"
    with tqdm(total=steps, initial=first, desc=name, leave=False, disable=off) as bar:
        yield bar


def show(bar: Any, sums: list[float], step: int) -> None:
    if sums and not bar.disable:
        loss, hits, _, images = sums
        bar.set_postfix_str(f"loss {loss / images:.3f}, top-1 {hits / images:.1%}", refresh=False)
        bar.update(step - bar.n)


def write_summary(trainer: Trainer, status: str) -> None:
    if not trainer.accelerator.is_main_process:
        return
    counts = {name: split.images for name, split in trainer.manifest.splits.items()}
    trainer.run.write_summary(
        {
            "name": trainer.cfg.model.name,
            "parameters": trainer.parameters,
            "dataset": {
                "path": trainer.cfg.data.path,
                "classes": len(trainer.manifest.classes),
                "image_size": trainer.manifest.image_size,
                "counts": counts,
                "skipped": len(trainer.manifest.skipped),
            },
            "status": status,
            "train_seconds": trainer.progress.seconds,
            "wall_seconds": trainer.wall(),
        }
    )


def finish(trainer: Trainer) -> None:
    """Sample predictions of the best weights, and a last word."""
    if not trainer.accelerator.is_main_process:
        return
    if trainer.run.best.exists():
        checkpoint.load_weights(trainer.model, trainer.run.best)
    trainer.run.write_predictions(
        sample_predictions(trainer.model, trainer.cfg, trainer.manifest, trainer.device)
    )
    progress = trainer.progress
    print(
        f"best validation top-1 {progress.best_top1:.2%} at epoch {progress.best_epoch}, "
        f"{progress.seconds:.0f} s in all; run directory: {trainer.run.path}\n"
        f"look at it: fastlab report {trainer.run.path} --out report.html"
    )


if __name__ == "__main__":
    raise SystemExit(main())
