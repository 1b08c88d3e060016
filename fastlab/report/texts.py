"""Values as text on a page: numbers, percentages, durations and settings."""

import json
from typing import Any

MISSING = "—"


def formatted(value: float | None, form: str) -> str:
    """`value` in a format such as ",.2f", "+.1f" or ".0%"; no minus sign before a rounded zero."""
    sign = "+" if form.startswith("+") else ""
    return MISSING if value is None else format(value, f"{sign}z{form.removeprefix('+')}")


def number_text(value: float | None, decimals: int = 0) -> str:
    huge = value is not None and abs(value) >= 1e12  # the loss of a run that diverged
    return formatted(value, ".4g" if huge else f",.{decimals}f")


def percent_text(fraction: float | None, decimals: int = 2) -> str:
    return number_text(None if fraction is None else 100 * fraction, decimals)


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def setting_text(value: Any) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by dotted keys, such as machine.cores."""
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def flat_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested sections as rows of a dotted key and a text, such as machine.cores, 2."""
    return [
        (key, ", ".join(map(setting_text, value)) or "none")
        if isinstance(value, list)
        else (key, setting_text(value))
        for key, value in flat(values).items()
    ]
