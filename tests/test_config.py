"""Configurations: those that are shipped, round trips through a file, and what is refused."""

import math
import string
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlab.config import (
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    differences,
    dump,
    field_types,
    load,
)
from fastlab.console import UserError
from fastlab.fields import TRACKERS

FUZZ = settings(max_examples=120, deadline=None, database=None, derandomize=True)
CONFIGS = Path(__file__).parent.parent / "configs"
REFERENCE = ("cnn8", "cnn10", "cnn12", "resnet11", "resnet15", "resnet19")

POSITIVE = st.floats(0, 1e300, exclude_min=True)
NOT_NEGATIVE = st.floats(0, 1e300)
FRACTION = st.floats(0, 1, exclude_max=True)
COUNT = st.integers(1, 2**40)
SIZE = st.integers(0, 2**40)
STAGES = st.sampled_from([(), ((0.5, 32),), ((0.25, 16), (0.5, 24), (1.0, 32))])
VALUES = {
    "data": {
        "path": st.text(),
        "pipeline": st.sampled_from(["resident"]),
        "placement": st.sampled_from(["auto", "device", "stream"]),
        "workers": st.integers(0, 64),
        "hardware_load": st.floats(0, 1),
        "window": COUNT,
        "lanes": COUNT,
        "cache": st.text(),
        "cache_gib": POSITIVE,
    },
    "augment": {
        "flip": st.booleans(),
        "translate": SIZE,
        "padding": st.sampled_from(["reflect", "mean"]),
        "cutout": SIZE,
        "crop_scale": st.floats(0, 1, exclude_min=True),
        "mixup": NOT_NEGATIVE,
        "cutmix": NOT_NEGATIVE,
        "erasing": st.floats(0, 1),
        "rotation": st.floats(0, 180),
        "brightness": st.floats(0, 1),
        "contrast": st.floats(0, 1),
        "saturation": st.floats(0, 1),
        "hue": st.floats(0, 0.5),
        "trivial": st.booleans(),
    },
    "model": {
        "name": st.sampled_from([*REFERENCE, "resnet18", "speed8"]),
        "width": COUNT,
        "batch_norm": st.booleans(),
        "shortcuts": st.booleans(),
        "dropout_conv": FRACTION,
        "dropout_stem": FRACTION,
        "dropout_fc": FRACTION,
        "sync_batch_norm": st.booleans(),
        "arguments": st.just({}),
    },
    "optim": {
        "name": st.sampled_from(["adam", "adamw", "sgd", "muon"]),
        "lr": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "momentum": FRACTION,
        "beta1": FRACTION,
        "beta2": FRACTION,
        "eps": POSITIVE,
    },
    "schedule": {
        "name": st.sampled_from(["plateau", "cosine", "onecycle", "constant"]),
        "factor": st.floats(0, 1, exclude_min=True, exclude_max=True),
        "patience": SIZE,
        "threshold": NOT_NEGATIVE,
        "min_lr": NOT_NEGATIVE,
        "floor_patience": SIZE,
        "warmup": FRACTION,
        "final": FRACTION,
    },
    "train": {
        "epochs": COUNT,
        "batch_size": COUNT,
        "eval_batch_size": COUNT,
        "seed": st.integers(0, 2**31 - 1),
        "precision": st.sampled_from(["fp64", "fp32", "bf16", "fp16"]),
        "channels_last": st.booleans(),
        "compile": st.booleans(),
        "step": st.sampled_from(["auto", "captured", "eager"]),
        "image_size": STAGES,
        "label_smoothing": FRACTION,
        "grad_clip": NOT_NEGATIVE,
        "ema": FRACTION,
        "log_every": COUNT,
        "checkpoint_seconds": NOT_NEGATIVE,
        "checkpoint_every": SIZE,
        "trackers": st.lists(st.sampled_from(TRACKERS), unique=True).map(tuple),
        "deterministic": st.booleans(),
    },
    "evaluate": {"tta": st.sampled_from(["none", "flip"])},
    "profile": {
        "enabled": st.booleans(),
        "wait": SIZE,
        "warmup": SIZE,
        "active": COUNT,
        "stacks": st.booleans(),
        "memory": st.booleans(),
    },
}

ARGUMENT = st.one_of(
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
OTHER_MODELS = st.builds(
    ModelConfig,
    name=st.sampled_from(["timm:convnext_atto", "timm:resnet10t.c3_in1k", "mine.models:network"]),
    sync_batch_norm=st.booleans(),
    arguments=st.dictionaries(
        st.sampled_from(["depths", "img_size", "größe", "_x"]), ARGUMENT | st.lists(ARGUMENT)
    ),
)


def configurations() -> st.SearchStrategy[Config]:
    tables = {name: st.builds(SECTIONS[name], **strategies) for name, strategies in VALUES.items()}
    tables["model"] |= OTHER_MODELS
    return st.builds(Config, **tables)


@pytest.fixture
def complaint(tmp_path):
    """Gives the message with which `load` refuses a file of this text, with these overrides."""

    def message_of(text: str, *overrides: str) -> str:
        path = tmp_path / "some.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            load(path, overrides)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message

    return message_of


def test_the_strategies_cover_every_field():
    sections: dict[str, Any] = SECTIONS  # dataclasses, which their type does not say
    every = {name: {f.name for f in fields(kind)} for name, kind in sections.items()}
    assert {name: set(strategies) for name, strategies in VALUES.items()} == every


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(config=configurations())
def test_a_dumped_configuration_is_loaded_as_it_was(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_loads_and_survives_a_round_trip(path, tmp_path):
    config = load(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(dump(config), encoding="utf-8")
    assert load(copy) == config


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_configuration_has_the_settings_of_the_report(name):
    loaded = asdict(load(CONFIGS / f"{name}.toml"))
    expected = {
        "model": {"name": name, "width": 64, "batch_norm": True, "shortcuts": True}
        | {"dropout_conv": 0.2, "dropout_stem": 0.15, "dropout_fc": 0.2},
        "optim": {"name": "adam", "lr": 0.015, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999},
        "schedule": {"name": "plateau", "factor": 0.1, "patience": 2}
        | {"threshold": 1e-4, "min_lr": 1e-8},
        "train": {"epochs": 100, "batch_size": 128}
        | {"label_smoothing": 0.0, "grad_clip": 0.0, "ema": 0.0},
        "augment": {"flip": False, "translate": 0, "cutout": 0, "crop_scale": 1.0},
    }
    for section, values in expected.items():
        assert {key: loaded[section][key] for key in values} == values


def test_without_a_file_every_value_is_the_default():
    assert load(None) == Config()


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[optimm]\nlr = 1.0", "optimm", "optim"),
        ("[modle]\nwidth = 8", "modle", "model"),
        ("[optim]\nlearning_rat = 1.0\n", "optim.learning_rat", None),
        ("[train]\nepoch = 3", "train.epoch", "train.epochs"),
        ("[model]\ndropout_con = 0.1", "model.dropout_con", "model.dropout_conv"),
        ("lr = 0.1", "lr", "optim.lr"),
        ("epoch = 3", "epoch", "train.epochs"),
        ("[model]\nepochs = 3", "model.epochs", "train.epochs"),
        ('name = "cnn8"', "name", "model.name or optim.name or schedule.name"),
        ("zzz = 1", "zzz", None),
        ('[data]\n"a\\nb" = 1', "data.a", None),
        ('["x\\ny"]\n', "x", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_valid_one(
    complaint, tmp_path, text, key, nearest
):
    message = complaint(text)
    assert f"{tmp_path / 'some.toml'}: {key}" in message
    assert "unknown" in message
    if nearest:
        assert message.endswith(f": {nearest}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # wrong type
        ("train.epochs", "2.0"),
        ("train.epochs", '"3"'),
        ("optim.lr", '"fast"'),
        ("model.name", "8"),
        ("augment.flip", "1"),
        ("augment.flip", '"true"'),
        ("data.path", "[]"),
        ("optim.lr", "{ start = 1.0 }"),
        ("train.seed", "2024-01-01"),
        # a boolean is not a number
        ("train.epochs", "true"),
        ("optim.lr", "false"),
        # not finite
        ("optim.lr", "nan"),
        ("optim.lr", "inf"),
        ("optim.weight_decay", "inf"),
        ("model.dropout_conv", "nan"),
        ("train.grad_clip", "nan"),
        pytest.param("optim.lr", "1" + "0" * 400, id="larger than any float"),
        # out of range
        ("optim.lr", "0.0"),
        ("optim.lr", "-0.1"),
        ("optim.weight_decay", "-1e-9"),
        ("model.width", "0"),
        ("model.dropout_fc", "1.0"),
        ("model.dropout_fc", "-0.1"),
        ("schedule.factor", "0.0"),
        ("schedule.factor", "1"),
        ("augment.crop_scale", "0.0"),
        ("augment.crop_scale", "1.01"),
        ("augment.translate", "-1"),
        ("augment.rotation", "180.1"),
        ("augment.brightness", "1.1"),
        ("augment.hue", "0.51"),
        ("train.batch_size", "0"),
        ("train.seed", "-1"),
        ("train.seed", "2147483648"),
        ("train.checkpoint_every", "-1"),
        ("train.checkpoint_seconds", "-0.1"),
        ("train.precision", '"fp8"'),
        ("data.pipeline", '"a\\nb"'),
        ("model.name", '""'),
        ("train.trackers", '"wandb"'),
        ("train.trackers", '["tensorbord"]'),
        ("train.trackers", '["wandb", "wandb"]'),
        ("train.trackers", "[[], 1]"),
        # too long or too deep to print
        pytest.param("train.seed", "0x" + "f" * 5000, id="5000 digits"),
        pytest.param("train.seed", "[0x" + "f" * 5000 + "]", id="5000 digits in an array"),
        pytest.param("data.path", "{" + "a." * 3000 + "a = 1}", id="3000 tables"),
    ],
)
def test_an_impossible_value_is_refused_in_a_file_and_on_the_command_line(complaint, key, value):
    section, name = key.split(".")
    in_file = complaint(f"[{section}]\n{name} = {value}\n")
    assert f"some.toml: {key}: expected " in in_file
    on_command_line = complaint("", f"{key}={value}")
    assert f"--set: {key}: expected " in on_command_line


@pytest.mark.parametrize("value", ["1", pytest.param("0x" + "f" * 5000, id="5000 digits")])
def test_a_value_in_place_of_a_section_is_refused(complaint, value):
    assert "some.toml: optim: expected a section" in complaint(f"optim = {value}")


@pytest.mark.parametrize(
    "text",
    [
        "[optim",
        "[optim]\nlr 0.1",
        "[optim]\nlr = 0.1\nlr = 0.2",
        "[data]\npath = 'a\nb'",
        pytest.param("[optim]\nlr = " + "[" * 5000, id="too deep"),
        pytest.param("[train]\nseed = " + "1" * 5000, id="too long"),
    ],
)
def test_bad_toml_is_refused(complaint, text):
    assert "some.toml: not valid TOML" in complaint(text)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.toml"
    path.write_bytes('[data]\npath = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.toml: not valid TOML"):
        load(path)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_an_unreadable_file_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=0.5", 0.5),
        ("optim.lr=5e-1", 0.5),
        ("optim.lr=1", 1.0),
        ("augment.flip=true", True),
        ("train.epochs=1_000", 1000),
        ("model.name=cnn8", "cnn8"),
        ('model.name="cnn8"', "cnn8"),
        ("model.name='cnn8'", "cnn8"),
        ("data.path=/some/where-1.2/x_y~", "/some/where-1.2/x_y~"),
        ('data.path="with space = and # mark"', "with space = and # mark"),
        ('data.path="a\\nb"', "a\nb"),
        ("data.path=''", ""),
        ("train.step=captured", "captured"),
    ],
)
def test_an_override_sets_one_value_and_nothing_else(override, expected):
    section, _, key = override.partition("=")[0].partition(".")
    values = asdict(load(None, [override]))
    value = values[section].pop(key)
    assert (value, type(value)) == (expected, type(expected))
    defaults = asdict(Config())
    del defaults[section][key]
    assert values == defaults


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr",
        "optim.lr=",
        "optim.lr=0.1 0.2",
        "a.b.c=1",
        ".lr=1",
        "optim.=1",
        "optim .lr=1",
        "data.path=two words",
        'data.path="open',
        "",
        "optim.lr=0.1\n[train]\nepochs = 1",
        "optim.lr=0.1\nextra = 1",
        "optim.lr\n=1",
        'data.path="""a\nb"""',
        "optim.lr=1\r\nextra = 1",
        "data.path=a\u2028b",
        pytest.param("data.path=" + "[" * 5000, id="too deep"),
    ],
)
def test_an_override_outside_the_grammar_is_refused(complaint, override):
    assert complaint("", override).startswith("--set ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.lr=1", "optm.lr: unknown key; nearest valid key: optim.lr"),
        ("epochs=2", "epochs: unknown key; nearest valid key: train.epochs"),
        ("epoch=2", "epoch: unknown key; nearest valid key: train.epochs"),
        ("trian.epoch=2", "trian.epoch: unknown key; nearest valid key: train.epochs"),
        ("data.epochs=2", "data.epochs: unknown key; nearest valid key: train.epochs"),
        ("modl.name=cnn8", "modl.name: unknown key; nearest valid key: model.name"),
        ("zzz.zzz=1", "zzz.zzz: unknown key; valid: data, augment"),
        ("optim.lrr=1", "optim.lrr: unknown key; nearest valid key: optim.lr"),
        ("model.name=resnet12", "model.name: expected a string among cnn8, cnn10, "),
        ("model.name=resnet111", 'got "resnet111"; nearest: "resnet11"'),
        ("model.name=timm:", "model.name: expected a string among cnn8"),
        ("model.name=models/mine.py:net", "model.name: expected a string among cnn8"),
        ("model.name=mine.py:net", "model.name: expected a string among cnn8"),
        (
            "model.arguments.depth=3",
            "model.arguments: the built-in resnet11 takes none; drop depth",
        ),
        ("model.arguments=3", "model.arguments: expected a table of arguments by name"),
        ("model.arguments.a-b=3", "model.arguments: expected a table of arguments by name"),
        ("model.arguments.a=[[1]]", "model.arguments: expected a table of arguments by name"),
        ("model.arguments.a=nan", "model.arguments: expected a table of arguments by name"),
        ("model.arguments.a=1979-05-27", "model.arguments: expected a table of arguments by name"),
        ("train.epochs=two", 'train.epochs: expected a whole number at least 1, got "two"'),
    ],
)
def test_a_mistaken_override_is_refused_by_its_key(complaint, override, message):
    refusal = complaint("", override)
    assert "--set: " in refusal and message in refusal


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("width = 8", "", "some.toml: model.width = 8: is a setting of the built-in models, and "),
        ("", "model.dropout_fc=0.5", "some.toml with --set: model.dropout_fc = 0.5: is a setting"),
        ("", "model.arguments.num_classes=5", "model.arguments.num_classes: the dataset says it"),
    ],
)
def test_a_setting_that_another_model_ignores_is_refused(complaint, text, override, message):
    refusal = complaint(f'[model]\nname = "timm:test_resnet"\n{text}', *filter(None, [override]))
    assert message in refusal


def test_an_override_sets_one_argument_of_a_model_and_keeps_the_others(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text('[model]\nname = "mine:net"\n[model.arguments]\ndepth = 3\nact = "relu"\n')
    config = load(path, ["model.arguments.act=gelu", "model.arguments.sizes=[1, 2]"])
    assert config.model.arguments == {"depth": 3, "act": "gelu", "sizes": [1, 2]}
    assert saved_and_loaded(config, tmp_path) == config
    assert load(path, ["model.arguments={}"]).model.arguments == {}
    differing = differences(load(path), config)
    assert differing == {"model.arguments": {"depth": 3, "act": "relu"}}


def test_the_arguments_of_a_configuration_are_its_own():
    sizes = [1, 2]
    arguments = {"sizes": sizes, "pair": (3, 4)}
    config = ModelConfig(name="mine:net", arguments=arguments)
    sizes.append(3)
    arguments["depth"] = 1
    assert config.arguments == {"sizes": [1, 2], "pair": [3, 4]}


@pytest.mark.parametrize(
    "text", ["a." * 200_000 + "a = 1", "x = " + "[" * 200_000], ids=["dotted", "nested"]
)
def test_a_file_larger_than_any_configuration_is_refused_at_once(complaint, tmp_path, text):
    problem = "not valid TOML: larger than 65536 bytes"
    assert complaint(text) == f"{tmp_path / 'some.toml'}: {problem}"


def test_an_endless_file_is_refused():
    with pytest.raises(UserError, match="/dev/zero: not valid TOML: larger than"):
        load(Path("/dev/zero"))


def test_later_overrides_win_over_earlier_ones_and_the_file(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("[optim]\nlr = 0.1\nmomentum = 0.5\n[train]\nepochs = 7\n")
    config = load(path, ["optim.lr=0.2", "train.epochs=8", "optim.lr=0.3"])
    assert (config.optim.lr, config.optim.momentum, config.train.epochs) == (0.3, 0.5, 8)


def test_a_whole_number_is_accepted_as_a_float(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("[optim]\nlr = 1\n")
    assert type(load(path).optim.lr) is float


PLACES = [(section, key) for section, table in VALUES.items() for key in table]
ANY_TEXT = st.text(st.characters(exclude_categories=()))
"""Includes lone surrogates, into which Python decodes arguments that are not UTF-8."""


def toml(value: Any) -> str:
    if value == {}:
        return "{}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").replace("\n", "")


def misspelt(name: str) -> st.SearchStrategy[str]:
    """`name` itself, or `name` with a letter changed, added or removed."""
    place, new = st.integers(0, len(name)), st.text(string.ascii_letters + "_", max_size=1)
    return st.builds(lambda i, c, n: name[:i] + c + name[i + n :], place, new, st.integers(0, 1))


def settings_of(place: tuple[str, str]) -> st.SearchStrategy[tuple[str, str, Any]]:
    return st.tuples(st.just(place[0]), st.just(place[1]), VALUES[place[0]][place[1]])


SCALARS = st.one_of(
    st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.dates(), st.datetimes(), st.times()
).map(toml)
VALUE_TEXTS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3).map(lambda values: f"[{', '.join(values)}]"),
    st.sampled_from(["", "inf", "-nan", "1e999", "-0.0", "0x_f", "1 # one", "cnn8", "sgd", "auto"]),
    ANY_TEXT,
)
LONG = st.sampled_from([20, 400, 5000])
LONG_VALUE_TEXTS = st.one_of(
    LONG.map(lambda n: "1" * n),
    LONG.map(lambda n: "0x" + "f" * n),
    LONG.map(lambda n: "[" * n + "]" * n),
    LONG.map(lambda n: "{" + "a." * n + "a = 1}"),
)
KEYS = st.sampled_from(PLACES)


def assignment(place: tuple[str, str], value: str) -> str:
    return f"{'.'.join(place)}={value}"


OVERRIDES = st.one_of(
    ANY_TEXT,
    st.text("az.=1'\"[\n\r\u2028 "),
    st.builds(assignment, KEYS, VALUE_TEXTS),
    st.builds(assignment, KEYS, LONG_VALUE_TEXTS),
    st.builds(assignment, KEYS.flatmap(lambda place: st.tuples(*map(misspelt, place))), SCALARS),
    # Valid ones, so that overrides are accepted, too.
    KEYS.flatmap(settings_of).map(lambda setting: assignment(setting[:2], toml(setting[2]))),
)


def outcome(path: Path | None, *overrides: str) -> Config | str:
    """The configuration that `load` returns, or the message with which it refuses."""
    try:
        return load(path, overrides)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)


def saved_and_loaded(config: Config, folder: Path) -> Config:
    path = folder / "saved.toml"
    path.write_text(dump(config), encoding="utf-8")
    return load(path)


@settings(FUZZ, max_examples=300)
@given(text=OVERRIDES)
@example(text="train.epochs=0x" + "f" * 5000)
@example(text='data.path="\udcff"')
def test_any_override_is_applied_or_refused_in_one_line(text, tmp_path_factory):
    config = outcome(None, text)
    if isinstance(config, str):
        assert config.startswith("--set")
        return
    section, _, key = text.partition("=")[0].partition(".")
    value = getattr(getattr(config, section), key)
    default = getattr(SECTIONS[section](), key)
    assert type(value) is type(default)
    kind = field_types(SECTIONS[section])[key]
    if get_origin(kind) is Literal:
        assert value in get_args(kind)
    if get_origin(kind) is Annotated:
        assert all(bound.allows(value) for bound in get_args(kind)[1:])
    assert not isinstance(value, float) or math.isfinite(value)
    assert saved_and_loaded(config, tmp_path_factory.getbasetemp()) == config


@FUZZ
@given(config=configurations(), setting=KEYS.flatmap(settings_of))
def test_an_override_replaces_one_value_of_any_configuration(config, setting, tmp_path_factory):
    section, key, value = setting
    path = tmp_path_factory.getbasetemp() / "base.toml"
    path.write_text(dump(config), encoding="utf-8")
    override = f"{section}.{key}={toml(value)}"
    try:
        table = replace(getattr(config, section), **{key: value})
    except UserError as error:  # a setting that the model ignores
        assert section == "model" and str(outcome(path, override)).endswith(str(error))
        return
    loaded = load(path, [override])
    assert loaded == replace(config, **{section: table})
    assert type(getattr(getattr(loaded, section), key)) is type(value)


EDITS = st.lists(
    st.tuples(
        st.integers(0, 5000),
        st.integers(0, 2),
        st.sampled_from("[]{}=.,\"'#\\\n\r\t\0_-+exn019").map(str.encode)
        | st.characters().map(str.encode)
        | st.binary(max_size=2),
    ),
    min_size=1,
    max_size=3,
)


@FUZZ
@given(config=configurations(), edits=EDITS)
def test_a_mutated_file_loads_or_is_refused_in_one_line(config, edits, tmp_path_factory):
    data = dump(config).encode()
    for place, removed, new in edits:
        place %= len(data) + 1
        data = data[:place] + new + data[place + removed :]
    path = tmp_path_factory.getbasetemp() / "mutated.toml"
    path.write_bytes(data)
    loaded = outcome(path)
    if isinstance(loaded, str):
        assert loaded.startswith(f"{path}: ")
    else:
        assert saved_and_loaded(loaded, path.parent) == loaded


def test_a_key_of_an_earlier_version_is_ignored_in_a_file_and_refused_as_an_override(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[train]\ncompile_mode = "reduce-overhead"\nepochs = 3\n')
    assert load(path).train.epochs == 3
    with pytest.raises(UserError, match=r"train\.compile_mode: unknown key"):
        load(None, ["train.compile_mode=default"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(epochs=0), "train.epochs: expected a whole number at least 1, got 0"),
        (
            lambda: TrainConfig(precision="fp8"),  # ty: ignore[invalid-argument-type]
            'train.precision: expected one of "fp32", ',
        ),
        (lambda: replace(Config().optim, lr=-1.0), "optim.lr: expected a number above 0, got -1.0"),
        (lambda: DataConfig(workers=True), "data.workers: expected a whole number"),
    ],
)
def test_a_section_made_in_python_is_checked(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_a_section_made_in_python_accepts_a_whole_number_as_a_float():
    lr = OptimConfig(lr=1).lr
    assert lr == 1.0 and type(lr) is float
