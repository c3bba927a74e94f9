"""The writer on a disk that takes its time, so that a trainer which is killed leaves it snapshots to be written."""

from asyncckpt import writer
from asyncckpt.testing import FaultyPosix

DELAY = 0.02
"""Seconds that an fsync takes longer."""

if __name__ == "__main__":
    writer.main(posix=FaultyPosix().delay("fsync", None, DELAY))
