"""A file on its way to an object store.

Pieces come from several threads, in about their order; a thread hands them on as one multipart upload, so that parts
are sent while later ones are still being coded. Memory that stays as it is goes out without a copy. An upload that is
given up, or fails, is aborted; of the parts of one whose process died nobody hears any more, and only a lifecycle rule
of the bucket removes them.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterator

from asyncckpt.errors import StorageError
from asyncckpt.storage.cloud import Cloud

BLOCK = 4096
PART = 8 << 20
"""The size of a part: that of a chunk, which is then sent from where it lies."""
MOST_PARTS = 9_000
"""S3 takes 10,000."""
_PARALLEL, _PARALLEL_COPIED = 8, 4
"""Parts of one file that are sent at a time; fewer where each takes memory of its own."""
_AHEAD = 2
"""Pieces that wait to be sent, while whoever brings more waits."""
_STARTS = 4
"""Tries to start an upload."""
_ZEROS = memoryview(bytes(1 << 20))


class Upload:
    """A new object `key`, of about `size` bytes. With `steady`, memory is sent from where it lies."""

    def __init__(self, cloud: Cloud, key: str, size: int, steady: bool) -> None:
        self._cloud, self._key, self._steady = cloud, key, steady
        room = size if steady else max(size, PART * 2 * MOST_PARTS)
        self._part = PART * max(1, -(-room // (PART * MOST_PARTS)))
        self._size = size
        self._changed = threading.Condition()
        self._early: dict[int, memoryview] = {}
        """Pieces that came before those in front of them."""
        self._end = 0
        """Where what has been put in order ends."""
        self._queue: deque[memoryview] = deque()
        self._queued = self._sent = 0
        self._last = False
        self._given_up = False
        self._moved = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write_at(self, offset: int, data: memoryview) -> None:
        piece = data if self._steady else memoryview(bytes(data))
        with self._changed:
            self._check()
            self._early[offset] = piece
            if not self._put_in_order():
                return  # others have to come first
            if self._thread is None and max(self._size, self._queued) > self._part:
                self._start()
            while self._thread is not None and len(self._queue) > _AHEAD:
                self._wait()
                self._check()

    def _put_in_order(self) -> bool:
        """Queue what comes next, if it is there. Between pieces there are zeros, up to the next block."""
        before = self._end
        while self._early:
            aligned = -(-self._end // BLOCK) * BLOCK
            at = self._end if self._end in self._early else aligned
            if at not in self._early:
                break
            self._fill(at)
            self._queue_piece(self._early.pop(at))
        self._changed.notify_all()
        return self._end > before

    def _fill(self, end: int) -> None:
        """Zeros up to `end`."""
        while self._end < end:
            self._queue_piece(_ZEROS[: end - self._end])

    def _queue_piece(self, piece: memoryview) -> None:
        if piece:
            self._queue.append(piece)
            self._queued += len(piece)
            self._end += len(piece)

    def finish(self, size: int | None = None) -> None:
        try:
            with self._changed:
                self._check()
                for at in sorted(self._early):
                    self._fill(at)
                    self._queue_piece(self._early.pop(at))
                self._fill(self._size if size is None else size)
                self._last = True
                self._changed.notify_all()
                while self._thread is not None:
                    self._wait()
                self._check()
                pieces = list(self._queue)
            if pieces or not self._queued:
                self._put_whole(pieces)
        finally:
            self.abort()

    def abort(self) -> None:
        with self._changed:
            self._given_up = True
            self._early.clear()
            self._queue.clear()
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._given_up:
            raise self._was_given_up()

    def _wait(self) -> None:
        """Wait for a change; not for ever."""
        left = self._moved + 1.5 * self._cloud.patience - time.monotonic()
        if left <= 0:
            raise StorageError(
                f"can't upload {self._cloud.url}/{self._key}: no part was sent for {1.5 * self._cloud.patience:g} s",
                retryable=True,
                errno=errno.EIO,
            )
        self._changed.wait(left)

    def _put_whole(self, pieces: list[memoryview]) -> None:
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        put = self._cloud.api.put
        self._cloud.again(
            "upload", self._key, lambda: put(self._cloud.store, self._key, data, use_multipart=False), errno.EIO
        )

    # On the thread

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="asyncckpt-upload", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._thread = None
            raise StorageError(f"can't start a thread to upload {self._key}: {error}", retryable=True) from error

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._put_parts()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._thread = error, None
            self._changed.notify_all()

    def _put_parts(self) -> None:
        put = self._cloud.api.put
        error: BaseException | None = None
        for _ in range(_STARTS):
            try:
                put(
                    self._cloud.store,
                    self._key,
                    self._pieces(),
                    use_multipart=True,
                    chunk_size=self._part,
                    max_concurrency=_PARALLEL if self._steady else _PARALLEL_COPIED,
                )
                return
            except StorageError:
                raise  # it was given up
            except (self._cloud.api.exceptions.BaseError, OSError) as raised:
                error = raised
            if self._is_there():
                return
            if self._sent or not self._cloud.may_go_away(error):
                break  # what has been sent can't be had again
        assert error is not None
        again = self._cloud.may_go_away(error)
        raise StorageError(
            f"can't upload {self._cloud.url}/{self._key}: {self._cloud.cause(error)}",
            retryable=again,
            errno=errno.EIO if again else errno.EACCES,
        ) from None

    def _is_there(self) -> bool:
        """Whether the store has the whole object all the same: it has answered that, and the answer was lost."""
        if self._sent < self._queued or not self._last:
            return False
        try:
            with self._cloud.named("look at", self._key):
                size: int = self._cloud.api.head(self._cloud.store, self._key)["size"]
        except (FileNotFoundError, StorageError):
            return False
        return size == self._sent

    def _pieces(self) -> Iterator[memoryview]:
        """What is to be sent, as it comes.

        Raises:
            StorageError: the file is given up. obstore aborts the upload then.
        """
        while True:
            with self._changed:
                self._moved = time.monotonic()
                self._changed.notify_all()
                while not self._queue and not self._last and not self._given_up:
                    self._changed.wait()
                if self._given_up:
                    raise self._was_given_up()
                if not self._queue:
                    return
                piece = self._queue.popleft()
                self._sent += len(piece)
                self._changed.notify_all()
            yield piece

    def _was_given_up(self) -> StorageError:
        return StorageError(f"the upload of {self._cloud.url}/{self._key} was given up")
