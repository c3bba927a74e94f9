"""The trainer's side of the mirror: what the writer says of it, and who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from msgspec import structs

from asyncckpt.errors import StorageError
from asyncckpt.handle import SaveHandle
from asyncckpt.link import Link, OfMirror, Patience
from asyncckpt.stats import MirrorStats
from asyncckpt.write import messages as m


class MirrorWatch:
    """What is known of the mirror at `url`, if there is one. `changed` guards it."""

    def __init__(self, url: str | None, changed: threading.Condition, link: Callable[[], Link]) -> None:
        self.url = url
        self.state = m.MirrorState()
        self._changed, self._link = changed, link
        self._pending: dict[int, SaveHandle] = {}
        self._failed: list[tuple[SaveHandle | None, BaseException]] = []

    @property
    def stats(self) -> MirrorStats | None:
        """None where there is no mirror."""
        return None if self.url is None else MirrorStats(**structs.asdict(self.state))

    def expect(self, number: int, handle: SaveHandle) -> None:
        """The save of that number is about to be told committed: it is the mirror's turn. Called with the lock held."""
        if self.url is not None:
            handle.mirror = "pending"
            handle.wait_for_mirror = partial(self.wait, number)
            self._pending[number] = handle

    def hear(self, reply: OfMirror) -> None:
        with self._changed:
            if isinstance(reply, m.MirrorState):
                self.state = reply
            else:
                self._settle(reply)
            self._changed.notify_all()

    def _settle(self, reply: m.Mirrored) -> None:
        handle = self._pending.pop(reply.save, None)
        error = None if reply.fault is None else reply.fault.error()
        if error is not None:
            self._failed.append((handle, error))
        if handle is not None:
            handle.mirror_error = error
            handle.mirror = "failed" if error is not None else "passed over" if reply.passed_over else "mirrored"

    def writer_ended(self, reason: str) -> None:
        """What was to be mirrored is for the next writer, which knows nothing of these saves. With the lock held."""
        for handle in self._pending.values():
            handle.mirror = "failed"
            handle.mirror_error = StorageError(
                f"the writer {reason} before step {handle.step} was mirrored. The next one, which the next save or "
                'wait_until_flushed(tier="mirror") starts, goes on with it.',
                retryable=True,
            )
        self._pending.clear()
        self.state = m.MirrorState()

    def wait(self, save: int = 0, timeout: float | None = None) -> None:
        """Return when all that is committed is mirrored or passed over, or can't be; or `save` is, if one is given.

        Raises:
            CheckpointError: the mirror fails; see `SaveHandle.wait_mirrored`.
            TimeoutError: that is not so after `timeout` seconds.
        """
        if self.url is None or (save and save not in self._pending):
            return
        try:
            self._link().call(partial(m.AwaitMirror, save=save), Patience("the mirror", self.url), timeout)
        except TimeoutError:
            raise TimeoutError(
                f"{self.state.backlog or 'some'} steps are not mirrored to {self.url} yet after {timeout:g} s"
                + f": {self.state.error}" * bool(self.state.error)
            ) from None

    def failures(self) -> list[BaseException]:
        """Steps that can't be mirrored, for what is here of them is damaged, and nobody was told. They are told now."""
        with self._changed:
            failed, self._failed = self._failed, []
        return [error for handle, error in failed if handle is None or not handle.mirror_told]
