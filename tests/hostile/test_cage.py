"""The same in a child whose memory is measured and whose address space is capped."""

import mmap
import sys

import pytest

from hostile.fuzz import MEMORY, batch


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_hostile_checkpoints_take_little_memory_and_time() -> None:
    ours = mmap.mmap(-1, MEMORY + (64 << 20))  # what this process has is no matter of the child's
    ours[::4096] = b"x" * len(ours[::4096])
    report = batch(range(20), attacks=True)
    assert report["growth"] < MEMORY and report["slowest"] < 10
