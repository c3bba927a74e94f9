"""What trainer and service say to each other: small records, framed by a length on a socketpair.

Trainer to service, for one save:  Begin, Staged (once or more), then Seal or Drop.
                                   (Of one of several ranks: Reserve before, at rank 0, and Look after.)
Service to trainer, for one save:  Progress (any number), then exactly one of Committed, Failed, Dropped;
                                   after that the service does not touch the arena again.
                                   (A Drop that crosses this answer is answered Dropped once more.)
After a commit, where the trainer decides what goes: Ask, answered by Advice.
With a mirror: after Committed, Mirrored once; MirrorState whenever something of it has changed.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar

import msgspec

from asyncckpt import errors
from asyncckpt.policy.codec import Codec, Rates
from asyncckpt.policy.keep import Keep
from asyncckpt.policy.records import Record
from asyncckpt.storage.urls import StorageOptions


class Fault(msgspec.Struct, frozen=True):
    """An exception on its way between processes."""

    kind: str
    message: str
    members: dict[str, int | str | bool | None] = {}

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        if isinstance(error, errors.StorageError):
            return cls("StorageError", str(error), {"retryable": error.retryable, "errno": error.errno})
        if isinstance(error, errors.ConflictError):
            return cls("ConflictError", str(error), {"pid": error.pid})
        if isinstance(error, errors.CorruptCheckpointError):
            return cls("CorruptCheckpointError", str(error), {"step": error.step})
        if isinstance(error, errors.RankError):
            return cls("RankError", str(error), {"rank": error.rank})
        named = errors.CheckpointExistsError, errors.CheckpointNotFoundError, errors.CheckpointBusyError
        if isinstance(error, (*named, errors.NotSupportedError)):
            known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            return cls(known.__name__, str(error))
        return cls("StorageError", f"{type(error).__name__}: {error}")

    def error(self) -> errors.CheckpointError:
        made = getattr(errors, self.kind)(self.message, **self.members)
        assert isinstance(made, errors.CheckpointError)
        return made


class MirrorTo(msgspec.Struct, frozen=True):
    """Copy what is committed to the storage at `url`, and retire there by `keep`.

    At most `bandwidth` bytes a second; whoever waits is told that it fails when it has taken nothing for `timeout`
    seconds. If it is `required`, no policy deletes a step before it is mirrored. `options` are for a URL.
    """

    url: str
    keep: Keep | None = None
    bandwidth: float | None = None
    required: bool = False
    timeout: float = 600.0
    options: StorageOptions = StorageOptions()


class Open(msgspec.Struct, tag=True, frozen=True):
    """Own the run in the directory or at the URL `root`, waiting up to `lock_timeout` seconds.

    Answered by Opened or Refused. `keep` decides what goes after a commit, or, if the service `asks`, the trainer does.
    With `check_finite` it looks for NaN and inf in what it writes. `codec` says how images are stored: see
    `policy.codec`. `options` are for URLs.
    Of several ranks the service of rank 0 owns the run; those of the others only write their shares into it.
    """

    root: str
    lock_timeout: float
    keep: Keep | None = None
    direct: bool = True
    asks: bool = False
    check_finite: bool = False
    codec: Codec = Codec()
    rank: int = 0
    options: StorageOptions = StorageOptions()
    mirror: MirrorTo | None = None


class Share(msgspec.Struct, tag=True, frozen=True):
    """Here is an arena of `size` bytes (its file descriptor comes along, or its memory in-process)."""

    arena: int
    size: int


class Forget(msgspec.Struct, tag=True, frozen=True):
    """This arena is gone."""

    arena: int


class Span(msgspec.Struct, frozen=True, array_like=True):
    """The image of a part: `size` bytes at `offset` of the arena; 0 bytes where it holds no tensor."""

    part: str
    offset: int
    size: int


class Member(msgspec.Struct, frozen=True):
    """A save is the share of `rank` in that of `world` ranks, under one `attempt`.

    It is committed, for all, within `patience` seconds of being begun, or never.
    """

    rank: int
    world: int
    attempt: str
    patience: float


class Begin(msgspec.Struct, tag=True, frozen=True):
    """A save begins: its images grow in `arena`, in the order of `spans`.

    `omitted` and `exports` are those of the manifest.
    """

    save: int
    step: int
    arena: int
    spans: list[Span]
    replace: bool = False
    metrics: dict[str, float] = {}
    omitted: list[str] = []
    exports: list[str] = []
    member: Member | None = None


class Known(msgspec.Struct, frozen=True, array_like=True):
    """What is known of an image of `size` bytes that was committed: of each chunk of `chunk_size` bytes 16 bytes of
    `digests`, its xxh3_128, or `NOTHING` where its bytes have to come again in any case."""

    size: int
    chunk_size: int
    digests: bytes

    NOTHING: ClassVar[bytes] = bytes(16)

    def has(self, index: int, digest: bytes) -> bool:
        """Whether this is the digest of chunk `index`."""
        width = len(self.NOTHING)
        return self.digests[width * index : width * (index + 1)] == digest


class Hashed(msgspec.Struct, frozen=True, array_like=True):
    """A chunk, `size` bytes at `start` of the image of `part`, has this digest.

    If it is the `same` as before, by a digest that is `Known`, its bytes are not in the arena.
    """

    part: str
    start: int
    size: int
    digest: str
    same: bool = False


class Staged(msgspec.Struct, tag=True, frozen=True):
    """The first `upto` bytes of the arena are what they will stay, but for those of chunks that are the same.

    Chunks that are not among the `hashed` by then the service hashes.
    """

    save: int
    upto: int
    hashed: list[Hashed] = []


class Seal(msgspec.Struct, tag=True, frozen=True):
    """The snapshot is whole, and consistent. Its leaf trees, by part, are the JSON at `offset` of the arena.

    Of one of several ranks, `shares` bytes of JSON follow: by part, the shards of entries that it has; a part that is
    not among the trees has the tree of rank 0.
    """

    save: int
    offset: int
    size: int
    shares: int = 0


class Drop(msgspec.Struct, tag=True, frozen=True):
    """Do not commit this save; with `queued_only`, only if it has not been begun. Too late is answered Committed.

    Without `queued_only`, a save that the service does not know is answered Dropped.
    """

    save: int
    queued_only: bool = False


class Reserve(msgspec.Struct, tag=True, frozen=True):
    """Ranks will write under `attempt` of `step`: it is no leftover until its save has ended, or `Release`."""

    call: int
    step: int
    attempt: str


class Release(msgspec.Struct, tag=True, frozen=True):
    """What was reserved will not be written."""

    step: int
    attempt: str


class Look(msgspec.Struct, tag=True, frozen=True):
    """Something of this save has changed in the storage: another rank is prepared, or it may be decided.

    `committed`: it is, as rank 0 knows; the storage need not show that any more, where retention has let it go at once.
    """

    save: int
    committed: bool = False


class Hurry(msgspec.Struct, tag=True, frozen=True):
    """Whether somebody stands and waits."""

    on: bool


class Trust(msgspec.Struct, tag=True, frozen=True):
    """The trainer has digest-checked this step."""

    step: int


class Delete(msgspec.Struct, tag=True, frozen=True):
    call: int
    step: int


class RewindTo(msgspec.Struct, tag=True, frozen=True):
    call: int
    step: int


class Noted(msgspec.Struct, tag=True, frozen=True):
    """Notes of committed steps have changed: let the mirror have them too."""


class AwaitMirror(msgspec.Struct, tag=True, frozen=True):
    """Answer when all that is committed is mirrored, or `save` is, if one is named; or when the mirror fails."""

    call: int
    save: int = 0


class Advice(msgspec.Struct, tag=True, frozen=True):
    """The answer to Ask: the steps that may go. None: the policy failed, and nothing may."""

    call: int
    steps: list[int] | None


class Close(msgspec.Struct, tag=True, frozen=True):
    """Finish what is begun and end."""


class Opened(msgspec.Struct, tag=True, frozen=True):
    pid: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    fault: Fault


class Progress(msgspec.Struct, tag=True, frozen=True):
    save: int
    written: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """All that this rank writes for a save of several is durable, its prepare record included."""

    save: int


class Committed(msgspec.Struct, tag=True, frozen=True):
    """Durable and published. Times are `time.time()`; `size` counts the bytes of all files.

    `written` counts those of files that are new; `codec` is how, and `rates` what that takes.
    `nonfinite` says, for a person, which tensors hold NaN or inf. Of `known` parts the next save may leave out what is
    the same, if no other save is begun before it.
    """

    save: int
    size: int
    write_begin: float
    write_end: float
    commit_end: float
    direct: bool
    written: int
    codec: str
    rates: Rates
    nonfinite: str = ""
    known: dict[str, Known] = {}


class Failed(msgspec.Struct, tag=True, frozen=True):
    save: int
    fault: Fault


class Dropped(msgspec.Struct, tag=True, frozen=True):
    save: int


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Which of these may go?"""

    call: int
    records: list[Record]


class Mirrored(msgspec.Struct, tag=True, frozen=True):
    """What became of a committed step on the mirror: it is there, was passed over, or, with a `fault`, can't be.

    `save` is 0 where it was committed before this service came.
    """

    save: int
    step: int
    passed_over: bool = False
    fault: Fault | None = None


class MirrorState(msgspec.Struct, tag=True, frozen=True):
    """How the mirror stands: the step mirrored last, steps and bytes copied by this service, steps that wait, steps
    passed over, and what it failed of last, empty where it does not fail."""

    step: int | None = None
    steps: int = 0
    bytes: int = 0
    backlog: int = 0
    passed_over: int = 0
    error: str = ""


class Done(msgspec.Struct, tag=True, frozen=True):
    """The answer to Delete, RewindTo, Reserve and AwaitMirror."""

    call: int
    fault: Fault | None = None


OfRun = Delete | RewindTo | Reserve | AwaitMirror
"""What is asked of the run, and answered by Done."""
OfSave = Begin | Staged | Seal | Drop | Look
Request = Open | Share | Forget | OfSave | Hurry | Trust | OfRun | Release | Noted | Advice | Close
Reply = Opened | Refused | Progress | Ready | Committed | Failed | Dropped | Ask | Mirrored | MirrorState | Done

_LENGTH = struct.Struct("<I")


def frame(message: Request | Reply) -> bytes:
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class Deframer:
    """Messages out of a stream of bytes."""

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages, of the given kind, that `data` completes."""
        self._buffer += data
        found = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            found.append(self._decoder.decode(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return found
