"""The fields of a configuration: which values each takes, and a line for the user where one does
not."""

import difflib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from fastlab.console import UserError, printable


class Bound(NamedTuple):
    """Which numbers a field takes, in words and as a test."""

    expected: str
    allows: Callable[[Any], bool]
    near: tuple[str, ...] = ()
    """Valid values, of which the nearest is suggested."""


Positive = Annotated[int, Bound("at least 1", lambda v: v >= 1)]
Count = Annotated[int, Bound("at least 0", lambda v: v >= 0)]
Seed = Annotated[int, Bound("from 0 to 2^31 - 1", lambda v: 0 <= v < 2**31)]
AboveZero = Annotated[float, Bound("above 0", lambda v: v > 0)]
NotNegative = Annotated[float, Bound("at least 0", lambda v: v >= 0)]
Fraction = Annotated[float, Bound("at least 0 and below 1", lambda v: 0 <= v < 1)]
Share = Annotated[float, Bound("from 0 to 1", lambda v: 0 <= v <= 1)]
PositiveShare = Annotated[float, Bound("above 0 and at most 1", lambda v: 0 < v <= 1)]
Factor = Annotated[float, Bound("above 0 and below 1", lambda v: 0 < v < 1)]
Angle = Annotated[float, Bound("from 0 to 180", lambda v: 0 <= v <= 180)]
HalfTurn = Annotated[float, Bound("from 0 to 0.5", lambda v: 0 <= v <= 0.5)]


class SizeStage(NamedTuple):
    """A stage of progressive resizing: the side of training images, pixels, until a share of all
    epochs is done."""

    until: float
    side: int


def _are_stages(stages: tuple[SizeStage, ...]) -> bool:
    shares = [0.0, *(stage.until for stage in stages), math.nextafter(1, 2)]
    rise = all(before < after for before, after in itertools.pairwise(shares))
    return len(stages) <= 3 and rise and all(stage.side >= 8 for stage in stages)


SizeStages = Annotated[
    tuple[SizeStage, ...],
    Bound(
        "at most three pairs [share of the epochs, side], such as [[0.4, 32], [0.7, 48]]: shares "
        "rise from above 0 to at most 1, sides are at least 8",
        _are_stages,
    ),
]

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _are_trackers(names: tuple[Any, ...]) -> bool:
    return all(name in TRACKERS for name in names) and len(set(names)) == len(names)


Trackers = Annotated[
    tuple[str, ...],
    Bound("different names out of " + ", ".join(f'"{name}"' for name in TRACKERS), _are_trackers),
]


def _is_argument(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(each) is not list and _is_argument(each) for each in value)
    bounded = abs(value) < 2**63 if type(value) is int else True
    finite = math.isfinite(value) if type(value) is float else True
    text = _is_text(value) if type(value) is str else True
    return type(value) in (bool, int, float, str) and bounded and finite and text


Arguments = Annotated[
    dict[str, Any],
    Bound(
        "arguments by name, such as {drop_path_rate = 0.1}: each true or false, a number, a "
        "string, or a list of these",
        lambda table: all(name.isidentifier() and _is_argument(table[name]) for name in table),
    ),
]


class Section:
    """A section of the configuration: a frozen dataclass whose fields have one of the types above,
    `SizeStages`, `Trackers`, `Arguments`, a `Literal` of strings, or a plain bool, int, float or
    str."""

    def __post_init__(self) -> None:
        """Raises `UserError` for a value that its field does not take."""
        section = type(self).__name__.removesuffix("Config").lower()
        for key, kind in field_types(type(self)).items():
            value = checked(f"{section}.{key}", kind, getattr(self, key))
            object.__setattr__(self, key, value)


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """The type of each field of a section, with its bounds."""
    return get_type_hints(section, include_extras=True)


def checked(name: str, kind: Any, value: Any) -> Any:
    """`value` for the field `name` of the type `kind`; a whole number becomes a float where one is
    expected. Raises `UserError` where the field does not take it."""
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    bounds = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    given, plain = value, str if choices else get_args(kind)[0] if bounds else kind
    value = _as_float(value) if plain is float and type(value) is int else value
    if kind is SizeStages:
        plain, value = tuple, _as_stages(value)
    if kind is Arguments:
        plain, value = dict, _as_arguments(value)
    if kind is Trackers:
        plain, value = tuple, _as_tuple(value)
    takes = (
        type(value) is plain
        and not (plain is float and not math.isfinite(value))
        and not (plain is int and abs(value) >= 2**63)
        and not (isinstance(value, str) and not _is_text(value))
        and (not choices or value in choices)
        and all(bound.allows(value) for bound in bounds)
    )
    if takes:
        return value
    names = dict[type, str]({int: "a whole number", float: "a number", bool: "true or false"})
    names |= {str: "a string", tuple: "a list of", dict: "a table of"}
    expected = " ".join([names[plain], *(bound.expected for bound in bounds)])
    if choices:
        expected = "one of " + ", ".join(f'"{choice}"' for choice in choices)
    near = [each for bound in bounds for each in bound.near]
    nearest = difflib.get_close_matches(given, near, n=1) if isinstance(given, str) else []
    hint = f"; nearest: {show(nearest[0])}" if nearest else ""
    raise UserError(f"{name}: expected {expected}, got {show(given)}{hint}")


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_stages(value: Any) -> Any:
    """A tuple with a `SizeStage` for each pair of numbers in `value`; what is no list of such pairs
    becomes no tuple, which `checked` refuses."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [stage for stage in value if isinstance(stage, list | tuple) and len(stage) == 2]
    whole = all(type(until) in (int, float) and type(side) is int for until, side in pairs)
    if len(pairs) < len(value) or not whole:
        return list(value)
    return tuple(SizeStage(_as_float(until), side) for until, side in pairs)


def _as_arguments(value: Any) -> Any:
    """A copy of a table, with lists in place of tuples, so that it equals what a file holds."""
    if not isinstance(value, dict):
        return value
    return {
        name: list(each) if isinstance(each, list | tuple) else each for name, each in value.items()
    }


def show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{printable(value)}"'
    try:
        return repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or of tables in each other
        return "a value too long to show"


def _is_text(value: str) -> bool:
    """Whether it can be saved: a shell's argument that is not UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
