"""What goes after a commit: by the policy the service was given, or as the trainer answers, who is asked.

A policy that is a function of the trainer's runs there, while nothing is locked here. What has changed meanwhile is
not deleted, and neither is anything where the trainer gives no answer: its policy failed, or it is gone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from asyncckpt.catalog.custody import Custody
from asyncckpt.format.manifest import Manifest
from asyncckpt.policy.keep import candidates
from asyncckpt.policy.records import Record
from asyncckpt.write import messages as m
from asyncckpt.write.workers import Workers


class Retention:
    """All methods run on the service's event loop; `custody` gives the custody to one at a time."""

    def __init__(
        self,
        custody: Callable[[], AbstractAsyncContextManager[Custody]],
        asks: bool,
        workers: Workers,
        reply: Callable[[m.Reply], None],
    ) -> None:
        self._custody, self._workers, self._reply = custody, workers, reply
        self._asks = asks
        self._numbers = itertools.count(1)
        self._answer: tuple[int, asyncio.Future[list[int] | None]] | None = None
        self._again = False
        self._over = False

    async def after_commit(self, manifest: Manifest, replaced: str | None) -> None:
        """Remove what a commit replaced, then what the policy lets go."""
        async with self._custody() as custody:
            await self._workers.run(custody.after_commit, manifest, replaced)
        if self._asks and not self._over:
            await self._ask()

    async def again(self) -> None:
        """Something that had to stay need not any more."""
        async with self._custody() as custody:
            await self._workers.run(custody.tidy)
        if self._asks and not self._over:
            await self._ask()

    def answer(self, message: m.Advice) -> None:
        """What the trainer says to the question of that number."""
        if self._answer is not None and self._answer[0] == message.call and not self._answer[1].done():
            self._answer[1].set_result(message.steps)

    def give_up(self) -> None:
        """Expect no answer any more."""
        self._over = True
        if self._answer is not None and not self._answer[1].done():
            self._answer[1].set_result(None)

    async def _ask(self) -> None:
        """Ask, and ask again if there has been a commit meanwhile; there is never more than one question."""
        self._again = True
        if self._answer is not None:
            return
        while self._again and not self._over:
            self._again = False
            self._answer = next(self._numbers), asyncio.get_running_loop().create_future()
            try:
                await self._ask_once(*self._answer)
            finally:
                self._answer = None

    async def _ask_once(self, number: int, answer: asyncio.Future[list[int] | None]) -> None:
        async with self._custody() as custody:
            asked = candidates(await self._workers.run(custody.catalog.records))
        self._reply(m.Ask(number, asked))
        steps = await answer
        if steps is None:
            return
        policy = partial(_advised, {r.attempt for r in asked if r.step in steps})
        async with self._custody() as custody:
            await self._workers.run(custody.retire, policy)


def _advised(attempts: set[str], records: Sequence[Record]) -> list[int]:
    """The policy that lets go of these attempts: not of a step that was saved again since the question."""
    return [record.step for record in records if record.attempt in attempts]
