"""Which trainings run the same compiled code. Needs no torch."""

import dataclasses
from typing import Any

from fastlab.config import Config, ScheduleConfig

# What a step reads from the device, or what happens outside of compiled code.
_DATA = {
    "schedule": {field.name for field in dataclasses.fields(ScheduleConfig)} - {"name"},
    "train": {"seed", "log_every", "checkpoint_seconds", "checkpoint_every", "trackers"},
}


def code_of(config: Config) -> dict[str, Any]:
    """The settings that decide which code is compiled, by section. Trainings in which these are
    equal have the same shapes and constants, so that a process need not compile anew for the
    second. A probability of dropout is among them: it is a constant of the code."""
    return {
        section: {key: value for key, value in table.items() if key not in _DATA.get(section, ())}
        for section, table in dataclasses.asdict(config).items()
        if section != "optim"  # PyTorch's fused optimizers are compiled already
    }
