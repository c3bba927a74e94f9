"""How images are stored, as it travels to the writer; and the choice that `codec="auto"` makes."""

from __future__ import annotations

from typing import Literal

import msgspec

Name = Literal["raw", "incremental", "zstd", "delta", "auto"]
NAMES = ("raw", "incremental", "zstd", "delta", "auto")

_CLEARLY = 0.9
"""The share of the time that the other way must take at most, for a change: measurements scatter."""

_NEWEST = 0.5
"""The weight of the newest save in what is measured."""


class Codec(msgspec.Struct, frozen=True):
    """`name` is what the user chose; `max_chain` the most differences in a row; `cores` what coding may take of them.

    `cores` None: as many as the process may use.
    """

    name: Name = "raw"
    max_chain: int = 8
    cores: int | None = None


class Rates(msgspec.Struct, frozen=True):
    """What storing takes, as measured while saving; None where nothing of the kind was done.

    `sink`: bytes per second that the storage takes. `coder`: bytes of state per second that one core codes; `share`:
    what is left of them.
    """

    sink: float | None = None
    coder: float | None = None
    share: float | None = None

    def then(self, newer: Rates) -> Rates:
        """These, after another save."""
        return Rates(_blend(self.sink, newer.sink), _blend(self.coder, newer.coder), _blend(self.share, newer.share))


def _blend(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return old if new is None else new
    return old + _NEWEST * (new - old)


def choose(now: Name, rates: Rates, cores: int) -> Name:
    """ "raw" or "zstd": the one by which a save is committed sooner, on `cores`; `now` unless the other clearly is.

    Coding and writing go on side by side, so a coded save takes as long as the slower of the two.
    """
    if not rates.sink or not rates.coder or rates.share is None:
        return now
    seconds: dict[Name, float] = {
        "raw": 1 / rates.sink,
        "zstd": max(1 / (rates.coder * cores), rates.share / rates.sink),
    }
    other: Name = "zstd" if now == "raw" else "raw"
    return other if seconds[other] < _CLEARLY * seconds[now] else now
