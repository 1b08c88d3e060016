"""Study files, made-up runs, and what the tests read of a report."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fastlab import cli
from fastlab import config as configs
from fastlab.study.folder import StudyDir
from fastlab.study.spec import Study, Task, read_study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
TINY = (
    "model.width=4",
    "train.batch_size=16",
    "train.eval_batch_size=20",
    "train.epochs=6",
    "train.checkpoint_every=1",
    "augment.translate=0",
)
_METRICS = ("train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5")


def read_studies(paths: list[Path], *overrides: str) -> list[Study]:
    return [read_study(path, list(overrides)) for path in paths]


def write_study(folder: Path, body: str, name: str = "mine") -> Path:
    path = folder / f"{name}.toml"
    base = ROOT / "configs" / "demo.toml"
    path.write_text(f'title = "Mine"\nbase = "{base}"\n{body}\n')
    return path


def run_command(*arguments: str | Path) -> int:
    """The exit status of ``fastlab study``."""
    return cli.main(["study", *map(str, arguments)])


def make_run(folder: StudyDir, task: Task, top1: float, status: str = "finished") -> None:
    """Write a run directory of three epochs, whose second is the best with `top1`."""
    run = folder.run(task)
    run.mkdir(parents=True)
    (run / "config.toml").write_text(configs.dump(task.config))
    (run / "environment.json").write_text(
        json.dumps({"date": "2026-11-24", "machine": {"cores": 2}})
    )
    lines = []
    for epoch, value in enumerate((top1 / 2, top1, top1 - 0.001), 1):
        metrics = {"epoch": epoch, **dict.fromkeys(_METRICS, value), "val_loss": 2 - value}
        lines.append({**metrics, "val_top5": 2 * value, "images_per_second": 100.0, "seconds": 2.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"train": 100, "val": 500}
    dataset = {"path": "d", "classes": 10, "image_size": 32, "counts": counts}
    summary = {"parameters": 1, "dataset": dataset, "status": status, "train_seconds": 6.0}
    (run / "summary.json").write_text(json.dumps(summary))


class Page(HTMLParser):
    """The elements of a page in order, each with its attributes, the text in it ("text") and the
    tags around it ("within")."""

    VOID = ("meta", "link", "br", "wbr", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        within = [element["tag"] for element in self.open]
        element = {"tag": tag, "text": "", "within": within, **dict(attrs)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if element["tag"] == tag]
