"""Is a directory told to be durable after the power has been cut?

    unshare -m python -m crash.after_the_cut ext4|xfs FOLDER

prints that as JSON, and what is there after the next mount.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from asyncckpt.storage.posix import Posix
from crash.loop_disk import LoopDisk, Unavailable
from crash.real_cuts import SKIP


def main() -> None:
    kind, place = sys.argv[1:]
    try:
        disk = LoopDisk(Path(place), kind)
    except Unavailable as reason:
        print(reason)
        sys.exit(SKIP)
    folder, fsync, durable = disk.base / "folder", os.fsync, True
    folder.mkdir()
    (folder / "before").touch()
    Posix().fsync_dir(str(folder))
    disk.sync()
    os.rename(folder / "before", folder / "after")

    def cut_and_fsync(fd: int) -> None:
        """The power goes while the directory is open."""
        disk.cut()
        fsync(fd)

    os.fsync = cut_and_fsync
    try:
        Posix().fsync_dir(str(folder))
    except OSError:
        durable = False
    os.fsync = fsync
    disk.unmount()
    disk.mount()
    print(json.dumps({"durable": durable, "there": sorted(os.listdir(folder))}))
    disk.unmount()


if __name__ == "__main__":
    main()
