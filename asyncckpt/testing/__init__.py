"""The test kit: try what asyncckpt promises on your own storage, or your own code against a storage that fails.

wrapping   what recorder and faults stand on: any object of `asyncckpt.storage.posix.Posix`, wrapped
recording  `RecordingPosix` performs the verbs and remembers them
faults     `FaultyPosix` lets the n-th call of a verb fail, be cut short, stand still, or be the process's last
crash      every disk that a power cut may leave of a recording, and how to make it real
promises   what must be on such a disk, and the check with real recovery
service    the real background service, driven without torch
ranks      the same for several ranks
suite      `StorageSuite`, the conformance tests of a storage (needs pytest)

None of it imports torch. A recording of a save and all that a power cut may make of it:

    posix = RecordingPosix()
    with Checkpointer(directory, writer="thread", _posix=posix) as ckpt: ...
    for cut in power_cuts(posix.log, base=directory.parent, samples=50, seed=1):
        with materialised(scratch, cut.disk) as base: ...
"""

from asyncckpt.testing.crash import Cut, Disk, materialised, power_cuts
from asyncckpt.testing.faults import FaultyPosix, FifoHold, Hold
from asyncckpt.testing.promises import MirrorPromises, Promises, examine
from asyncckpt.testing.ranks import RanksDriver
from asyncckpt.testing.recording import Note, Operation, RecordingPosix
from asyncckpt.testing.service import ServiceDriver
from asyncckpt.testing.wrapping import CHANGES, VERBS, PosixWrapper

__all__ = [
    "CHANGES",
    "VERBS",
    "Cut",
    "Disk",
    "FaultyPosix",
    "FifoHold",
    "Hold",
    "MirrorPromises",
    "Note",
    "Operation",
    "PosixWrapper",
    "Promises",
    "RanksDriver",
    "RecordingPosix",
    "ServiceDriver",
    "examine",
    "materialised",
    "power_cuts",
]
