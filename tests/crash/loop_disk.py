"""A real file system of its own, in a file, whose power can be cut. Needs root and loop devices."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

SHUTDOWN = 0x8004587D
"""XFS_IOC_GOINGDOWN, which ext4 knows as EXT4_IOC_SHUTDOWN."""
NO_LOG_FLUSH = 2
MIB = 1 << 20
MAKE = {
    "ext4": (64 * MIB, ["mkfs.ext4", "-q", "-F", "-E", "nodiscard"]),
    "xfs": (320 * MIB, ["mkfs.xfs", "-q", "-f", "-K"]),
}


class Unavailable(Exception):
    """This machine, or this user, can't have such a disk; the text says why."""


class LoopDisk:
    """`kind` in a sparse file of `folder`, mounted at `base`.

    Raises:
        Unavailable: there is no right, no program or no device to make it.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        size, command = MAKE[kind]
        if os.geteuid() != 0:
            raise Unavailable("only root may mount")
        if shutil.which(command[0]) is None:
            raise Unavailable(f"{command[0]} is not installed")
        self.base = folder / "mounted"
        self.base.mkdir()
        self._kind, self._file = kind, folder / f"disk.{kind}"
        with open(self._file, "xb") as file:
            file.truncate(size)
        self._run(*command, str(self._file))
        self.mount()

    def mount(self) -> None:
        self._run("mount", "-t", self._kind, "-o", "loop", str(self._file), str(self.base))

    def unmount(self) -> None:
        """Nothing may be open below it any more."""
        self._run("umount", str(self.base))

    def sync(self) -> None:
        """Make the names directly below `base` durable."""
        fd = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def cut(self) -> None:
        """From now on nothing more of what was told this file system reaches its disk: neither data nor journal."""
        fd = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, timeout=60)
        if done.returncode:
            raise Unavailable(f"{' '.join(command[:3])}: {done.stderr.decode().strip()}")
