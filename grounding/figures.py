"""Format durations and percentages for people: in sentences, in columns, and in kubectl's format. Pure."""

from __future__ import annotations

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """Return a duration for a sentence, with at most two units: `42 s`, `3 min 07 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"


def short_duration(seconds: float | None) -> str:
    """Return a duration for a column: `42s`, `3m07s`, `2h05m`, `3d04h`; `-` for None."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return f"{whole}s"
    if whole < _HOUR:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02d}s"
    if whole < _DAY:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}m"
    return f"{whole // _DAY}d{whole % _DAY // _HOUR:02d}h"


def kubectl_duration(seconds: float | None) -> str:
    """Return a duration in kubectl's format: `2d4h`, `3h12m`, `5m10s` or `8s`; empty for None."""
    if seconds is None:
        return ""
    left = max(0, int(seconds))
    parts: list[str] = []
    for size, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{unit}")
        if len(parts) == 2:
            break
    return "".join(p for p in parts if not p.startswith("0")) or "0s"


def percent(fraction: float | None, digits: int = 2, unknown: str = "–") -> str:
    """Return a fraction as a percentage without the sign, such as `63.13`; `unknown` for None."""
    return unknown if fraction is None else f"{100 * fraction:.{digits}f}"
