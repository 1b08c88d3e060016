"""The reference report's figures, and which of its rows a configuration corresponds to."""

import dataclasses
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from fastlab import config as configs
from fastlab.config import Config

MEAN_OF_PRINTED = 10_000 / 79
"""Mean cross-entropy divided by the loss that the reference prints. Its 10,000 validation images
make 79 batches of 128; reference.toml has the reason."""

# The settings that are the scale of an experiment, not its subject. A run of another scale still
# stands beside the reference's row, and the page says that its scale differs.
_SCALE_SETTINGS = {
    "model": {"width", "sync_batch_norm"},
    "schedule": {"patience", "floor_patience"},
    "train": {field.name for field in dataclasses.fields(configs.TrainConfig)}
    - {"label_smoothing", "grad_clip", "ema"},
}


def find_reference(config: Config) -> dict[str, float] | None:
    """The figures of the reference's row with the settings of `config`, apart from its scale."""
    subject = _subject(config)
    for row in reference_table()["rows"]:
        wanted = _subject(Config())
        for section, settings in row["set"].items():
            wanted.update({(section, key): value for key, value in settings.items()})
        if subject == wanted:
            return reference_figures(row)
    return None


@cache
def reference_table() -> dict[str, Any]:
    """The content of reference.toml."""
    return tomllib.loads(Path(__file__).with_name("reference.toml").read_text(encoding="utf-8"))


def reference_figures(row: dict[str, Any]) -> dict[str, float]:
    """The figures of an entry of `reference_table`, from a single run: "loss" (mean cross-entropy),
    "top1" and "top5" (0 to 1)."""
    loss = row["loss_printed"] * MEAN_OF_PRINTED
    return {"loss": loss, "top1": row["top1"], "top5": row["top5"]}


def _subject(config: Config) -> dict[tuple[str, str], Any]:
    """The settings by section and key that are not the experiment's scale."""
    return {
        (section, key): value
        for section, table in dataclasses.asdict(config).items()
        for key, value in table.items()
        if section != "data" and key not in _SCALE_SETTINGS.get(section, ())
    }
