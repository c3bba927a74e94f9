"""Floating numbers from one dtype to another, with the rounding of torch: to the nearest, ties to even."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CASTABLE = ("F64", "F32", "F16", "BF16")
"""The dtypes, by their safetensors names, that are cast; each can be had of each."""

_NUMPY: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def cast(data: memoryview, source: str, target: str) -> memoryview:
    """The numbers in `data` as `target`. As in torch, all go by way of float32, and what is too large becomes inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _to_float32(data, source)
        if target == "BF16":
            return _to_bfloat16(wide).data.cast("B")
        return wide.astype(_NUMPY[target], copy=False).data.cast("B")


def _to_float32(data: memoryview, source: str) -> npt.NDArray[np.float32]:
    if source == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    numbers: npt.NDArray[Any] = np.frombuffer(data, _NUMPY[source])
    return numbers.astype("<f4", copy=False)


def _to_bfloat16(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves, rounded by the lower ones; of NaN, one that stays NaN."""
    bits = wide.view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    nan = np.isnan(wide)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16).astype("<u2") | 0x40
    return rounded
