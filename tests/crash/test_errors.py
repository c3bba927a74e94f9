"""The seven errors at every call of every verb: told or harmless, the last checkpoint whole, the next save works."""

import logging
import warnings

import pytest

from asyncckpt.catalog.catalog import Catalog
from asyncckpt.errors import CheckpointError
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.read.select import newest
from asyncckpt.storage.local import LocalStorage
from asyncckpt.testing import FaultyPosix, RecordingPosix, ServiceDriver, examine
from asyncckpt.testing.promises import content_of
from crash.errors import DEEDS, ERRORS, SHORT, Trial, fault
from crash.rig import FACTOR, Progress, memory_folder, scaled
from crash.scenarios import value

pytestmark = pytest.mark.timeout(3600)
WITH_CUTS = ("EIO", "ENOSPC")
"""One that is tried once more under new names, and one that is not."""
NAMES = ("mkdir", "fsync", "fsync_dir", "rename", "link", "unlink", "rmdir")


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("name", DEEDS)
def test_every_error_at_every_call(figure, caplog, name, direct):
    """The short form takes the errors in turn, call by call, and the long form all of them at each."""
    caplog.set_level(logging.CRITICAL)
    pairs, states, broken = 0, 0, []
    with memory_folder() as folder:
        calls = Trial(folder / "clean", DEEDS[name], direct=direct).calls()
        trials = list(planned(calls, direct))
        progress = Progress(f"errors at every call, {name}", len(trials))
        for verb, at, error, lasting in trials:
            samples = scaled(2) if error in WITH_CUTS and verb in NAMES else 0
            trial = Trial(folder / str(pairs), DEEDS[name], direct=direct)
            broken += trial.run(verb, at, error, lasting=lasting, samples=min(samples, 8))
            pairs, states = pairs + 1, states + trial.states
            progress.step()
    figure("error x call pairs", pairs)
    figure("model states", states)
    assert not broken, f"{len(broken)} of {pairs}:\n" + "\n".join(broken[:10])


def planned(calls, direct):
    """Verb, call, error, and whether it lasts."""
    for number, (verb, at) in enumerate(calls):
        both = (False, True) if FACTOR > 1 else (number % 2 == 0,)
        errors = ERRORS if FACTOR > 1 else (ERRORS[(number + direct) % len(ERRORS)],)
        if FACTOR <= 1 and verb in NAMES and not direct:
            errors = {*errors, *WITH_CUTS}
        for error in sorted(errors):
            for lasting in both:
                yield verb, at, error, lasting
        if verb == "pwrite":
            yield verb, at, SHORT, False


def test_every_error_while_reading(tmp_path, figure, caplog):
    """A restore gives the right bytes of a committed step, or a documented error; never "nothing"."""
    caplog.set_level(logging.CRITICAL)
    root = tmp_path / "run"
    with ServiceDriver(str(root)) as driver:
        for step in (1, 2):
            driver.save(step, value(step))
    contents = examine(root).contents
    pairs, broken = 0, []
    for verb, calls in read_under(root, contents).counts.items():
        for at in range(1, calls + 1):
            for error in (*ERRORS, *([SHORT] if verb == "preadv" else [])):
                faulty = fault(verb, at, error)
                try:
                    read_under(root, contents, faulty)
                except CheckpointError:
                    pass
                except (AssertionError, OSError) as failure:
                    broken.append(f"{verb} {at} {error}: {failure!r}")
                pairs += faulty.fired
    figure("error x read pairs", pairs)
    assert pairs > 100
    assert not broken, "\n".join(broken[:10])


def read_under(root, contents, faulty=None):
    """Restore the newest that can be read."""
    faulty = faulty or FaultyPosix()
    catalog = Catalog(LocalStorage(str(root), faulty))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, _ = newest(catalog, lambda step: (step, content_of(CheckpointReader(catalog, step))))
    assert found is not None
    assert contents[found[0]] == found[1]
    return faulty


def test_a_lost_answer_is_not_a_lost_save(tmp_path):
    """The call was done, and an error came back all the same: what is there is whole, and the next save works."""
    for verb in ("link", "fsync_dir", "fsync", "unlink"):
        root = tmp_path / verb
        faulty = FaultyPosix()
        with ServiceDriver(str(root), RecordingPosix(faulty)) as driver:
            driver.save(1, value(1))
            calls = faulty.counts[verb]
            faulty.fail(verb, calls + 1, 28, after=True)
            with pytest.raises(OSError):
                driver.save(2, value(2))
            driver.save(3, value(3))
        found = examine(root)
        assert not found.damaged
        assert {1, 3} <= set(found.contents)
