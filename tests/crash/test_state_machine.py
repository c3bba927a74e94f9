"""A run that lives on: saves, retention, rewinds, deletes and restarts in any order, and each power cut is survived
by whatever disk it leaves, from which the next owner goes on."""

import random
import shutil

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from asyncckpt.errors import CheckpointExistsError, CheckpointNotFoundError
from asyncckpt.policy.keep import Keep
from asyncckpt.testing import Note, Operation, Promises, RecordingPosix, ServiceDriver, examine
from asyncckpt.testing.crash import Disk, FileSystem, random_fates
from crash.rig import RUN, Progress, after_sweep, memory_folder, scaled
from crash.scenarios import value

STEPS = st.integers(1, 6)
progress = Progress("lives of a run", scaled(30))


class Run(RuleBasedStateMachine):
    """`disk` is what the last power cut left, durable; the log holds what has been done since."""

    def __init__(self):
        super().__init__()
        self.folder = memory_folder()
        self.base = self.folder.__enter__() / "disk"
        self.base.mkdir()
        self.seeds = iter(range(1, 1000))
        self.disk = Disk()
        self.driver = None

    @initialize(keep=st.sampled_from([None, Keep(last=1), Keep(last=2), Keep(last=1, every=3)]), direct=st.booleans())
    def begin(self, keep, direct):
        self.keep, self.direct = keep, direct
        self.known = Promises(keep)
        self.posix = RecordingPosix()
        self.own()

    def own(self):
        root = str(self.base / RUN)
        self.driver = ServiceDriver(root, self.posix, keep=self.keep, direct=self.direct, note=self.posix.note)

    @rule(saves=st.lists(st.tuples(STEPS, st.integers(0, 2), st.booleans()), min_size=1, max_size=4))
    def save(self, saves):
        for step, parts, replace in saves:
            try:
                self.driver.save(step, value(next(self.seeds), parts=parts, blocks=1), replace=replace)
            except CheckpointExistsError:
                assert not replace

    @rule(step=STEPS)
    def delete(self, step):
        listed = examine(self.base / RUN).contents
        try:
            self.driver.delete(step)
        except CheckpointNotFoundError:
            assert step not in listed or self.keep is not None

    @rule(step=STEPS)
    def rewind(self, step):
        self.driver.rewind(step)

    @rule()
    def restart(self):
        self.driver.close()
        self.look(self.promises(self.posix.log))
        self.own()

    @rule(luck=st.integers(0, 2**32))
    def cut_the_power(self, luck):
        """Anywhere, but every other time where something has just been reported done."""
        self.driver.close()
        log, coin = self.posix.log, random.Random(luck)
        reported = [i + 1 for i, entry in enumerate(log) if isinstance(entry, Note)]
        at = coin.choice(reported) if reported and coin.random() < 0.5 else coin.randint(0, len(log))
        system = FileSystem(self.base, self.disk)
        for index, entry in enumerate(log[:at]):
            if isinstance(entry, Operation):
                system.apply(entry, index)
        fates = random_fates(system.pending(), coin)
        self.disk = system.after(lambda change: fates.get(change, False))
        shutil.rmtree(self.base)
        self.base.mkdir()
        self.disk.make(self.base)
        found = self.look(self.promises(log[:at]))
        self.known = Promises(self.keep, {s: [c] for s, c in found.contents.items()}, set(found.contents))
        self.posix = RecordingPosix()
        self.own()

    def promises(self, log):
        """What was known at the last power cut, and what was told since."""
        told = Promises(self.keep, {s: list(c) for s, c in self.known.may.items()}, set(self.known.must))
        for entry in log:
            if isinstance(entry, Note):
                told.tell(entry.what)
        return told

    def look(self, promises):
        found = examine(self.base / RUN)
        assert promises.violations(found) == []
        return found

    def teardown(self):
        try:
            if self.driver is not None:
                self.driver.close()
                root = self.base / RUN
                found = self.look(self.promises(self.posix.log))
                self.own()
                self.driver.close()
                assert after_sweep(root, found) == []
            progress.step()
        finally:
            self.folder.__exit__(None, None, None)


TestRun = pytest.mark.timeout(3600)(Run.TestCase)
TestRun.settings = settings(max_examples=scaled(30), stateful_step_count=20, deadline=None)
