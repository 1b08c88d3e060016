"""Ablation studies as data: a TOML file is a base configuration, rows that change it, and seeds.

    title = "Initial learning rate, ResNet-11"
    base = "../resnet11.toml"            # relative to the study's own file
    seeds = [0, 1, 2]
    factor = "optim.lr"                  # one key and its values ...
    values = [0.005, 0.015, 0.05]

    [[rows]]                             # ... or rows, each of which sets any number of keys
    label = "none"                       # optional: by default, the row's values
    model.dropout_conv = 0.0
    model.dropout_fc = 0.0

    [[findings]]                         # claims that the report decides by top-1, seed by seed:
    claim = "without dropout it overfits"
    better = "0.2, 0.2"                  # that this row lies above
    worse = ["none"]                     # each of these rows
    reported = true                      # the reference report claims it; default: false

A finding with `chance = ["label"]` claims instead that these rows learn nothing.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.report.texts import flat, setting_text

# The keys of a study file and of a finding, with defaults of the type that each takes.
_STUDY: dict[str, Any] = {
    **dict.fromkeys(("title", "about", "base", "factor"), ""),
    **{key: [] for key in ("values", "rows", "findings")},
    "seeds": [0, 1, 2],
}
_FINDING = {"claim": "", "better": "", "worse": [], "chance": [], "reported": False}


@dataclass(frozen=True)
class Task:
    """One training. Studies that ask for equal configurations share one task."""

    name: str
    config: Config

    @property
    def seed(self) -> int:
        return self.config.train.seed


@dataclass(frozen=True)
class Row:
    """One value of a factor: a training for each seed."""

    label: str
    tasks: tuple[Task, ...]

    @property
    def config(self) -> Config:
        """The configuration with the first seed."""
        return self.tasks[0].config


@dataclass(frozen=True)
class Finding:
    """A claim about rows, named by their labels: that `better` lies above each of `worse`, or that
    the rows of `chance` learn nothing."""

    claim: str
    better: str = ""
    worse: Sequence[str] = ()
    chance: Sequence[str] = ()
    reported: bool = False
    """Whether the reference report makes this claim."""


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    about: str
    rows: list[Row]
    findings: list[Finding]
    planned: int | None = None
    """Number of seeds before any was added after a look at the results; None: none may be."""


def make_task(config: Config) -> Task:
    """The task of `config`, named by model, a hash of the settings that differ from the defaults
    (but those without effect), and seed. A setting that a later fastlab adds therefore renames no
    existing run."""
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(Config())
    changed = {
        f"{section}.{key}": value
        for section, table in values.items()
        for key, value in table.items()
        if value != defaults[section][key]
        and f"{section}.{key}" not in {"train.seed", *configs.WITHOUT_EFFECT}
    }
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]
    return Task(f"{model_text(config)}-{digest}-seed{config.train.seed}", config)


def model_text(config: Config) -> str:
    """The model's name as part of a file's name: "timm:resnet10t.c3" is "timm-resnet10t-c3"."""
    return re.sub(r"\W+", "-", config.model.name)


def read_study(path: Path, overrides: list[str], epochs: int = 0, seeds: int = 0) -> Study:
    """Read a study file. `overrides` (``section.key=value``) and `epochs` change every row, except
    for the keys that the row itself sets. `seeds` is the number of seeds; 0: those of the file.

    Raises `UserError` where the file is not a valid study.
    """
    if epochs:
        overrides = [*overrides, f"train.epochs={epochs}"]
    table = configs.read_toml(path, "name a study file")
    try:
        return _study(path, _with_defaults(table, _STUDY, ""), overrides, seeds)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tasks_of(studies: list[Study]) -> list[Task]:
    """Each training once. All rows come with their first seed before any comes with its second, so
    that a study which is stopped early has a figure for every row."""
    rows = [row.tasks for study in studies for row in study.rows]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*rows))
    return list({task.name: task for task in in_turn if task}.values())


def _study(path: Path, table: dict[str, Any], overrides: list[str], count: int) -> Study:
    if not (table["title"] and table["base"]):
        raise UserError("title or base is missing; docs/studies.md shows a study")
    base, seeds = path.parent / table["base"], _seeds(table["seeds"], count)
    rows = [
        _row(base, label, settings, overrides, seeds) for label, settings in _row_settings(table)
    ]
    labels = [row.label for row in rows]
    findings = [_finding(raw, labels) for raw in table["findings"]]
    return Study(path.stem, table["title"], table["about"], rows, findings)


def _with_defaults(table: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    for key, value in table.items():
        if key not in defaults:
            raise UserError(f"{where}{key!r}: unknown key; valid: {', '.join(defaults)}")
        kind = type(defaults[key])
        if type(value) is not kind:
            raise UserError(f"{where}{key}: expected a {kind.__name__}, got {value!r}")
        if key in ("rows", "findings") and any(type(item) is not dict for item in value):
            raise UserError(f"{key}: expected tables, [[{key}]], got {value!r}")
    return {**defaults, **table}


def _seeds(listed: list[Any], count: int) -> list[int]:
    """The listed seeds, cut or continued with the smallest unused numbers to `count`; 0: all."""
    if not listed or any(type(seed) is not int for seed in listed) or len({*listed}) < len(listed):
        raise UserError(f"seeds: expected different whole numbers, got {listed!r}")
    return next_seeds(listed, count or len(listed))


def next_seeds(seeds: list[int], count: int) -> list[int]:
    """`seeds`, cut or continued with the smallest unused numbers to `count`."""
    unused = [seed for seed in range(count + len(seeds)) if seed not in seeds]
    return [*seeds, *unused][:count]


def _row_settings(table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each row's label, and its settings by ``section.key``."""
    factor, values, rows = table["factor"], table["values"], table["rows"]
    if rows and (factor or values):
        raise UserError("give factor and values, or rows, not both")
    if factor:
        labelled = [(setting_text(value), {factor: value}) for value in values]
    else:
        labelled = [_label_and_settings(raw) for raw in rows]
    if not labelled:
        raise UserError("has no rows: factor and values are missing or empty")
    labels = [label for label, _ in labelled]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two rows are labelled {label!r}; give each a label")
    return labelled


def _label_and_settings(raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = {}
    for name, section in raw.items():
        if name == "label":
            continue
        if not isinstance(section, dict):
            raise UserError(f"rows: {name}: expected section.key = value")
        settings |= flat(section, f"{name}.")
    label = raw.get("label", ", ".join(map(setting_text, settings.values())))
    if not isinstance(label, str) or not label:
        raise UserError(f"rows: label: expected a text, got {label!r}")
    return label, settings


def toml_text(value: Any) -> str:
    """`value` as TOML on one line, as `configs.load` takes it. JSON would not do: some of its
    strings are no TOML strings."""
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip().replace("\n", " ")


def _row(
    base: Path, label: str, settings: dict[str, Any], overrides: list[str], seeds: list[int]
) -> Row:
    changes = [*overrides, *(f"{key}={toml_text(value)}" for key, value in settings.items())]
    try:
        for change in changes:
            if change.startswith("train.seed="):
                raise UserError(f"--set {change}: list the study's seeds = [0, 1, 2] instead")
        loaded = [configs.load(base, [*changes, f"train.seed={seed}"]) for seed in seeds]
    except UserError as error:
        raise UserError(f"row {label!r}: {error}") from None
    return Row(label, tuple(make_task(config) for config in loaded))


def _finding(raw: dict[str, Any], labels: list[str]) -> Finding:
    finding = Finding(**_with_defaults(raw, _FINDING, "findings: "))
    compares = bool(finding.better) and bool(finding.worse)
    if not finding.claim or compares == bool(finding.chance):
        raise UserError("findings: each needs a claim, and better and worse or chance")
    for label in [*finding.worse, *finding.chance, finding.better or labels[0]]:
        if label not in labels:
            raise UserError(f"findings: no row {label!r}; rows: {'; '.join(labels)}")
    return finding
