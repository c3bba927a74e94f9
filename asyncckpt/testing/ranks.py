"""The real services of several ranks, driven without torch: `ServiceDriver`, for a world of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import msgspec

from asyncckpt.format import names
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.storage.posix import Posix
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.testing.promises import Event, content_word
from asyncckpt.testing.service import ServiceDriver, Value
from asyncckpt.write import messages as m


class RanksDriver:
    """The services of `world` ranks on threads of this process, over one `posix`. Each rank saves a value of its own.

    Raises:
        CheckpointError: the run can't be owned.
    """

    def __init__(
        self,
        root: str,
        posix: Posix | None = None,
        *,
        world: int = 2,
        patience: float = 30.0,
        keep: Keep | None = None,
        direct: bool = True,
        codec: Codec = Codec(),  # noqa: B008
        note: Callable[[Event], None] = lambda event: None,
        options: StorageOptions = StorageOptions(),  # noqa: B008
    ) -> None:
        self._patience = patience
        about: dict[str, Any] = {"direct": direct, "codec": codec, "options": options}
        self.drivers = [ServiceDriver(root, posix, keep=keep, note=note, **about)]
        ready = self.drivers[0].look
        self.drivers += [ServiceDriver(root, posix, rank=rank, ready=ready, **about) for rank in range(1, world)]

    def save(self, step: int, value: Value, *, replace: bool = False) -> m.Committed:
        """Commit, as `step`, `value` with its rank in every tree.

        Raises:
            CheckpointError: the first that a service has reported.
        """
        return self.finish(self.begin(step, value, replace=replace))

    def begin(self, step: int, value: Value, *, replace: bool = False) -> list[int]:
        """Start a save on every rank; returns its numbers, for `finish`."""
        attempt = names.new_attempt()
        self.drivers[0].reserve(step, attempt)
        values = [_of_rank(value, rank) for rank in range(len(self.drivers))]
        word = content_word(
            {
                f"{part} of rank {rank}": (image, msgspec.json.encode(tree))
                for rank, value in enumerate(values)
                for part, (image, tree) in value.items()
            }
        )
        return [
            driver.begin(
                step,
                values[rank],
                replace=replace,
                member=m.Member(rank, len(self.drivers), attempt, self._patience),
                content=word,
            )
            for rank, driver in enumerate(self.drivers)
        ]

    def finish(self, numbers: list[int]) -> m.Committed:
        """Wait for the end of a save, on every rank."""
        replies: list[m.Committed] = []
        errors: list[Exception] = []
        for driver, number in zip(self.drivers, numbers, strict=True):
            driver.look(number if replies else None)
            try:
                replies.append(driver.finish(number))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return replies[0]

    def give_up(self, step: int, value: Value) -> str:
        """Let all ranks but the first write their shares of a save that is then taken back; returns the attempt."""
        attempt = names.new_attempt()
        self.drivers[0].reserve(step, attempt)
        for rank, driver in enumerate(self.drivers[1:], 1):
            member = m.Member(rank, len(self.drivers), attempt, self._patience)
            driver.take_back(driver.begin(step, _of_rank(value, rank), member=member))
        self.drivers[0].release(step, attempt)
        return attempt

    def delete(self, step: int) -> None:
        self.drivers[0].delete(step)

    def rewind(self, step: int) -> None:
        self.drivers[0].rewind(step)

    def pin(self, step: int) -> None:
        self.drivers[0].pin(step)

    def unpin(self, step: int) -> None:
        self.drivers[0].unpin(step)

    def close(self) -> None:
        """Let the services finish what is begun, and end."""
        for driver in reversed(self.drivers):
            driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _of_rank(value: Value, rank: int) -> dict[str, tuple[bytes, Any]]:
    return {part: (image, {"rank": rank, "value": tree}) for part, (image, tree) in value.items()}
