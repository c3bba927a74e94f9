"""What Linux has and others lack is guarded: without it the thread writer saves and restores all the same."""

import subprocess
import sys

import pytest
from support.processes import PATIENCE

WITHOUT = """
import mmap, os, sys, torch
for name in ("memfd_create", "MFD_CLOEXEC", "pidfd_open", "O_DIRECT", "posix_fallocate", "posix_fadvise",
             "POSIX_FADV_DONTNEED"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("MADV_HUGEPAGE", "MADV_POPULATE_WRITE"):
    if hasattr(mmap, name):
        delattr(mmap, name)
sys.platform = "darwin"
import asyncckpt
state = {"model": torch.nn.Linear(300, 300), "n": 7}
expected = state["model"].weight.detach().clone()
with asyncckpt.Checkpointer(sys.argv[1], writer=sys.argv[2]) as ckpt:
    for step in (1, 2):
        ckpt.save(step, state)
    ckpt.wait_until_flushed(30)
    assert ckpt.stats().writer == "thread" and ckpt.stats().direct_io is False, ckpt.stats()
    state["model"].weight.data.zero_()
    assert ckpt.restore(state) == 2
assert torch.equal(state["model"].weight, expected)
"""


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_without_memfd_pidfd_direct_io_and_fallocate(writer, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "run"), writer], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
