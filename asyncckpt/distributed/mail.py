"""Doorbells between ranks: short words, sent and heard by threads of their own, over the store.

A word may be lost, with the process that sends it or that keeps the store. What depends on one arriving finds out by
itself, later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import msgspec

from asyncckpt.distributed.group import Group
from asyncckpt.write.messages import Fault

log = logging.getLogger("asyncckpt")
_FOR_EVER = timedelta(days=100)
_GOODBYE = 5.0


class Word(msgspec.Struct, frozen=True):
    """Of the save under `attempt`: its sender is ready (`ready`), it is committed (`decided`), or it is `failed`.

    Or of a notice to leave, and why: see `notices`.
    """

    sender: int
    what: str
    attempt: str = ""
    fault: Fault | None = None
    number: int = 0
    reason: str = ""


class Mail:
    """`hear` is called, by a thread of this, with every word that comes from `start` on."""

    def __init__(self, group: Group, hear: Callable[[Word], None]) -> None:
        self._group, self._hear = group, hear
        self._outgoing: SimpleQueue[tuple[int, Word] | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=work, args=(group.connection(),), name=f"asyncckpt-{name}", daemon=True)
            for name, work in (("ring", self._send_all), ("hear", self._hear_all))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, rank: int, word: Word) -> None:
        """Returns at once."""
        self._outgoing.put((rank, word))

    def close(self) -> None:
        """Send what is to be sent, and hear no more."""
        self._closed = True
        self.send(self._group.rank, Word(self._group.rank, "bye"))
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join(_GOODBYE)

    def _send_all(self, store: Any) -> None:
        while (letter := self._outgoing.get()) is not None:
            rank, word = letter
            try:
                number = store.add(f"mail/{rank}", 1)
                store.set(f"mail/{rank}/{number}", msgspec.msgpack.encode(word))
            except RuntimeError as error:
                log.debug("rank %d was not told of %s: %s", rank, word, error)

    def _hear_all(self, store: Any) -> None:
        box, number = f"mail/{self._group.rank}", 1
        try:
            while not self._closed:
                key = f"{box}/{number}"
                store.wait([key], _FOR_EVER)
                word = msgspec.msgpack.decode(store.get(key), type=Word)
                store.delete_key(key)
                number += 1
                if word.what != "bye":
                    self._hear(word)
        except RuntimeError as error:
            log.debug("no more is heard of other ranks: %s", error)
