"""Readable names of a study's runs, such as resnet11-dropout-0.2-0.5-seed1."""

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fastlab import config as configs
from fastlab.console import UserError
from fastlab.study.folder import StudyDir
from fastlab.study.spec import Row, Study, Task, make_task, model_text

_LONGEST = 80  # characters of a name without its seed; a file name may have 255 bytes


def with_names(folder: StudyDir, studies: list[Study]) -> list[Study]:
    """The studies with each run named by its model, study, row and seed. A configuration that
    `folder` already holds keeps its name, whichever study asked for it first, and studies that ask
    for equal configurations share the name. Where another configuration, such as one of other
    epochs, has the name, a hash of the settings follows the row."""
    names = _names_on_disk(folder)
    named = []
    for study in studies:
        rows = []
        for row in study.rows:
            tasks = [_named(study, row, task, names) for task in row.tasks]
            rows.append(replace(row, tasks=tuple(tasks)))
        named.append(replace(study, rows=rows))
    return named


def selected(tasks: list[Task], patterns: Sequence[str]) -> list[Task]:
    """The tasks whose name matches one of `patterns` (as a shell's, such as ``*-seed0``); all of
    them without patterns. Raises `UserError` for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(task.name, pattern) for task in tasks):
            raise UserError(
                f"--only {pattern}: matches none of {len(tasks)} runs, such as {tasks[0].name}; "
                f"--dry-run lists them"
            )
    return [
        task
        for task in tasks
        if not patterns or any(fnmatchcase(task.name, pattern) for pattern in patterns)
    ]


def _names_on_disk(folder: StudyDir) -> dict[str, str]:
    """Name by identity, that is by what `make_task` calls the configuration."""
    names = {}
    for path in sorted(folder.config("*").parent.glob("*.toml")):
        try:
            names[make_task(configs.load(path)).name] = path.stem
        except UserError:  # of another version, which had other settings
            names[f"unreadable {path.stem}"] = path.stem
    return names


def _named(study: Study, row: Row, task: Task, names: dict[str, str]) -> Task:
    """The task under its name in `names`, where a new one is added."""
    identity = make_task(task.config).name
    if identity not in names:
        name = f"{_row_name(study, row)}-seed{task.seed}"
        if name in names.values():
            digest = identity.split("-")[-2][:6]
            name = f"{_row_name(study, row)}-{digest}-seed{task.seed}"
        names[identity] = name
    return replace(task, name=names[identity])


def _row_name(study: Study, row: Row) -> str:
    """Model, subject of the study and label of the row: "cnn-dropout" of a CNN is about dropout."""
    model = model_text(row.config)
    subject = study.name.removeprefix(model.rstrip("0123456789")).lstrip("-")
    label = "" if row.label == model else row.label
    parts = (re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") for text in (subject, label))
    return "-".join([model, *filter(None, parts)])[:_LONGEST]
