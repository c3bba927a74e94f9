"""The real background service, driven without torch: images and leaf trees are handed in as bytes."""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec

from asyncckpt.catalog import notes
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import StorageError
from asyncckpt.format.digests import digest
from asyncckpt.format.image import header_size
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.storage.places import open_storage
from asyncckpt.storage.posix import Posix
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.testing.promises import (
    Deleted,
    Deleting,
    Event,
    MirrorAwaited,
    Mirrored,
    Pinned,
    Rewinding,
    Rewound,
    Saved,
    Saving,
    Unpinning,
    content_word,
)
from asyncckpt.write import messages as m
from asyncckpt.write import pipeline
from asyncckpt.write.client import ThreadWriter

PAGE = 4096
PATIENCE = 60.0
Value = Mapping[str, tuple[bytes, Any]]
"""By part: its image (empty where it holds no tensor), and its leaf tree."""


@dataclass
class _Arena:
    id: int
    size: int
    fd: int | None
    memory: memoryview


class ServiceDriver:
    """Owns the run in `root` by a service on a thread, over `posix`, or with `options` at a URL. Calls wait.

    `note` is told of every event when it begins and when it has been reported done; `RecordingPosix.note` fits.

    Raises:
        CheckpointError: the run can't be owned.
    """

    def __init__(
        self,
        root: str,
        posix: Posix | None = None,
        *,
        keep: Keep | None = None,
        direct: bool = True,
        codec: Codec = Codec(),  # noqa: B008
        note: Callable[[Event], None] = lambda event: None,
        rank: int = 0,
        ready: Callable[[], None] = lambda: None,
        options: StorageOptions = StorageOptions(),  # noqa: B008
        mirror: str | None = None,
        mirror_keep: Keep | None = None,
    ) -> None:
        self._note, self._ready = note, ready
        self._catalog = Catalog(open_storage(root, options, posix=posix))
        self._changed = threading.Condition()
        self._replies: list[m.Reply] = []
        self._events: dict[int, Event] = {}
        self._dead: str | None = None
        self._unfinished = 0
        self._known: dict[str, m.Known] = {}
        self._numbers = itertools.count(1)
        self._writer = ThreadWriter(self._on_reply, self._on_death, posix)
        to = None if mirror is None else m.MirrorTo(mirror, mirror_keep)
        self._writer.send(m.Open(root, 5.0, keep, direct, codec=codec, rank=rank, options=options, mirror=to))
        opened = self._await(lambda r: isinstance(r, m.Opened | m.Refused))
        if isinstance(opened, m.Refused):
            self._writer.join(PATIENCE)
            raise opened.fault.error()

    def save(self, step: int, value: Value, *, replace: bool = False) -> m.Committed:
        """Commit `value` as `step`.

        Raises:
            CheckpointError: the service says that it failed, or has died.
        """
        return self.finish(self.begin(step, value, replace=replace))

    def begin(
        self,
        step: int,
        value: Value,
        *,
        replace: bool = False,
        member: m.Member | None = None,
        content: str | None = None,
    ) -> int:
        """Start a save, from an arena of its own; returns its number, for `finish`.

        With `member` it is one rank's share; `content` is then the word for what all ranks save together.
        """
        number = next(self._numbers)
        spans, trees = [], {part: tree for part, (_, tree) in value.items()}
        position = 0
        for part, (image, _) in value.items():
            spans.append(m.Span(part, position, len(image)))
            position += -(-len(image) // PAGE) * PAGE
        text = msgspec.json.encode(trees)
        shares = b"" if member is None else b"{}"
        memory = memoryview(mmap.mmap(-1, position + len(text) + PAGE))
        for span in spans:
            memory[span.offset : span.offset + span.size] = value[span.part][0]
        memory[position : position + len(text) + len(shares)] = text + shares
        hashed = self._hash(spans, memory)
        event = Saved(step, content or content_of_value(value))
        self._events[number] = event
        self._note(Saving(step, event.content))
        self._writer.share(_Arena(number, len(memory), None, memory))
        self._writer.send(m.Begin(number, step, number, spans, replace, member=member))
        self._writer.send(m.Staged(number, position, hashed))
        self._writer.send(m.Seal(number, position, len(text), len(shares)))
        return number

    def _hash(self, spans: list[m.Span], memory: memoryview) -> list[m.Hashed]:
        """What a trainer tells of chunks: which are the same as in the last save, so that they are not given to the
        service, and the digest of half of the others."""
        self._unfinished += 1
        known = self._known if self._unfinished == 1 else {}
        hashed = []
        for span in spans:
            about = known.get(span.part, m.Known(span.size, pipeline.CHUNK_SIZE, b""))
            if not span.size or about.size != span.size:
                continue
            header = header_size(bytes(memory[span.offset : span.offset + 8]), span.size)
            for index, start in enumerate(range(0, span.size, about.chunk_size)):
                end = min(start + about.chunk_size, span.size)
                found = digest(memory[span.offset + start : span.offset + end])
                same = about.has(index, bytes.fromhex(found))
                if same:
                    wiped = max(start, min(header, end)), end
                    memory[span.offset + wiped[0] : span.offset + wiped[1]] = b"\xdd" * (wiped[1] - wiped[0])
                if same or index % 2:
                    hashed.append(m.Hashed(span.part, start, end - start, found, same))
        return hashed

    def finish(self, number: int) -> m.Committed:
        """Wait for the end of a save."""
        reply = self._await(lambda r: isinstance(r, m.Committed | m.Failed | m.Dropped) and r.save == number)
        self._writer.send(m.Forget(number))
        self._unfinished -= 1
        self._known = reply.known if isinstance(reply, m.Committed) else {}
        if isinstance(reply, m.Failed):
            raise reply.fault.error()
        assert isinstance(reply, m.Committed)
        return reply

    def reserve(self, step: int, attempt: str) -> None:
        """Let ranks write under `attempt`."""
        call = next(self._numbers)
        self._writer.send(m.Reserve(call, step, attempt))
        self._await(lambda r: isinstance(r, m.Done) and r.call == call)

    def release(self, step: int, attempt: str) -> None:
        """What was reserved will not be written."""
        self._writer.send(m.Release(step, attempt))

    def take_back(self, number: int) -> None:
        """Drop a save of several ranks, once the share of this one is prepared."""
        self._await(lambda r: isinstance(r, m.Ready) and r.save == number)
        self._writer.send(m.Drop(number))
        self._await(lambda r: isinstance(r, m.Dropped) and r.save == number)

    def look(self, committed: int | None = None) -> None:
        """Tell the service that something in the storage has changed: what a doorbell from another rank does.

        Of the save `committed` rank 0 has said that it is.
        """
        for number in list(self._events):
            self._writer.send(m.Look(number, number == committed))

    def delete(self, step: int) -> None:
        self._note(Deleting(step))
        self._call(m.Delete(next(self._numbers), step), Deleted(step))

    def rewind(self, step: int) -> None:
        self._note(Rewinding(step))
        self._call(m.RewindTo(next(self._numbers), step), Rewound(step))

    def await_mirror(self) -> None:
        """Wait until all that is committed is mirrored, or passed over."""
        self._done(m.AwaitMirror(next(self._numbers)))
        self._note(MirrorAwaited())

    def pin(self, step: int) -> None:
        notes.pin(self._catalog, step)
        self._note(Pinned(step))

    def unpin(self, step: int) -> None:
        self._note(Unpinning(step))
        notes.pin(self._catalog, step, False)

    def close(self) -> None:
        """Let the service finish what is begun, retention too, and end."""
        self._writer.send(m.Close())
        if not self._writer.join(PATIENCE):
            raise StorageError("the service does not end")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, request: m.Delete | m.RewindTo, event: Event) -> None:
        self._events[request.call] = event
        self._done(request)

    def _done(self, request: m.Delete | m.RewindTo | m.AwaitMirror) -> None:
        self._writer.send(request)
        done = self._await(lambda r: isinstance(r, m.Done) and r.call == request.call)
        assert isinstance(done, m.Done)
        if done.fault is not None:
            raise done.fault.error()

    def _await(self, wanted: Callable[[m.Reply], bool]) -> m.Reply:
        with self._changed:
            self._changed.wait_for(lambda: self._dead is not None or any(map(wanted, self._replies)), PATIENCE)
            reply = next(filter(wanted, self._replies), None)
            if reply is None:
                raise StorageError(f"the service {self._dead or 'does not answer'}")
            self._replies.remove(reply)
            return reply

    def _on_reply(self, reply: m.Reply) -> None:
        if isinstance(reply, m.Ready):
            self._ready()
        number = reply.save if isinstance(reply, m.Committed) else reply.call if isinstance(reply, m.Done) else None
        faulty = isinstance(reply, m.Done) and reply.fault is not None
        if number in self._events and not faulty:
            self._note(self._events[number])
        if isinstance(reply, m.Mirrored) and not reply.passed_over and reply.fault is None:
            saved = self._events.get(reply.save)
            self._note(Mirrored(reply.step, saved.content if isinstance(saved, Saved) else None))
        with self._changed:
            self._replies.append(reply)
            self._changed.notify_all()

    def _on_death(self, reason: str) -> None:
        with self._changed:
            self._dead = reason
            self._changed.notify_all()


def content_of_value(value: Value) -> str:
    """What `promises.content_of` gives for a checkpoint of `value`."""
    return content_word({part: (image, msgspec.json.encode(tree)) for part, (image, tree) in value.items()})
