"""Bytes as trainings make them, and as they do not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ITEM = {"U8": 1, "F8_E4M3": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}

Bytes = npt.NDArray[np.uint8]


def weights(dtype: str, count: int, seed: int = 0) -> Bytes:
    """Normal numbers, a few of them zero or huge; integers are small ones; as bytes."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 0.02, count)
    values[:: max(1, count // 7)] = 0.0
    values[3 :: max(1, count // 5)] *= 1e20
    if dtype == "BF16":
        with np.errstate(over="ignore"):
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if dtype.startswith("F") and dtype != "F8_E4M3":
        with np.errstate(over="ignore"):
            return values.astype(f"f{ITEM[dtype]}").view(np.uint8)
    return (np.abs(values) * 1000 % 100).astype(f"u{ITEM[dtype]}").view(np.uint8)


def noise(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def text(size: int) -> Bytes:
    return np.resize(np.frombuffer(b'{"layers.0.weight":{"dtype":"F32","shape":[768,768]}}', np.uint8), size)
