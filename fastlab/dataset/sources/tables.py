"""Columns of images and labels in Arrow tables: those of Parquet and of Hugging Face datasets."""

import json
from typing import Any, NamedTuple

from fastlab.console import UserError, printable
from fastlab.machine import installing


class Columns(NamedTuple):
    image: str
    """Of struct{bytes, path}, or binary."""
    label: str
    names: list[str] | None
    """Of the classes, where the schema holds them."""


def import_pyarrow(where: str) -> Any:
    """Raises `UserError` where it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{where}: needs pyarrow; {installing('sources')}") from None
    return pyarrow


def find_columns(schema: Any, chosen: dict[str, str], where: str) -> Columns:
    """The columns of a `pyarrow.Schema`: those `chosen`, or else the only image and the only label
    by Hugging Face's features in its metadata, or by their types.

    Raises `UserError` where there is none, or several.
    """
    features = _features(schema)
    images = [field.name for field in schema if _holds_images(field.type)]
    labels = [field.name for field in schema if _holds_labels(field.type)]
    image = _choose("image", images, _of_kind(features, "Image"), chosen, where)
    label = _choose("label", labels, _of_kind(features, "ClassLabel"), chosen, where)
    return Columns(image, label, features.get(label, {}).get("names"))


def image_bytes(array: Any) -> Any:
    """The encoded images of an array of an image column: a `pyarrow.BinaryArray`."""
    return array.field("bytes") if hasattr(array, "field") else array


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _of_kind(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]


def _choose(
    kind: str, fitting: list[str], declared: list[str], chosen: dict[str, str], where: str
) -> str:
    if kind in chosen:
        if chosen[kind] not in fitting:
            raise UserError(
                f"{where}: --columns {kind}={chosen[kind]}: is no {kind} column; those are: "
                f"{printable(', '.join(fitting)) or 'none'}"
            )
        return chosen[kind]
    candidates = [name for name in declared if name in fitting] or fitting
    if not candidates:
        raise UserError(f"{where}: has no {kind} column")
    if len(candidates) > 1:
        raise UserError(
            f"{where}: has several {kind} columns: {printable(', '.join(candidates))}; choose one "
            f"with --columns {kind}=COLUMN"
        )
    return candidates[0]


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
