"""Medians with a 95 % bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float
    p95: float
    max: float
    count: int


def spread(samples: Sequence[float]) -> Spread | None:
    """None of nothing. With one sample the interval is that sample: it says nothing then, and `count` tells so."""
    if not samples:
        return None
    values = np.asarray(samples, dtype=float)
    drawn = np.random.default_rng(0).choice(values, (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    p95, top = np.percentile(values, 95), values.max()
    return Spread(float(np.median(values)), float(low), float(high), float(p95), float(top), len(values))


def slope(ys: Sequence[float]) -> tuple[float, float, float]:
    """What `ys` grow by from one to the next, by least squares, with its 95 % interval.

    The interval is a moving block bootstrap of the residuals: neighbouring readings of memory are not independent.
    """
    y = np.asarray(ys, dtype=float)
    x = np.arange(len(y), dtype=float)
    rate, start = np.polyfit(x, y, 1)
    residuals = y - (rate * x + start)
    block = max(1, int(len(y) ** 0.5))
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(_RESAMPLES):
        begins = rng.integers(0, len(y) - block + 1, -(-len(y) // block))
        noise = np.concatenate([residuals[b : b + block] for b in begins])[: len(y)]
        rates.append(np.polyfit(x, rate * x + start + noise, 1)[0])
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(rate), float(low), float(high)
