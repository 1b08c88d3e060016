"""What sets the runs of a page apart: their datasets, which run is best, and their settings."""

from typing import NamedTuple

from fastlab.config import WITHOUT_EFFECT
from fastlab.report.texts import MISSING, flat, setting_text
from fastlab.run_records import Run, best_epoch
from fastlab.runs import same_images


class Standing(NamedTuple):
    """A run and its place among the runs of a page."""

    run: Run
    dataset: int
    """The number of its dataset, from 0. Most of the runs have number 0; figures of runs with
    different numbers are not comparable."""
    best: bool
    """Whether no other run on its dataset has a higher top-1; False where it is the only one."""


def ranked(runs: list[Run]) -> list[Standing]:
    """The runs by dataset, those of a dataset by their best validation top-1, the highest first."""
    standings = []
    for number, group in enumerate(_by_dataset(runs)):
        group.sort(key=_top1, reverse=True)
        highest = _top1(group[0])
        rated = len(group) > 1 and highest >= 0
        standings += [Standing(run, number, rated and _top1(run) == highest) for run in group]
    return standings


def _by_dataset(runs: list[Run]) -> list[list[Run]]:
    groups: list[list[Run]] = []
    for run in runs:
        same = (group for group in groups if same_images(group[0].dataset, run.dataset))
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return sorted(groups, key=len, reverse=True)


def _top1(run: Run) -> float:
    """The best validation top-1, 0 to 1; -1 where no epoch has a value."""
    value = (best_epoch(run) or {}).get("val_top1")
    return -1.0 if value is None else value


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """The settings that are not equal in all runs, and on which figures depend: section.key -> the
    value of each run as text. `data.path`, which often differs from machine to machine, comes
    last."""
    values = [{name: setting_text(v) for name, v in flat(run.config).items()} for run in runs]
    names = dict.fromkeys(name for each in values for name in each if name not in WITHOUT_EFFECT)
    columns = {
        name: [each.get(name, MISSING) for each in values] for name in sorted(names, key=_is_path)
    }
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def _is_path(name: str) -> bool:
    return name == "data.path"
