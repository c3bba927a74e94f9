"""torch dtypes and how they are stored."""

from __future__ import annotations

import torch

from asyncckpt.format import names

CODES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
}
"""Those that safetensors knows. The others are stored as U8, with their name in the leaf tree."""

BY_CODE = {code: dtype for dtype, code in CODES.items()}
BY_NAME: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
QUANTIZED = {BY_NAME[name] for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4") if name in BY_NAME}
"""They carry scales beside their bytes, so they can't be stored exactly as bytes."""

EXPORTS = dict(zip(names.EXPORT_DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
"""What floating tensors may be cast to."""

_CAST = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exported(dtype: torch.dtype, to: torch.dtype) -> torch.dtype | None:
    """What a tensor of `dtype` is cast to in an export to `to`; None where it stays as it is."""
    return to if dtype in _CAST and dtype is not to else None


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a dtype of the same item size that every copy kernel takes."""
    return tensor.view(_SAME_SIZE[tensor.dtype.itemsize])
