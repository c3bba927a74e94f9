"""A real writer process that is killed by SIGKILL at the n-th call of one storage verb.

Run in place of `python -m asyncckpt.writer`, with VERB N in front of its arguments.
"""

from __future__ import annotations

import sys

from asyncckpt import writer
from asyncckpt.testing.faults import FaultyPosix

if __name__ == "__main__":
    verb, at, *arguments = sys.argv[1:]
    writer.main(arguments, FaultyPosix().kill(int(at), verb=verb))
