"""A notice to leave that any rank has got, and the call of `maybe_save` at which all save for it.

All ranks make the same calls, and each counts its own. Rank 0 asks where they are; whoever has answered goes no further
than into its next call before it knows what rank 0 has decided, which is the call after the furthest one's last. So no
rank has passed it, and all come to it in the course of the training. Words go and come on the threads of the mail: what
a rank waits for is never another rank's training, which may be waiting for this one in a collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from asyncckpt.distributed.group import Group
from asyncckpt.distributed.mail import Word

log = logging.getLogger("asyncckpt")
Deed = Literal["go on", "save", "leave"]
_NEVER = -1
"""Instead of a call: some rank makes no more, so that nothing can be saved by all."""
WORDS = ("notice", "where", "here", "gone", "save at")
"""Those of the mail that are for this; see `_take`."""


class Notices:
    """`patience` is for how many seconds a call waits for the decision; `send` is the mail's."""

    def __init__(self, group: Group, patience: float, send: Callable[[int, Word], None]) -> None:
        self._group, self._patience, self._send = group, patience, send
        self._changed = threading.Condition()
        self._calls = 0
        self._foreseen = False
        """Whether the last call counted is one that is only asked about yet."""
        self._reason, self._at = "", 0.0
        """Of the first notice, on whichever rank, and when it was heard of."""
        self._given = False
        """Whether this rank has got one itself."""
        self._hear: Callable[[str], None] | None = None
        self._heard = False
        self._bound = False
        """Whether this rank has said where it is."""
        self._answered = False
        self._target: int | None = None
        self._places: dict[int, int] = {}
        self._gone = False
        """At rank 0, where the ranks are, and whether one makes no more calls."""

    @property
    def first(self) -> tuple[str, float]:
        """Why to leave, and the `time.monotonic` when that was heard of."""
        return self._reason, self._at

    def listen(self, hear: Callable[[str], None]) -> None:
        """Call `hear` once there is a notice, with what it is: once, at once if there is one, on whatever thread."""
        with self._changed:
            self._hear = hear
        self._tell()

    def given(self, reason: str) -> None:
        """This rank has got a notice."""
        self._given = True
        self._note(reason)
        word = Word(self._group.rank, "notice", reason=f"{reason} at rank {self._group.rank}")
        if self._group.rank:
            self._send(0, word)
        else:
            self.take(word)

    def _note(self, reason: str) -> None:
        with self._changed:
            if not self._reason:
                self._reason, self._at = reason, time.monotonic()
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            hear, now = self._hear, self._reason and not self._heard
            if hear is None or not now:
                return
            self._heard = True
        hear(self._reason)

    # On the training thread

    def call(self) -> Deed:
        """A call of `maybe_save`: what it does for a notice. `save` and `leave` are said once.

        `leave`: the ranks could not agree, or one of them makes no more calls; the log has told.
        """
        with self._changed:
            self._count()
            self._foreseen = False
            return self._deed()

    def foresee(self) -> bool:
        """Whether the next call will say `save`."""
        with self._changed:
            self._count()
            self._foreseen = True
            self._decided()
            return self._target == self._calls

    def _count(self) -> None:
        if not self._foreseen:
            self._calls += 1

    def _decided(self) -> bool:
        """Whether all that this rank must know is known, after a while at most."""
        known = not self._bound or self._answered
        return known or self._changed.wait_for(lambda: self._target is not None, self._patience)

    def _deed(self) -> Deed:
        if self._answered:
            return "go on"
        if not self._decided() or self._unheard():
            log.error(
                "notice of a preemption (%s): the ranks did not agree within %g s on a step to save. Is one of them "
                "dead or stopped? Nothing is saved for it.",
                self._reason,
                self._patience,
            )
        elif self._target is None or self._target > self._calls:
            return "go on"
        self._answered = True
        if self._target == self._calls:
            return "save"
        if self._target == _NEVER:
            log.warning(
                "notice of a preemption (%s): a rank has closed its Checkpointer already; nothing is saved for it",
                self._reason,
            )
        return "leave"

    def _unheard(self) -> bool:
        """Whether rank 0 has not asked for so long after this rank got a notice that it will not."""
        return self._given and not self._bound and time.monotonic() - self._at > self._patience

    # On whatever thread

    def take(self, word: Word) -> None:
        """One of `WORDS` has come."""
        with self._changed:
            noted = self._take(word)
        if noted:
            self._note(word.reason)

    def _take(self, word: Word) -> bool:
        """Whether it tells of a notice."""
        mine = self._group.rank
        match word.what:
            case "notice":  # to rank 0: I have got one
                if self._bound:
                    return False
                self._bound = True
                self._places[mine] = self._calls
                self._send_all(Word(mine, "where", reason=word.reason))
            case "where":  # to all others: say where you are, and wait there
                self._bound = True
                self._send(0, Word(mine, "here", number=self._calls))
            case "here":  # to rank 0: so many calls
                self._places.setdefault(word.sender, word.number)
            case "gone":  # to rank 0: I make no more
                self._gone = True
            case "save at":  # to all others
                self._settle(word.number)
        if mine == 0 and self._bound and self._target is None:
            self._decide()
        return word.what in ("notice", "where")

    def _decide(self) -> None:
        if self._gone:
            self._announce(_NEVER)
        elif len(self._places) == self._group.world:
            self._announce(max(self._places.values()) + 1)

    def _announce(self, target: int) -> None:
        self._send_all(Word(self._group.rank, "save at", number=target))
        self._settle(target)

    def _settle(self, target: int) -> None:
        self._target = target
        self._changed.notify_all()

    def _send_all(self, word: Word) -> None:
        for rank in self._group.others:
            self._send(rank, word)

    def close(self) -> None:
        """This rank makes no more calls."""
        with self._changed:
            if self._group.rank:
                self._send(0, Word(self._group.rank, "gone"))
            elif self._bound and self._target is None:
                self._announce(_NEVER)
            unanswered = self._reason if not self._answered else ""
        if unanswered:
            log.warning(
                "a notice of a preemption (%s) came after the last maybe_save: nothing is saved for it", unanswered
            )
