"""Every error at every call: what the service does, and what is there afterwards."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from asyncckpt.errors import CheckpointError
from asyncckpt.policy.codec import Codec
from asyncckpt.policy.keep import Keep
from asyncckpt.testing import VERBS, FaultyPosix, Operation, Promises, RecordingPosix, ServiceDriver, examine
from asyncckpt.testing.recording import fsynced_again
from crash.rig import FACTOR, RUN, chunks_of, cut_everywhere
from crash.scenarios import alike, value

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EMFILE")
SHORT = "short write"
CHUNK = 8192


@dataclass(frozen=True)
class Deed:
    """What is done while one call fails, in a run that holds steps 1 and 2; `keep` is its policy."""

    do: Callable[[ServiceDriver], object]
    keep: Keep | None = None
    codec: Codec = field(default_factory=Codec)


DEEDS = {
    "save": Deed(lambda driver: driver.save(3, value(3, parts=2))),
    "overwrite": Deed(lambda driver: driver.save(2, value(3, parts=1), replace=True)),
    "save and retire": Deed(lambda driver: driver.save(3, value(3, parts=1)), Keep(last=2)),
    "save differences": Deed(lambda driver: driver.save(3, alike(3)), codec=Codec("delta")),
    "delete": Deed(lambda driver: driver.delete(2)),
    "pin": Deed(lambda driver: driver.pin(1)),
    "rewind": Deed(lambda driver: driver.rewind(1)),
}


class Trial:
    """One deed under one fault, in a new run below `base`."""

    def __init__(self, base: Path, deed: Deed, *, direct: bool) -> None:
        self.base, self.deed, self.direct = base, deed, direct
        self.faulty = FaultyPosix()
        self.posix = RecordingPosix(self.faulty)
        self.failed: CheckpointError | None = None
        self.states = 0
        base.mkdir()

    def calls(self) -> list[tuple[str, int]]:
        """Every call that the deed makes when nothing fails."""
        with chunks_of(CHUNK), self._open() as driver:
            self._prepare(driver)
            self.deed.do(driver)
            self._settled(driver)
            return [(verb, n + 1) for verb in VERBS for n in range(self.faulty.counts[verb])]

    def run(self, verb: str, at: int, error: str, *, lasting: bool = False, samples: int = 0) -> list[str]:
        """What goes wrong when the `at`-th call of `verb` ends with `error`; power cuts too, with `samples`."""
        with chunks_of(CHUNK):
            return self._run(verb, at, error, lasting, samples)

    def _run(self, verb: str, at: int, error: str, lasting: bool, samples: int) -> list[str]:
        driver = self._open()
        try:
            self._prepare(driver)
            fault(verb, at, error, lasting=lasting, posix=self.faulty)
            try:
                self.deed.do(driver)
            except CheckpointError as failure:
                self.failed = failure
            self._settled(driver)
            fired = self.faulty.fired
            self.faulty.heal()
            broken = self._look("after it", samples)
            driver.save(9, value(9, parts=1, blocks=1))
            driver.save(2, value(8, parts=1, blocks=1), replace=True)
        except CheckpointError as failure:
            return [f"{verb} {at} {error}: the next save failed: {failure!r}"]
        finally:
            driver.close()
        broken += self._look("after the next save", samples, everywhere=FACTOR > 1)
        broken += [f"{path} was fsynced again after a failure" for path in fsynced_again(self.posix.log)]
        if not fired:
            broken.append("the fault never came to pass")
        return [f"{verb} {at} {error} ({self.failed}): {why}" for why in broken]

    def _open(self) -> ServiceDriver:
        deed, root = self.deed, str(self.base / RUN)
        return ServiceDriver(
            root, self.posix, keep=deed.keep, direct=self.direct, codec=deed.codec, note=self.posix.note
        )

    def _prepare(self, driver: ServiceDriver) -> None:
        for step in (1, 2):
            driver.save(step, value(step, parts=1, blocks=1) if self.deed.codec.name == "raw" else alike(step))
        self._settled(driver)
        self.faulty.heal()

    def _settled(self, driver: ServiceDriver) -> None:
        """Retention after a save is over when a command that comes after it has been answered."""
        with suppress(CheckpointError):
            driver.delete(77)

    def _look(self, when: str, samples: int, everywhere: bool = False) -> list[str]:
        """What is broken now, and after power cuts now; or `everywhere` from the first error on."""
        log = self.posix.log
        promises = Promises.after(log, self.deed.keep)
        broken = [f"{when}: {why}" for why in promises.violations(examine(self.base / RUN))]
        if samples and not broken:
            start = self._first_error() if everywhere else len(log) - 1
            report = cut_everywhere(
                log, self.base, {RUN: Promises(self.deed.keep)}, samples=samples, seed=1, start=start
            )
            self.states += report.states
            broken = report.violations
        return broken

    def _first_error(self) -> int:
        log = self.posix.log
        errors = (i for i, entry in enumerate(log) if isinstance(entry, Operation) and entry.error is not None)
        return next(errors, len(log) - 1)


def fault(verb: str, at: int, error: str, *, lasting: bool = False, posix: FaultyPosix | None = None) -> FaultyPosix:
    """The `at`-th call of `verb` will end with `error`."""
    posix = posix or FaultyPosix()
    if error == SHORT:
        return posix.shorten(at, verb)
    return posix.fail(verb, at, getattr(errno, error), lasting=lasting)
