"""Lives of a run, told to the real service. Torch-free, so that a process that runs them may fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from support.checkpoints import image_of

from asyncckpt.errors import CheckpointError
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.storage.posix import Posix
from asyncckpt.testing import RanksDriver, ServiceDriver
from asyncckpt.testing.promises import Event
from asyncckpt.testing.service import Value

Open = Callable[[], ServiceDriver]
MIRROR = "mirror"
"""The folder of a mirror, beside that of the run."""


@dataclass(frozen=True)
class Scenario:
    """What is done with the run that `open_` opens; `chunk_size` is that of the data files, `world` how many ranks.

    With `mirrored`, it has a mirror beside it, `MIRROR`, with a policy of its own.
    """

    run: Callable[[Open], None]
    keep: Keep | None = None
    chunk_size: int = 8 << 20
    codec: Codec = field(default_factory=Codec)
    world: int = 1
    mirrored: bool = False
    mirror_keep: Keep | None = None

    def driver(self, root: str, posix: Posix, direct: bool, note: Callable[[Event], None]) -> ServiceDriver:
        """What `open_` opens: the service, or those of all ranks."""
        about: dict[str, Any] = {"keep": self.keep, "direct": direct, "codec": self.codec}
        if self.mirrored:
            about |= {"mirror": os.path.join(os.path.dirname(root), MIRROR), "mirror_keep": self.mirror_keep}
        if self.world == 1:
            return ServiceDriver(root, posix, note=note, **about)
        ranks: Any = RanksDriver(root, posix, world=self.world, note=note, **about)
        return ranks


def value(seed: int, parts: int = 2, blocks: int = 2) -> Value:
    """Parts with images of some blocks and a tail, no two seeds alike, and one part without a tensor."""
    made: dict[str, tuple[bytes, Any]] = {}
    for i in range(parts):
        noise = np.random.default_rng([seed, i]).integers(0, 256, 4096 * blocks + 100 + i, np.uint8)
        _, image = image_of({"w": noise})
        made[f"part{i}"] = (image, {"seed": seed, "w": {"$": "tensor", "n": "w"}})
    return {**made, "note": (b"", {"seed": seed})}


def plain(open_: Open) -> None:
    with open_() as driver:
        driver.save(1, value(1, parts=3))
        driver.save(2, value(2, parts=1))


def overwriting(open_: Open) -> None:
    with open_() as driver:
        driver.save(1, value(1))
        driver.save(1, value(2), replace=True)
        driver.save(1, value(3, parts=0), replace=True)


def retention(open_: Open) -> None:
    with open_() as driver:
        for step in range(1, 5):
            driver.save(step, value(step, parts=1, blocks=1))


def rewinding(open_: Open) -> None:
    with open_() as driver:
        for step in (10, 20, 30):
            driver.save(step, value(step, parts=1, blocks=1))
        driver.rewind(10)
        driver.save(20, value(21, parts=1, blocks=1), replace=True)


def pinning(open_: Open) -> None:
    with open_() as driver:
        for step in (1, 2, 3):
            driver.save(step, value(step, parts=1, blocks=1))
            if step == 1:
                driver.pin(1)


def unpinning(open_: Open) -> None:
    with open_() as driver:
        driver.save(1, value(1, parts=1, blocks=1))
        driver.pin(1)
        driver.save(1, value(2, parts=1, blocks=1), replace=True)
        driver.unpin(1)
        driver.save(2, value(3, parts=1, blocks=1))


def deleting(open_: Open) -> None:
    with open_() as driver:
        driver.save(1, value(1, parts=1))
        driver.save(2, value(2, parts=1))
        driver.delete(2)
        driver.save(2, value(3, parts=1))
        driver.delete(1)


def queueing(open_: Open) -> None:
    with open_() as driver:
        for number in [driver.begin(step, value(step, parts=1)) for step in (1, 2, 3)]:
            driver.finish(number)


def restarting(open_: Open) -> None:
    for step in (1, 2):
        with open_() as driver:
            driver.save(step, value(step, parts=1))


def alike(seed: int) -> Value:
    """A part whose first 8 KiB are the same for every seed, and whose others differ little."""
    still, live = np.arange(1024, dtype=np.int32), np.arange(4096, dtype=np.int32) * 1000 + seed
    return {"part0": (image_of({"still": still, "w": live})[1], {"seed": seed})}


def changing(open_: Open) -> None:
    """Of a part's chunks some change a little, and some never; a step is saved anew, a base deleted."""
    with open_() as driver:
        for step in (1, 2, 3):
            driver.save(step, alike(step))
        driver.save(3, alike(9), replace=True)
        driver.delete(2)
        driver.save(4, alike(4))


def mirroring(open_: Open) -> None:
    """One step is mirrored before the next is saved, the last when the service ends; one is saved anew, one deleted."""
    with open_() as driver:
        driver.save(1, value(1, parts=1, blocks=1))
        driver.await_mirror()
        driver.save(1, value(2, parts=0), replace=True)
        driver.save(2, value(3, parts=1, blocks=1))
        driver.await_mirror()
        driver.delete(1)


def mirroring_differences(open_: Open) -> None:
    """Files are shared from step to step on the mirror, too."""
    with open_() as driver:
        for step in (1, 2, 3):
            driver.save(step, alike(step))
            driver.await_mirror()
        driver.save(4, alike(4))


def catching_up(open_: Open) -> None:
    """Mirror what is not mirrored yet, and nothing else."""
    with open_() as driver:
        driver.await_mirror()


SCENARIOS = {
    "plain": Scenario(plain),
    "overwriting": Scenario(overwriting),
    "retention": Scenario(retention, Keep(last=1)),
    "rewinding": Scenario(rewinding, Keep(last=2)),
    "deleting": Scenario(deleting),
    "pinning": Scenario(pinning, Keep(last=1)),
    "unpinning": Scenario(unpinning, Keep(last=1)),
    "queueing": Scenario(queueing, Keep(last=2)),
    "restarting": Scenario(restarting),
    "small_chunks": Scenario(plain, chunk_size=4096),
    "coded": Scenario(changing, chunk_size=8192, codec=Codec("zstd")),
    "differences": Scenario(changing, Keep(last=2), chunk_size=8192, codec=Codec("delta", max_chain=2)),
    "mirrored": Scenario(mirroring, mirrored=True),
    "ranks": Scenario(plain, world=2),
    "ranks_overwriting": Scenario(overwriting, world=2),
    "ranks_deleting": Scenario(deleting, world=3),
}
if float(os.environ.get("ASYNCCKPT_TORTURE", "1")) > 1:  # they take a minute even in their short form
    SCENARIOS["ranks_differences"] = replace(SCENARIOS["differences"], world=2)
    SCENARIOS["mirrored_differences"] = replace(
        SCENARIOS["differences"], run=mirroring_differences, keep=Keep(last=1), mirrored=True, mirror_keep=Keep(last=2)
    )
    SCENARIOS["incremental"] = replace(SCENARIOS["coded"], codec=Codec("incremental"))


def resume(open_: Open, step: int = 90) -> None:
    """What comes after a crash: own the run, clear leftovers, save, save the same step anew."""
    with open_() as driver:
        driver.save(step, value(step, parts=1, blocks=1), replace=True)
        for old in (1, 2):
            try:
                driver.save(old, value(step + old, parts=0), replace=True)
            except CheckpointError:
                raise AssertionError(f"saving step {old} after a crash failed") from None
