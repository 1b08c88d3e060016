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

    [[findings]]                         # claims that the report decides by intervals of top-1:
    claim = "without dropout it overfits"
    better = "0.2, 0.2"                  # that this row lies above
    worse = ["none"]                     # each of these rows
    reported = true                      # the reference report claims it; default: false

A finding with `chance = ["label"]` claims instead that these rows learn nothing.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError

_STUDY_TYPES: dict[str, type] = {
    **dict.fromkeys(("title", "about", "base", "factor"), str),
    **dict.fromkeys(("values", "labels", "rows", "seeds", "findings"), list),
}
_FINDING_TYPES: dict[str, type] = {
    **dict.fromkeys(("claim", "better"), str),
    **dict.fromkeys(("worse", "chance"), list),
    "reported": bool,
}


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
    worse: tuple[str, ...] = ()
    chance: tuple[str, ...] = ()
    reported: bool = False
    """Whether the reference report makes this claim."""


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]


class _Variant(NamedTuple):
    """A row before it is applied to the base configuration."""

    label: str
    settings: dict[str, Any]
    """Values by `section.key`."""


def make_task(config: Config) -> Task:
    """The task of `config`, named by model, a hash of the settings that differ from the defaults,
    and seed. A setting that a later fastlab adds therefore renames no existing run."""
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
    """Read a study file. `overrides` (``section.key=value``) and `epochs` change every row, except
    for the keys that the row itself sets. `seeds` is the number of seeds; 0: those of the file.

    Raises `UserError` where the file is not a valid study.
    """
    for override in overrides:
        _refuse_seed(override.partition("=")[0], f"--set {override}")
    if epochs:
        overrides = [*overrides, f"train.epochs={epochs}"]
    table = configs.read_toml(path, "name a study file")
    try:
        return _study(path, table, overrides, seeds)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tasks_of(studies: list[Study]) -> list[Task]:
    """Each training once. All rows come with their first seed before any comes with its second, so
    that a study which is stopped early has a figure for every row."""
    most_seeds = max((len(row.tasks) for study in studies for row in study.rows), default=0)
    tasks = {
        row.tasks[index].name: row.tasks[index]
        for index in range(most_seeds)
        for study in studies
        for row in study.rows
        if index < len(row.tasks)
    }
    return list(tasks.values())


def _study(path: Path, table: dict[str, Any], overrides: list[str], seeds: int) -> Study:
    _check_types(table, _STUDY_TYPES, "")
    for key in ("title", "base"):
        if key not in table:
            raise UserError(f"{key} is missing; README.md shows a study")
    base, numbers = path.parent / table["base"], _seeds(table, seeds)
    rows = tuple(_row(base, variant, overrides, numbers) for variant in _variants(table))
    labels = [row.label for row in rows]
    findings = tuple(_finding(raw, labels) for raw in table.get("findings", []))
    return Study(path.stem, table["title"], table.get("about", ""), rows, findings)


def _check_types(table: dict[str, Any], types: dict[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in types:
            raise UserError(f"{where}{key!r}: unknown key; valid: {', '.join(types)}")
        if type(value) is not types[key]:
            raise UserError(f"{where}{key}: expected a {types[key].__name__}, got {value!r}")


def _seeds(table: dict[str, Any], count: int) -> list[int]:
    """The listed seeds, cut or continued with the smallest unused numbers to `count`; 0: all."""
    listed = table.get("seeds", [0, 1, 2])
    if not listed or any(type(seed) is not int for seed in listed) or len({*listed}) < len(listed):
        raise UserError(f"seeds: expected different whole numbers, got {listed!r}")
    unused = [seed for seed in range(count + len(listed)) if seed not in listed]
    return [*listed, *unused][: count or len(listed)]


def _variants(table: dict[str, Any]) -> list[_Variant]:
    if "rows" in table and {"factor", "values", "labels"} & table.keys():
        raise UserError("give factor and values, or rows, not both")
    if "rows" in table:
        variants = [_row_variant(raw) for raw in table["rows"]]
    else:
        variants = _factor_variants(table)
    if not variants:
        raise UserError("has no rows")
    labels = [variant.label for variant in variants]
    for label, settings in variants:
        if labels.count(label) > 1:
            raise UserError(f"two rows are labelled {label!r}; give each a label")
        for key in settings:
            _refuse_seed(key, f"row {label!r}")
    return variants


def _factor_variants(table: dict[str, Any]) -> list[_Variant]:
    if not {"factor", "values"} <= table.keys():
        raise UserError("factor and values are missing, or rows")
    values = table["values"]
    labels = table.get("labels", [_text(value) for value in values])
    if len(labels) != len(values) or any(type(label) is not str for label in labels):
        raise UserError("labels: expected one text for each of the values")
    pairs = zip(labels, values, strict=True)
    return [_Variant(label, {table["factor"]: value}) for label, value in pairs]


def _row_variant(raw: Any) -> _Variant:
    if not isinstance(raw, dict):
        raise UserError(f"rows: expected tables, [[rows]], got {raw!r}")
    settings = {}
    for name, section in raw.items():
        if name == "label":
            continue
        if not isinstance(section, dict):
            raise UserError(f"rows: {name}: expected section.key = value")
        settings |= {f"{name}.{key}": value for key, value in section.items()}
    label = raw.get("label", ", ".join(map(_text, settings.values())))
    if not isinstance(label, str) or not label:
        raise UserError(f"rows: label: expected a text, got {label!r}")
    return _Variant(label, settings)


def _refuse_seed(key: str, where: str) -> None:
    """Each row is trained with every seed of the study, so a row cannot set its seed."""
    if key == "train.seed":
        raise UserError(f"{where}: train.seed is not set here; list the study's seeds = [0, 1, 2]")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _toml(value: Any) -> str:
    """`value` as TOML on one line, as `configs.load` takes it. JSON would not do: some of its
    strings are no TOML strings."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)  # no key takes one: this is for the error message
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _row(base: Path, variant: _Variant, overrides: list[str], seeds: list[int]) -> Row:
    settings = [f"{key}={_toml(value)}" for key, value in variant.settings.items()]
    try:
        loaded = [
            configs.load(base, [*overrides, *settings, f"train.seed={seed}"]) for seed in seeds
        ]
    except UserError as error:
        raise UserError(f"row {variant.label!r}: {error}") from None
    return Row(variant.label, tuple(make_task(config) for config in loaded))


def _finding(raw: Any, labels: list[str]) -> Finding:
    if not isinstance(raw, dict):
        raise UserError(f"findings: expected tables, [[findings]], got {raw!r}")
    _check_types(raw, _FINDING_TYPES, "findings: ")
    compares = bool(raw.get("better")) and bool(raw.get("worse"))
    if not raw.get("claim") or compares == bool(raw.get("chance")):
        raise UserError("findings: each needs a claim, and better and worse or chance")
    lists = {key: tuple(raw.get(key, ())) for key in ("worse", "chance")}
    finding = Finding(
        raw["claim"], raw.get("better", ""), reported=raw.get("reported", False), **lists
    )
    for label in [*finding.worse, *finding.chance, finding.better or labels[0]]:
        if label not in labels:
            raise UserError(f"findings: no row {label!r}; rows: {'; '.join(labels)}")
    return finding
