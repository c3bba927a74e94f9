"""A real file system that is frozen under a training, and thawed again.

    unshare -m python -m crash.frozen FOLDER

Ends with code 77, and says why, where such a disk can't be had.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.models import train_step, training

import asyncckpt
from asyncckpt import link
from crash.loop_disk import LoopDisk, Unavailable
from crash.real_cuts import SKIP

AT_ONCE = 5.0
PATIENCE = 60.0


@contextmanager
def frozen(place: Path) -> Iterator[None]:
    """While inside, whoever writes there stands still; thawed at the end, of this process too, and after a minute."""
    thaw = ["sh", "-c", 'timeout 60 cat > /dev/null; fsfreeze -u "$0"', str(place)]
    thawing = subprocess.Popen(thaw, stdin=subprocess.PIPE)
    subprocess.run(["fsfreeze", "-f", place], check=True)
    try:
        yield
    finally:
        thawing.communicate()


def prompt(call: Callable[[], asyncckpt.SaveHandle]) -> asyncckpt.SaveHandle:
    begun = time.monotonic()
    handle = call()
    assert time.monotonic() - begun < AT_ONCE, "a save waited for the storage"
    return handle


def main() -> None:
    if shutil.which("fsfreeze") is None:
        print("fsfreeze is not installed")
        sys.exit(SKIP)
    try:
        disk = LoopDisk(Path(sys.argv[1]), "ext4")
    except Unavailable as reason:
        print(reason)
        sys.exit(SKIP)
    link.SLOW = 0.2
    said: list[str] = []
    log = logging.getLogger("asyncckpt")
    log.addFilter(lambda record: said.append(record.getMessage()) or True)
    state = training()
    with asyncckpt.Checkpointer(disk.base / "run", when_full="skip") as ckpt:
        ckpt.save(1, state).result(PATIENCE)
        with frozen(disk.base):
            handles = []
            for step in range(2, 8):
                train_step(state)
                handles.append(prompt(lambda step=step: ckpt.save(step, state)))  # type: ignore[misc]
            assert [h.outcome for h in handles] == ["pending"] * 2 + ["skipped"] * 4, handles
            assert asyncckpt.open(disk.base / "run").verify() == 1
            try:
                ckpt.wait_until_flushed(timeout=0.5)
            except TimeoutError as error:
                assert "steps 2, 3" in str(error)
            else:
                raise AssertionError("committed on a frozen file system")
            assert any("slow or hung" in line for line in said), said
        assert [h.result(PATIENCE) for h in handles[:2]] == ["committed"] * 2
        assert ckpt.save(9, state).result(PATIENCE) == "committed"
    assert asyncckpt.open(disk.base / "run").steps() == [1, 2, 3, 9]
    disk.unmount()


if __name__ == "__main__":
    main()
