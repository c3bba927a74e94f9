"""Sizes and times as people write them."""

from __future__ import annotations

import math
import re

_PREFIXES = "kmgtpe"
_SIZE = re.compile(r"([0-9.]+(?:e[+-]?\d+)?)\s*(?:([kmgtpe])(i?))?(?:b)?(?:/s)?", re.IGNORECASE)
_TIME = re.compile(r"([0-9.]+(?:e[+-]?\d+)?)\s*(ms|s|min|m|h|d|)", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def size(text: str) -> float:
    """Bytes: `280GB` (powers of 1000), `2GiB` (of 1024), `1.5e9`; a rate may end in `/s`.

    Raises:
        ValueError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip())
    number = _number(match[1]) if match else None
    if match is None or number is None:
        raise ValueError("give bytes, such as 280GB, 2GiB or 1.5e9")
    power = _PREFIXES.index(match[2].lower()) + 1 if match[2] else 0
    return number * float(1024 if match[3] else 1000) ** power


def seconds(text: str) -> float:
    """Seconds: `90`, `250ms`, `5m`, `1h30m`, `7d`.

    Raises:
        ValueError: it is none of these.
    """
    whole = text.strip()
    rest, total = whole, 0.0
    while match := _TIME.match(rest):
        number = _number(match[1])
        if number is None or (not match[2] and match[0] != whole):
            break
        total += number * _SECONDS[match[2].lower()]
        rest = rest[match.end() :].lstrip()
        if not rest:
            return total
    raise ValueError("give a time, such as 250ms, 90s, 5m, 1h30m or 7d")


def share(text: str) -> float:
    """`1%` or `0.01`.

    Raises:
        ValueError: it is neither.
    """
    number = _number(text.strip().removesuffix("%").rstrip())
    if number is None:
        raise ValueError("give a share, such as 1% or 0.01")
    return number / 100 if text.strip().endswith("%") else number


def show_size(count: float) -> str:
    """`1.19 GB`; below 1000 bytes exactly."""
    power = 0
    while power < len(_PREFIXES) and count >= (999.5 if power else 1000):
        count /= 1000
        power += 1
    return f"{count:.3g} {_PREFIXES[power - 1].upper()}B" if power else f"{count:.0f} B"


def show_seconds(value: float) -> str:
    """The two units that matter: `1h 48m`, `2m 05s`, `38.2 s`, `4.7 ms`."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02}m"
    hours = round(value / 3600)
    return f"{hours // 24}d {hours % 24:02}h"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
