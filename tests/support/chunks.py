"""Small chunks for a trainer and a writer in this process."""

from __future__ import annotations

import pytest

from asyncckpt.snapshot import copy, program
from asyncckpt.write import pipeline


def make_small(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Chunks of `size` bytes, of four slices each."""
    monkeypatch.setattr(pipeline, "CHUNK_SIZE", size)
    monkeypatch.setattr(program, "CHUNK_SIZE", size)
    monkeypatch.setattr(copy, "SLICE", size // 4)
