"""The rig: record a scenario, cut the power everywhere, recover, and hold what is found against the promises."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from asyncckpt.format import names
from asyncckpt.format.seal import unseal
from asyncckpt.policy.records import Record
from asyncckpt.storage import spares
from asyncckpt.testing import Note, Operation, RecordingPosix, power_cuts
from asyncckpt.testing.crash import Cut, Disk, FileSystem, materialised
from asyncckpt.testing.promises import Examined, MirrorPromises, Promises, examine, leftovers, sweep
from asyncckpt.write import pipeline
from asyncckpt.write.journal import Mirroring
from crash.scenarios import MIRROR, Open, Scenario, resume

Log = list[Operation | Note]
RUN = "new/run"
"""Where the run lies below the base: its parent is new, too."""
BESIDE = os.path.join(os.path.dirname(RUN), MIRROR)
"""Where its mirror does."""
Places = Mapping[str, Promises]
"""What was promised of a directory, by where it lies below the base."""
FACTOR = float(os.environ.get("ASYNCCKPT_TORTURE", "1"))
"""How much longer than usual the long forms are."""


TESTS = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """For a process that imports from the tests; what is planted into this one is planted into that."""
    home = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)]))
    return {**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **variables}


def scaled(count: float) -> int:
    return max(1, round(count * FACTOR))


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: materialised disks need not be durable."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="asyncckpt-crash-", dir=place))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    before, pipeline.CHUNK_SIZE = pipeline.CHUNK_SIZE, size
    smallest, spares.SMALLEST = spares.SMALLEST, 0  # files as small as these are written over, too
    try:
        yield
    finally:
        pipeline.CHUNK_SIZE, spares.SMALLEST = before, smallest


def places(scenario: Scenario) -> Places:
    """The run, and its mirror if it has one, before anything was promised."""
    run: dict[str, Promises] = {RUN: Promises(scenario.keep)}
    return run | {BESIDE: MirrorPromises(scenario.mirror_keep)} if scenario.mirrored else run


def record(scenario: Scenario, base: Path, *, direct: bool, posix: RecordingPosix | None = None) -> Log:
    """The log of `scenario` done for real below `base`."""
    posix = posix or RecordingPosix()
    root = str(base / RUN)
    with chunks_of(scenario.chunk_size):
        scenario.run(lambda: scenario.driver(root, posix, direct, posix.note))
    return posix.log


@dataclass
class Report:
    """How much was tried, and what broke."""

    states: int = 0
    repeated: int = 0
    violations: list[str] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def __add__(self, other: Report) -> Report:
        return Report(self.states + other.states, self.repeated + other.repeated, self.violations + other.violations)

    def check(self) -> None:
        if self.violations:
            shown = "\n".join(self.violations[:5])
            raise AssertionError(f"{len(self.violations)} violations in {self.states} states:\n{shown}")


def cut_everywhere(
    log: Sequence[Operation | Note],
    base: Path,
    told: Places,
    *,
    samples: int,
    seed: int,
    disk: Disk | None = None,
    start: int = 0,
    patience: int = 1,
) -> Report:
    """Recover from every power cut in `log` from entry `start` on; stop after `patience` violations.

    `told`, of which nothing was promised before, hear of the notes in it.
    """
    report = Report()
    epoch, upto = 0, 0
    with memory_folder() as folder:
        points = range(start, len(log) + 1)
        for number, cut in enumerate(power_cuts(log, base, samples=samples, seed=seed, disk=disk, points=points)):
            for entry in log[upto : cut.at]:
                if isinstance(entry, Note):
                    for promises in told.values():
                        promises.tell(entry.what)
                    epoch += 1
            upto = cut.at
            key = (epoch, cut.disk.fingerprint)
            if key in report.seen:
                report.repeated += 1
                continue
            report.seen.add(key)
            report.states += 1
            report.violations += recover(folder / str(number), cut, told)
            if len(report.violations) >= patience:
                break
    return report


def recover(place: Path, cut: Cut, told: Places) -> list[str]:
    """Real recovery on the disk of `cut`: what is broken."""
    with materialised(place, cut.disk) as base:
        broken = held_against(base, told)
    return [f"cut after entry {cut.at}: {why} [{cut.how}]" for why in broken]


def held_against(base: Path, told: Places, *, mirror_swept: bool = True) -> list[str]:
    """What is broken below `base`, twice: as a reader finds it, and after a new owner has cleared it."""
    broken = not_whole(base) if len(told) > 1 else []
    for place, promises in told.items():
        root = base / place
        first = examine(root)
        found = promises.violations(first)
        if root.exists() and (mirror_swept or place == RUN):
            sweep(root)
            found += after_sweep(root, first)
        broken += [why if place == RUN else f"{place}: {why}" for why in found]
    return broken


def not_whole(base: Path) -> list[str]:
    """Files that are written down as whole on the mirror, lie there in their full size, and are not."""
    journal = base / RUN / names.MIRRORING
    if not journal.exists():
        return []
    broken = []
    for folder, files in unseal(journal.read_bytes(), Mirroring, names.MIRRORING).files.items():
        for name in files:
            here, there = (base / place / folder / name for place in (RUN, BESIDE))
            if here.exists() and there.exists() and there.stat().st_size == here.stat().st_size:
                broken += [] if there.read_bytes() == here.read_bytes() else [f"{folder}/{name} is not whole"]
    return [f"{BESIDE}: {why}, though the journal says so" for why in broken]


def behind(base: Path, told: Places) -> list[str]:
    """What a mirror lacks of the run, where all that was to be done is done."""
    run = examine(base / RUN).contents
    broken = []
    for place, promises in told.items():
        if place == RUN:
            continue
        found = examine(base / place).contents
        every = [Record(step) for step in {*run, *found}]
        gone = set() if promises.keep is None else {*promises.keep.retire(every)}
        wanted = {step: content for step, content in run.items() if step not in gone}
        if not wanted.items() <= found.items():
            broken.append(f"{place} has {found}, and not all of {wanted}")
    return broken


def after_sweep(root: Path, before: Examined) -> list[str]:
    """A sweep takes nothing that is listed, and leaves nothing that is not."""
    after = examine(root)
    broken = []
    if after != before:
        broken.append(f"the sweep changed what is listed: {before} became {after}")
    if before.error is None and (left := leftovers(root)):
        broken.append(f"the sweep left {left}")
    return broken


def cut_recovery(
    log: Log,
    base: Path,
    scenario: Scenario,
    *,
    at: int,
    samples: int,
    seed: int,
    patience: int = 1,
    then: Callable[[Open], None] = resume,
) -> Report:
    """Kill the service after entry `at`, let another do `then`, and cut the power all along its way."""
    system = FileSystem(base)
    for index, entry in enumerate(log[:at]):
        if isinstance(entry, Operation):
            system.apply(entry, index)
    shutil.rmtree(base)
    with materialised(base, system.live()):
        going_on = replace(scenario, run=then, chunk_size=Scenario.chunk_size, world=1)
        second = record(going_on, base, direct=False)
    base.mkdir()
    return cut_everywhere(
        [*log[:at], *second], base, places(scenario), samples=samples, seed=seed, start=at, patience=patience
    )


class Progress:
    """A line on stderr now and then, for the long forms."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, itertools.count(1)
        self._began = self._last = time.monotonic()

    def step(self, figures: str = "") -> None:
        done, now = next(self._done), time.monotonic()
        if FACTOR > 1 and (now - self._last > 5 or done == self._total):
            self._last = now
            left = (now - self._began) / done * (self._total - done)
            line = f"{self._what}: {done} of {self._total}, {left:.0f} s left. {figures}"
            print(line, file=sys.__stderr__, flush=True)
