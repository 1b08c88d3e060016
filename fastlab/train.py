"""Train one classifier.

accelerate launch fastlab/train.py --config configs/resnet11.toml    # one or many devices
fastlab train --config configs/demo.toml --set train.epochs=3        # one process
fastlab train --resume runs/resnet11                                 # go on where it stopped

# two processes on a CPU (accelerate launch --cpu starts one, whatever --num_processes says)
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 fastlab/train.py --config configs/demo.toml
"""

import argparse
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from fastlab.processes import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # before the imports, which take seconds

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from fastlab import checkpoint, config, memory, models
from fastlab.config import Config, TrainConfig
from fastlab.dataset.manifest import Manifest, check_sizes, read_manifest
from fastlab.doctor import has_bf16
from fastlab.errors import UserError, first_line, tell
from fastlab.fingerprint import check_dataset, fingerprint
from fastlab.metrics import Figures, Sums
from fastlab.models.norm import synchronise
from fastlab.optim import WeightAverage, make_optimizer, make_schedule
from fastlab.predict import sample_predictions
from fastlab.rundir import RunDir
from fastlab.tracing import Tracer, span
from pipelines import make_pipeline
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
    """Of training and evaluation, over all resumptions."""


class Stop(Exception):
    """A signal asked for a clean end; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Trainer:
    """One run: everything that lives from its first step to its last."""

    def __init__(self, cfg: Config, run: RunDir, accelerator: Accelerator) -> None:
        self.cfg, self.run, self.accelerator = cfg, run, accelerator
        self.device = accelerator.device
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
        self.schedule = make_schedule(cfg.schedule, self.optimizer.optimizer, steps)
        self.sums = Sums(self.device)
        self.tracer = Tracer(cfg.profile, run.traces, accelerator.process_index, self.device)
        self.progress = Progress()
        self.own_steps = 0  # done by this process
        self.wanted_stop = 0
        # Of each step of the epoch under way, and what its last step's weights would give: looked
        # at now and then, not step by step.
        self.losses = torch.zeros(self.train_data.steps() + 1, device=self.device)

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

    def _prepare(self) -> tuple[nn.Module, Any]:
        """Memory format and compilation are fastlab's; placement and DDP are Accelerate's."""
        settings, model = self.cfg.train, self.model
        if self.cfg.model.sync_batch_norm:
            model = self.model = synchronise(model, self.device)
        model.to(self.device, torch.float64 if settings.precision == "fp64" else torch.float32)
        models.set_memory_format(model, settings.channels_last)
        optimizer = make_optimizer(self.cfg.optim, model)
        if settings.compile:
            compile_forward(model, settings)
        with warnings.catch_warnings():
            # torch 2.15 has another name for it, which torch 2.11 and Accelerate do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return self.accelerator.prepare(model, optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": asdict(self.progress),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            # Of all processes: a resumed run puts it on the main one.
            "sums": self.accelerator.reduce(self.sums.values.clone(), "sum").cpu(),
        }

    def save(self) -> None:
        with span("checkpoint"):  # a review leaves it out of the step around it
            self.refuse_divergence()
            done = self.progress.epoch * self.train_data.steps() + self.progress.step
            state = self.state_dict()
            own = self.average.buffers if self.average else ()
            checkpoint.save(self.run.checkpoints, done, self.model, state, self.accelerator, own)

    def restore(self) -> None:
        check_dataset(self.run, self.cfg, self.manifest)
        path = checkpoint.last(self.run.checkpoints)
        if path is not None:
            state, own = checkpoint.load(path, self.model, self.accelerator.process_index)
            state["progress"].pop("rates", None)  # of checkpoints before this
            self.progress = Progress(**state["progress"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
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

    def agree_to_stop(self, due: bool) -> None:
        """Raise `Stop` where a signal reached any process. With several, all look where it is
        `due`, since none may leave the others waiting in a reduction."""
        if due:
            self.refuse_divergence()
        wanted = self.wanted_stop
        if self.accelerator.num_processes > 1:
            wanted = self._most(wanted) if due else 0
        if wanted:
            raise Stop(wanted)

    def refuse_divergence(self) -> None:
        """Raise `UserError` where a loss was no finite number: before anything is saved that came
        after it. Every process calls this at the same step."""
        bad = ~self.losses.isfinite()
        left = len(bad) - int(bad.int().argmax()) if bool(bad.any()) else 0
        if self.accelerator.num_processes > 1:
            left = self._most(left)
        if not left:
            return
        step = len(bad) - left + 1
        self.diverged("loss", f"at step {step}" if step < len(bad) else "after the last step")

    def diverged(self, what: str, where: str) -> NoReturn:
        """Of every process."""
        last = checkpoint.last(self.run.checkpoints)
        kept = f"{last} is whole" if last else "there was no checkpoint yet"
        write_summary(self, "diverged")
        with agreed(self.accelerator):
            raise UserError(
                f"{self.run.path}: the {what} is not a finite number {where} of epoch "
                f"{self.progress.epoch + 1}; {kept}; try a lower optim.lr or train.grad_clip"
            )

    @torch.no_grad()
    def try_weights(self, batch: Batch) -> None:
        """Note the loss that the weights give now, as that of the step to come: no loss so far came
        of the last update, and a checkpoint that diverged must not replace a good one. Of every
        process, within an epoch; leaves statistics and random state as they were."""
        devices = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with span("checkpoint"):
            # Eagerly: to compile for it takes longer than it is worth.
            with torch.random.fork_rng(devices), self.accelerator.autocast():
                logits = type(self.model).forward(self.model, batch.images)
            self.losses[self.progress.step] = training_loss(logits, batch, self.cfg.train)
            for buffer, before in buffers:
                buffer.copy_(before)

    def _most(self, value: int) -> int:
        """The largest over all processes."""
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    from fastlab.cli import run_command

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


def compile_forward(model: nn.Module, settings: TrainConfig) -> None:
    """In place and inside DDP and autocast: names of weights stay as they are."""
    model.forward = torch.compile(model.forward, mode=settings.compile_mode, dynamic=False)


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
    """The same initial weights on every process, and TF32 where precision is mixed anyway: in
    matrix products and, by a switch of its own that is on by default, in convolutions."""
    mixed = cfg.train.precision not in ("fp32", "fp64")
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if mixed else "highest")
    torch.backends.cudnn.allow_tf32 = mixed
    set_seed(cfg.train.seed)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


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
    if progress.epoch == 0 and progress.step == 0:
        # The weights are alike by now; dropout is not to be alike on every process.
        torch.manual_seed(trainer.cfg.train.seed + 7919 * (accelerator.process_index + 1))
    write_summary(trainer, "running")
    if slow_bf16(trainer.device, trainer.cfg.train.precision):
        accelerator.print(_SLOW_BF16)
    if trainer.cfg.train.compile and trainer.device.type == "cpu":
        accelerator.print(_COMPILING, flush=True)
    status = 0
    with signals_to(trainer), tensorboard(trainer) as board, trainer.tracer:
        try:
            while progress.epoch < trainer.cfg.train.epochs:
                # Between epochs too: one may be shorter than train.log_every.
                trainer.agree_to_stop(due=True)
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
        progress.lr = trainer.optimizer.param_groups[0]["lr"]
    trained, rate = train_epoch(trainer, started)
    trainer.tracer.end_epoch()
    average_buffers(trainer)
    with trainer.average.applied() if trainer.average else nullcontext():
        found = evaluate(trainer.net, trainer.val_data, trainer.accelerator)
        if not math.isfinite(found.loss):
            trainer.diverged("validation loss", "at the end")
        if found.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = found.top1, progress.epoch + 1
            if trainer.accelerator.is_main_process:
                checkpoint.save_weights(trainer.model, trainer.run.best)
    if isinstance(trainer.schedule, ReduceLROnPlateau):
        trainer.schedule.step(found.top1)
    progress.epoch, progress.step = progress.epoch + 1, 0
    trainer.sums.values.zero_()
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    if trainer.accelerator.is_main_process:
        record(trainer, board, trained, found, rate, seconds)
    trainer.save()


def train_epoch(trainer: Trainer, started: float) -> tuple[Figures, float]:
    """The steps that are left of the epoch. Returns its figures, in training mode, weights
    changing; and images/s over all processes, the first steps of the process left out."""
    progress, settings = trainer.progress, trainer.cfg.train
    steps, first = trainer.train_data.steps(), progress.step
    done = progress.epoch * steps + first
    # The first steps of the process: where an epoch, or what is left of it, is short, half of them.
    warm = first + min(max(0, _WARMUP_STEPS - trainer.own_steps), (steps - first) // 2)
    trainer.model.train()
    trainer.net.train()
    clock = time.perf_counter()
    with progress_bar(trainer, steps, first) as bar:
        for batch in trainer.tracer.steps(trainer.train_data.epoch(progress.epoch, first), done):
            trainer.losses[progress.step] = train_step(trainer, batch)
            progress.step += 1
            trainer.own_steps += 1
            if progress.step == warm:
                wait_for_device(trainer.device)
                clock = time.perf_counter()
            if progress.step % settings.log_every == 0 or progress.step == steps:
                show(bar, trainer, progress.step)
            if progress.step == steps:
                break  # the epoch's end makes its own checkpoint; a stop waits for it
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                save_within(trainer, batch, started)
            try:
                trainer.agree_to_stop(due=progress.step % settings.log_every == 0)
            except Stop:
                trainer.try_weights(batch)
                progress.seconds += time.perf_counter() - started
                raise
    if trainer.average:  # then validation tries other weights
        trainer.try_weights(batch)
    trainer.refuse_divergence()
    figures = trainer.sums.reduce(trainer.accelerator)
    return figures, (steps - warm) * settings.batch_size / (time.perf_counter() - clock)


def train_step(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Forward, backward, update: nothing here waits for the device. Returns this process's loss."""
    settings, optimizer = trainer.cfg.train, trainer.optimizer
    with span("forward"):
        logits = trainer.net(batch.images)
        loss = training_loss(logits, batch, settings)
    with span("backward"):
        trainer.accelerator.backward(loss)
    with span("optimizer"):
        if settings.grad_clip:
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not isinstance(trainer.schedule, ReduceLROnPlateau):
            trainer.schedule.step()
        if trainer.average:
            trainer.average.update()
    trainer.sums.add(logits.detach(), batch.labels, batch.mask)
    return loss.detach()


def training_loss(logits: torch.Tensor, batch: Batch, settings: TrainConfig) -> torch.Tensor:
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        batch.labels,
        label_smoothing=settings.label_smoothing,
    )


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


def save_within(trainer: Trainer, batch: Batch, started: float) -> None:
    """A checkpoint in the middle of an epoch, with the time it took so far."""
    trainer.try_weights(batch)
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


def show(bar: Any, trainer: Trainer, step: int) -> None:
    if not bar.disable:
        loss, hits, _, images = trainer.sums.values.tolist()
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
