"""A real writer process that notes at every `pwrite` the priority of the thread that does it.

Run in place of `python -m asyncckpt.writer`, with FILE in front of its arguments: it gets one number a line.
"""

from __future__ import annotations

import os
import sys
import threading

from asyncckpt import writer
from asyncckpt.storage.posix import Posix


class Noting(Posix):
    def __init__(self, file: str) -> None:
        self._file = open(file, "ab", buffering=0)  # noqa: SIM115 - for the life of the process

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        self._file.write(b"%d\n" % priority)
        return super().pwrite(fd, data, offset)


if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    writer.main(arguments, Noting(file))
