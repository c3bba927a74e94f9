"""The same in a child whose memory is measured and whose address space is capped."""

import sys

import pytest

from hostile.fuzz import MEMORY, batch


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_hostile_checkpoints_take_little_memory_and_time() -> None:
    report = batch(range(20), attacks=True)
    assert report["growth"] < MEMORY and report["slowest"] < 10
