"""The exceptions, grouped by what a handler would do about them.

Every message says what happened, where, and what to do next. All derive from `CheckpointError`; those that
mean the same as a builtin derive from it too, so that `except FileNotFoundError` keeps working.
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of everything asyncckpt raises on purpose."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The checkpoint, part or tensor asked for does not exist."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """This step is committed already, and `overwrite=True` was not given."""


class CheckpointBusyError(CheckpointError):
    """The checkpoint is pinned, or somebody reads it, so it was not deleted."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """Stored bytes are not what was committed. Nothing of them was used.

    `step`, `part`, `tensor` and `chunk` say where, as far as it is known.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        part: str | None = None,
        tensor: str | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.part = part
        self.tensor = tensor
        self.chunk = chunk


class StorageError(CheckpointError, OSError):
    """The storage, or the writer that uses it, failed. `retryable` says whether the same call may succeed later."""

    def __init__(self, message: str, *, retryable: bool = False, errno: int | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        if errno is not None:
            self.errno = errno


class ConflictError(CheckpointError):
    """Another live writer owns this run. `pid` is its process id where it is known."""

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class RankError(CheckpointError):
    """Another rank failed, or did not answer in time, so that what all were to do together was not done.

    `rank` is which, where it is known. The next save may succeed.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class NotSupportedError(CheckpointError, NotImplementedError):
    """This asyncckpt can't do that, in the setting that the message names."""


class QueueFullError(CheckpointError):
    """`when_full="raise"`: `max_in_flight` snapshots are staged and not yet committed."""


class UnsupportedStateError(CheckpointError, TypeError):
    """The state holds something that can't be stored exactly. `path` says where it stands."""

    def __init__(self, message: str, *, path: str = "") -> None:  # without one when it is unpickled
        super().__init__(message)
        self.path = path


class StateMismatchError(CheckpointError, ValueError):
    """A checkpoint and the live objects do not fit: keys `missing`, `unexpected` or `misshaped`."""

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        misshaped: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.misshaped = misshaped


class TornSnapshotError(CheckpointError):
    """Tensors changed while they were copied in the background; the save was not committed.

    `tensors` names them. They are copied before `save` returns from now on.
    """

    def __init__(self, message: str, *, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors
