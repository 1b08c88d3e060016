import math

import pytest

from fastlab import config as configs
from fastlab.study.reference import find_reference, reference_table
from tests.study.studies import ROOT, SHIPPED, read_studies


def test_every_row_of_the_reference_belongs_to_exactly_one_shipped_row():
    references = {
        row.tasks[0].name: find_reference(row.config)
        for study in read_studies(SHIPPED, "model.width=8", "train.epochs=2", "schedule.patience=1")
        for row in study.rows
    }
    figures = [reference for reference in references.values() if reference]
    assert len(figures) == len(reference_table()["rows"]) == 24
    deep = find_reference(configs.load(ROOT / "configs/resnet15.toml"))
    assert deep and deep["top1"] == 0.4322
    plain = configs.load(ROOT / "configs/resnet15.toml", ["model.shortcuts=false"])
    assert find_reference(plain) is None
    assert find_reference(configs.load(ROOT / "configs/resnet11-modern.toml")) is None


def test_the_printed_loss_is_converted_to_mean_cross_entropy():
    without_norm = configs.load(ROOT / "configs/cnn8.toml", ["model.batch_norm=false"])
    reference = find_reference(without_norm)
    # At chance among 200 classes.
    assert reference and reference["loss"] == pytest.approx(math.log(200), rel=2e-3)
