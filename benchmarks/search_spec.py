"""The file of a search: a base configuration, the values to try, and how long to train.

title = "Rate and smoothing"
base = "../../configs/resnet11.toml"   # relative to the file
candidates = 30          # the base, and 29 others drawn without repetition from [space]
seed = 0                 # of the draw
rungs = [3, 6, 12]       # epochs: every candidate trains a whole schedule of 3 ...
keep = 0.33              # ... and this share of them, the best, a whole one of 6, and so on
seeds = [0]              # of the trainings; those after the first at the last rung only

[set]                    # what all candidates change in the base
train.batch_size = 512

[space]                  # a candidate takes one value of each list
optim.lr = [0.003, 0.006, 0.012]
train.label_smoothing = [0.0, 0.1]
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.records.clock import overrides
from fastlab import config as configs
from fastlab.config import Config
from fastlab.console import UserError
from fastlab.fields import Factor, Positive, Seed, checked
from fastlab.report.texts import setting_text

# The keys of a file, with defaults of the type that each takes.
_KEYS: dict[str, Any] = {
    "title": "",
    "base": "",
    "candidates": 0,
    "seed": 0,
    "rungs": [],
    "keep": 0.33,
    "seeds": [0],
    "set": {},
    "space": {},
}
_ELSEWHERE = {"train.epochs": "rungs", "train.seed": "seeds", "data.path": "--data"}
_ONE_A_PROCESS = {"train.precision": "[set]", "train.deterministic": "[set]"}


@dataclass(frozen=True)
class Candidate:
    name: str
    """"base", or its number in the order of the draw."""
    settings: dict[str, Any]
    """Its values of the space, by ``section.key``."""
    config: Config

    @property
    def label(self) -> str:
        values = (f"{key} = {setting_text(value)}" for key, value in self.settings.items())
        return f"{self.name} ({', '.join(values)})"

    def trained(self, epochs: int, seed: int) -> Config:
        """The configuration of its training over `epochs` by `seed`."""
        return replace(self.config, train=replace(self.config.train, epochs=epochs, seed=seed))


@dataclass(frozen=True)
class Search:
    title: str
    candidates: list[Candidate]
    rungs: list[int]
    """Epochs, ascending."""
    keep: float
    seeds: list[int]

    def budgets(self) -> list[tuple[int, int]]:
        """(epochs, seed) of the trainings of a candidate that survives every rung, in order."""
        first, *others = self.seeds
        return [(epochs, first) for epochs in self.rungs] + [
            (self.rungs[-1], seed) for seed in others
        ]


def read_search(path: Path, sets: list[str]) -> Search:
    """Read the file of a search. `sets` (``section.key=value``) change every candidate, but for the
    keys of the space, epochs and seed.

    Raises `UserError` where it is not valid, or one of its candidates is not.
    """
    table = configs.read_toml(path, "name the file of a search")
    try:
        return _search(path, _with_defaults(table), sets)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _with_defaults(table: dict[str, Any]) -> dict[str, Any]:
    for key, value in table.items():
        if key not in _KEYS:
            raise UserError(f"{key!r}: unknown key; valid: {', '.join(_KEYS)}")
        if type(value) is not type(_KEYS[key]):
            kind = type(_KEYS[key]).__name__
            raise UserError(f"{key}: expected a value of type {kind}, got {value!r}")
    for key in ("title", "base", "candidates", "rungs", "space"):
        if not table.get(key):
            raise UserError(f"{key} is missing or empty; benchmarks/search_spec.py shows a file")
    return {**_KEYS, **table}


def _search(path: Path, table: dict[str, Any], sets: list[str]) -> Search:
    count = checked("candidates", Positive, table["candidates"])
    keep, seed = checked("keep", Factor, table["keep"]), checked("seed", Seed, table["seed"])
    rungs = [checked("rungs", Positive, epochs) for epochs in table["rungs"]]
    seeds = [checked("seeds", Seed, each) for each in table["seeds"]]
    if rungs != sorted(set(rungs)):
        raise UserError(f"rungs: expected ascending numbers of epochs, got {rungs}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: expected different whole numbers, got {seeds}")
    space, fixed = _flat("space", table["space"]), _flat("set", table["set"])
    _check_keys(fixed, space)
    shared = [*overrides(fixed), *sets, f"train.epochs={rungs[0]}"]
    candidates = _candidates(path.parent / table["base"], shared, space, count, seed)
    return Search(table["title"], candidates, rungs, keep, seeds)


def _candidates(
    file: Path, shared: list[str], space: dict[str, list[Any]], count: int, seed: int
) -> list[Candidate]:
    """The base, and `count` - 1 drawn ones."""
    base = configs.load(file, shared)
    candidates = [Candidate("base", _values(base, space), base)]
    for number, settings in enumerate(_draw(space, candidates[0].settings, count, seed), start=1):
        try:
            config = configs.load(file, [*shared, *overrides(settings)])
        except UserError as error:
            raise UserError(f"[space] {error}") from None
        candidates.append(Candidate(str(number), settings, config))
    return candidates


def _flat(where: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """``section.key`` -> value."""
    flat = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(f"[{where}] {section}: expected section.key = value, without quotes")
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def _check_keys(fixed: dict[str, Any], space: dict[str, Any]) -> None:
    for where, keys, shared in (
        ("set", fixed, _ELSEWHERE),
        ("space", space, _ELSEWHERE | _ONE_A_PROCESS),
    ):
        for key in keys:
            if key in shared:
                raise UserError(f"[{where}] {key}: all candidates share it; give {shared[key]}")
    for key, values in space.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"[space] {key}: expected a list of values, got {values!r}")
        if any(values.count(value) > 1 for value in values):
            raise UserError(f"[space] {key}: a value is listed twice in {values!r}")


def _values(config: Config, space: dict[str, Any]) -> dict[str, Any]:
    """The values that `config` has of the keys of the space."""
    sections, values = asdict(config), {}
    for key in space:
        section, _, name = key.partition(".")
        if name not in sections.get(section, ()):
            raise UserError(f"[space] {key}: no such setting; fastlab/config.py lists them")
        values[key] = sections[section][name]
    return values


def _draw(
    space: dict[str, list[Any]], base: dict[str, Any], count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` - 1 different points of the space, none of them `base`."""
    points = math.prod(map(len, space.values()))
    others = points - all(base[key] in values for key, values in space.items())
    if count - 1 > others:
        raise UserError(f"candidates = {count}: the base and [space] have only {others + 1}")
    drawn = []
    for number in random.Random(seed).sample(range(points), min(count, points)):
        chosen = {}
        for key, values in space.items():
            number, index = divmod(number, len(values))
            chosen[key] = values[index]
        if chosen != base:
            drawn.append(chosen)
    return drawn[: count - 1]
