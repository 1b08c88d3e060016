"""Which images a selection keeps, compared with the same selection in plain Python."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlab.console import UserError
from fastlab.dataset.originals import ImageClass, Originals, Split, select_classes

FUZZ = settings(max_examples=70, deadline=None, database=None, derandomize=True)

IDS = st.text("abcXYZé1_-. ", min_size=1, max_size=4).filter(
    lambda name: name == name.strip() and not name.isdecimal()
)
GAPS = st.sampled_from(["", " ", "\n", "\t "])
SEEDS = st.integers(0, 2**64)


@st.composite
def originals(draw, least: int = 0, test: bool | None = None) -> Originals:
    """Originals whose paths name their class, with at least `least` training images of each class,
    in any order."""
    ids = draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    test = draw(st.booleans()) if test is None else test
    splits = {}
    for name in ("train", "val", "test")[: 2 + test]:
        labels = draw(st.lists(st.integers(0, len(ids) - 1), max_size=25))
        if name == "train":
            labels = draw(st.permutations(labels + list(range(len(ids))) * least))
        paths = [f"{name}/{ids[label]}/{row}.png" for row, label in enumerate(labels)]
        splits[name] = Split(paths, np.array(labels, dtype=np.int64))
    return Originals("image-folder", [ImageClass(name, f"word {name}") for name in ids], splits)


def class_of(path: str) -> str:
    return path.split("/")[1]


def plain(selected: Originals) -> dict[str, list[str]]:
    """The paths of each split, after a check that each label is that of its path."""
    ids = [c.id for c in selected.classes]
    assert [c.words for c in selected.classes] == [f"word {name}" for name in ids]
    for split in selected.splits.values():
        assert split.labels.dtype == np.int64
        assert [ids[label] for label in split.labels] == [class_of(path) for path in split.paths]
    return {name: list(split.paths) for name, split in selected.splits.items()}


def kept(paths: list[str], some: set[str]) -> list[str]:
    return [path for path in paths if path in some]


@FUZZ
@given(source=originals(least=2, test=False), seed=SEEDS, data=st.data())
def test_hold_out_divides_the_training_images(source, seed, data):
    before = plain(source)
    counts = Counter(map(class_of, before["train"]))
    per_class = data.draw(st.integers(0, min(counts.values()) - 1))
    after = source.hold_out(per_class, seed)
    selected = plain(after)
    assert after.classes == source.classes
    assert list(selected) == ["train", "val", "test"]
    assert selected["test"] == before["val"]
    train, val = set(selected["train"]), set(selected["val"])
    assert not train & val
    assert selected["train"] == kept(before["train"], train)  # in their old order
    assert selected["val"] == kept(before["train"], val)
    assert len(train) + len(val) == len(before["train"])
    assert Counter(map(class_of, val)) == Counter({name: per_class for name in counts})
    np.random.seed(data.draw(st.integers(0, 9)))
    assert plain(source.hold_out(per_class, seed)) == selected
    assert plain(source) == before


@FUZZ
@given(source=originals(least=1), more=st.integers(0, 3), seed=SEEDS)
def test_hold_out_leaves_a_training_image_of_each_class_or_refuses(source, more, seed):
    counts = Counter(map(class_of, plain(source)["train"]))
    with pytest.raises(UserError, match="--holdout"):
        source.hold_out(min(counts.values()) + more, seed)


@FUZZ
@given(source=originals(least=2), seed=SEEDS)
def test_hold_out_refuses_a_second_test_split(source, seed):
    if "test" in source.splits:
        with pytest.raises(UserError, match="--holdout"):
            source.hold_out(1, seed)
    else:
        assert len(source.hold_out(1, seed).splits) == 3


def test_hold_out_takes_every_image_equally_often():
    """800 choices of 2 of 8 images take each 200 times, with a standard deviation of 12."""
    train = Split([f"train/a/{row}" for row in range(8)], np.zeros(8, dtype=np.int64))
    source = Originals("", [ImageClass("a", "word a")], {"train": train, "val": train})
    selected = Counter(
        path for seed in range(800) for path in source.hold_out(2, seed).splits["val"].paths
    )
    assert all(abs(selected[path] - 200) < 6 * 12 for path in train.paths)


@FUZZ
@given(source=originals(), per_class=st.integers(0, 12))
def test_limit_keeps_the_first_of_each_class(source, per_class):
    expected = {}
    for name, paths in plain(source).items():
        seen = Counter()
        expected[name] = []
        for path in paths:
            if seen[class_of(path)] < per_class:
                expected[name].append(path)
            seen[class_of(path)] += 1
    assert plain(source.limit(per_class)) == expected


@FUZZ
@given(source=originals(), data=st.data())
def test_without_removes_exactly_the_given_images(source, data):
    before = plain(source)
    every = sorted(path for paths in before.values() for path in paths)
    removed = data.draw(st.sets(st.sampled_from([*every, "no/such/path"])))
    expected = {name: [p for p in paths if p not in removed] for name, paths in before.items()}
    assert plain(source.without(removed)) == expected
    assert plain(source.without(dict.fromkeys(removed, "why"))) == expected


def chosen(source: Originals, ids: list[str]) -> dict[str, list[str]]:
    return {
        name: [path for path in paths if class_of(path) in ids]
        for name, paths in plain(source).items()
    }


@FUZZ
@given(source=originals(), data=st.data())
def test_only_renumbers_classes_in_the_order_given(source, data):
    classes = data.draw(st.lists(st.integers(0, len(source.classes) - 1), min_size=1, unique=True))
    selected = source.only(classes)
    ids = [source.classes[index].id for index in classes]
    assert [c.id for c in selected.classes] == ids
    assert plain(selected) == chosen(source, ids)
    for split in selected.splits.values():  # the labels themselves, not through `selected.classes`
        assert split.labels.tolist() == [ids.index(class_of(path)) for path in split.paths]


@FUZZ
@given(source=originals(least=1), data=st.data())
def test_select_classes_takes_names_or_the_first(source, data):
    every = [c.id for c in source.classes]
    if data.draw(st.booleans()):
        count = data.draw(st.integers(1, len(every)))
        ids, choice = every[:count], str(count)
    else:
        ids = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
        choice = ",".join(data.draw(GAPS) + name + data.draw(GAPS) for name in ids)
    expected = chosen(source, ids)
    if all(expected.values()):
        selected = select_classes(source, choice)
        assert [c.id for c in selected.classes] == ids
        assert plain(selected) == expected
    else:
        with pytest.raises(UserError, match="has no image of class") as caught:
            select_classes(source, choice)
        assert len(str(caught.value).splitlines()) == 1


def test_a_refused_choice_with_a_line_break_is_reported_in_one_line():
    """As --classes "$(cat names.txt)" gives it."""
    train = Split(["train/a/0"], np.zeros(1, dtype=np.int64))
    source = Originals(
        "", [ImageClass("a", "word a")], {"train": train, "val": Split([], train.labels[:0])}
    )
    with pytest.raises(UserError, match="val has no image of class a") as caught:
        select_classes(source, "\na")
    assert len(str(caught.value).splitlines()) == 1


@FUZZ
@given(
    source=originals(least=1),
    choice=st.text()
    | st.lists(st.text("abc,12 ")).map(",".join)
    | st.integers().map(str)
    | st.just("9" * 5000),
)
def test_any_choice_of_classes_is_obeyed_or_refused_in_one_line(source, choice):
    try:
        selected = select_classes(source, choice)
    except UserError as error:
        assert str(error).startswith("--classes")
        assert len(str(error).splitlines()) == 1
    else:
        assert plain(selected) == chosen(source, [c.id for c in selected.classes])


@FUZZ
@given(source=originals(least=3), data=st.data())
def test_every_sequence_of_selections_keeps_labels_and_order(source, data):
    everything = {path for paths in plain(source).values() for path in paths}
    order = {path: row for split in source.splits.values() for row, path in enumerate(split.paths)}
    removed, most = set(), len(everything)
    for _ in range(data.draw(st.integers(1, 4))):
        step = data.draw(st.sampled_from(["only", "limit", "without", "hold_out"]))
        if step == "only":
            numbers = st.integers(0, len(source.classes) - 1)
            source = source.only(data.draw(st.lists(numbers, min_size=1, unique=True)))
        elif step == "limit":
            most = data.draw(st.integers(1, 6))
            source = source.limit(most)
        elif step == "without":
            some = data.draw(st.sets(st.sampled_from([*sorted(everything), "no/such/path"])))
            source, removed = source.without(some), removed | some
        elif "test" not in source.splits and (counts := counted(source)) and min(counts) > 1:
            source = source.hold_out(1, data.draw(SEEDS))
        selected = plain(source)
        every = [path for paths in selected.values() for path in paths]
        assert len(set(every)) == len(every)
        assert set(every) <= everything - removed
        for paths in selected.values():
            assert paths == sorted(paths, key=order.get)
            assert all(count <= most for count in Counter(map(class_of, paths)).values())


def counted(source: Originals) -> list[int]:
    """The number of training images of each class, zeros included."""
    counts = Counter(map(class_of, plain(source)["train"]))
    return [counts[c.id] for c in source.classes]
