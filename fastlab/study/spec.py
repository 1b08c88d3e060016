"""Ablation studies as data: a TOML file is a base configuration, rows that change it, and seeds.

    title = "Initial learning rate, ResNet-11"
    base = "../resnet11.toml"            # relative to the study's own file
    seeds = [0, 1, 2]
    factor = "optim.lr"                  # one key and its values ...
    values = [0.005, 0.015, 0.05]

    [[rows]]                             # ... or rows, each of which sets any number of keys
    label = "none"                       # may be left out: the values are the label then
    model.dropout_conv = 0.0
    model.dropout_fc = 0.0

    [[findings]]                         # what the report decides by the intervals of top-1:
    claim = "without dropout it overfits"
    better = "0.2, 0.2"                  # that this row lies above
    worse = ["none"]                     # each of these
    reported = true                      # by the reference report; default: a question of ours

A finding with `chance = ["label"]` says instead that these rows learn nothing.
"""

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError

_KINDS = {
    "title": str,
    "about": str,
    "base": str,
    "factor": str,
    "values": list,
    "labels": list,
    "rows": list,
    "seeds": list,
    "findings": list,
}
_FINDING_KINDS = {"claim": str, "better": str, "worse": list, "chance": list, "reported": bool}


@dataclass(frozen=True)
class Task:
    """One training. Equal configurations are one task, whichever studies ask for it."""

    name: str
    config: Config

    @property
    def seed(self) -> int:
        return self.config.train.seed


@dataclass(frozen=True)
class Row:
    """One value of a factor, trained once a seed."""

    label: str
    tasks: tuple[Task, ...]

    @property
    def config(self) -> Config:
        """Of the first seed."""
        return self.tasks[0].config


@dataclass(frozen=True)
class Finding:
    claim: str
    better: str = ""
    worse: tuple[str, ...] = ()
    chance: tuple[str, ...] = ()
    reported: bool = False
    """Whether the reference report says so."""


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


def make_task(config: Config) -> Task:
    """Named by model, what differs from the defaults, and seed, so that a setting which fastlab
    gains later renames no run that was made without it."""
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    changed = {
        f"{section}.{key}": value
        for section, table in values.items()
        for key, value in table.items()
        if value != defaults[section][key] and (section, key) != ("train", "seed")
    }
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]
    return Task(f"{config.model.name}-{digest}-seed{config.train.seed}", config)


def read_study(path: Path, overrides: list[str], epochs: int = 0, seeds: int = 0) -> Study:
    """The study in a file. `overrides` (``section.key=value``) and `epochs` change every row but
    for what the row itself sets; `seeds` is how many, 0: as the file says.

    Raises `UserError` for anything that is not a valid study.
    """
    table = _read(path)
    _check(table, _KINDS, str(path))
    for key in ("title", "base"):
        if key not in table:
            raise UserError(f"{path}: {key} is missing; README.md shows a study")
    for override in overrides:
        _refuse_seed(override.partition("=")[0], f"--set {override}")
    if epochs:
        overrides = [*overrides, f"train.epochs={epochs}"]
    numbers = _seeds(path, table, seeds)
    rows = tuple(
        _row(path, table["base"], label, overrides, sets, numbers)
        for label, sets in _settings(path, table)
    )
    labels = [row.label for row in rows]
    double = {label for label in labels if labels.count(label) > 1}
    if double:
        raise UserError(f"{path}: two rows are labelled {double.pop()!r}; give each a label")
    findings = tuple(_finding(path, raw, labels) for raw in table.get("findings", []))
    return Study(path.stem, table["title"], table.get("about", ""), rows, findings)


def tasks_of(studies: list[Study]) -> list[Task]:
    """Each training once, all rows with their first seed before any with its second: a study that
    is stopped early has something to say about every row."""
    depth = max((len(row.tasks) for study in studies for row in study.rows), default=0)
    found = {
        row.tasks[turn].name: row.tasks[turn]
        for turn in range(depth)
        for study in studies
        for row in study.rows
        if turn < len(row.tasks)
    }
    return list(found.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a study file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _check(table: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in kinds:
            raise UserError(f"{where}: {key!r}: unknown key; valid: {', '.join(kinds)}")
        if type(value) is not kinds[key]:
            raise UserError(f"{where}: {key}: expected a {kinds[key].__name__}, got {value!r}")


def _seeds(path: Path, table: dict[str, Any], count: int) -> list[int]:
    listed = table.get("seeds", [0, 1, 2])
    if not listed or any(type(seed) is not int for seed in listed) or len({*listed}) < len(listed):
        raise UserError(f"{path}: seeds: expected different whole numbers, got {listed!r}")
    more = (seed for seed in range(count + len(listed)) if seed not in listed)
    while len(listed) < count:
        listed = [*listed, next(more)]
    return listed[: count or None]


def _settings(path: Path, table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Label and ``{section.key: value}`` of each row."""
    if "rows" in table:
        if {"factor", "values", "labels"} & table.keys():
            raise UserError(f"{path}: give factor and values, or rows, not both")
        found = [_row_settings(path, raw) for raw in table["rows"]]
    else:
        if not {"factor", "values"} <= table.keys():
            raise UserError(f"{path}: factor and values are missing, or rows")
        labels = table.get("labels", [_text(value) for value in table["values"]])
        if len(labels) != len(table["values"]) or any(type(v) is not str for v in labels):
            raise UserError(f"{path}: labels: expected one text for each of the values")
        pairs = zip(labels, table["values"], strict=True)
        found = [(label, {table["factor"]: value}) for label, value in pairs]
    if not found:
        raise UserError(f"{path}: has no rows")
    for label, sets in found:
        for key in sets:
            _refuse_seed(key, f"{path}: row {label!r}")
    return found


def _refuse_seed(key: str, where: str) -> None:
    """Every row is trained once a seed of the study, whatever it says itself."""
    if key == "train.seed":
        raise UserError(f"{where}: train.seed is not set here; list the study's seeds = [0, 1, 2]")


def _row_settings(path: Path, raw: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: rows: expected tables, [[rows]], got {raw!r}")
    sections = {key: value for key, value in raw.items() if key != "label"}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: rows: {name}: expected section.key = value")
    sets = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.items()}
    label = raw.get("label", ", ".join(map(_text, sets.values())))
    if not isinstance(label, str) or not label:
        raise UserError(f"{path}: rows: label: expected a text, got {label!r}")
    return label, sets


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _toml(value: Any) -> str:
    """On one line, as `configs.load` takes it. Of the strings of JSON not every one is TOML's."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)  # for the message: no key takes it
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _row(
    path: Path, base: str, label: str, overrides: list[str], sets: dict[str, Any], seeds: list[int]
) -> Row:
    own = [f"{key}={_toml(value)}" for key, value in sets.items()]
    try:
        found = [
            configs.load(path.parent / base, [*overrides, *own, f"train.seed={seed}"])
            for seed in seeds
        ]
    except UserError as error:
        raise UserError(f"{path}: row {label!r}: {error}") from None
    return Row(label, tuple(make_task(config) for config in found))


def _finding(path: Path, raw: Any, labels: list[str]) -> Finding:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: findings: expected tables, [[findings]], got {raw!r}")
    _check(raw, _FINDING_KINDS, f"{path}: findings")
    compares = bool(raw.get("better")) and bool(raw.get("worse"))
    if not raw.get("claim") or compares == bool(raw.get("chance")):
        raise UserError(f"{path}: findings: each needs a claim, and better and worse or chance")
    named = [*raw.get("worse", []), *raw.get("chance", []), raw.get("better") or labels[0]]
    for label in named:
        if label not in labels:
            raise UserError(f"{path}: findings: no row {label!r}; rows: {'; '.join(labels)}")
    lists = {key: tuple(raw.get(key, ())) for key in ("worse", "chance")}
    return Finding(
        raw["claim"], raw.get("better", ""), reported=raw.get("reported", False), **lists
    )
