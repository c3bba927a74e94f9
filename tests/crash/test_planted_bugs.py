"""The rig is worth something only if it finds bugs: each of these is planted, and must be found; then the same check,
on the package as it is, must find nothing."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support import processes
from support.checkpoints import flip

import asyncckpt
from asyncckpt.errors import RankError
from asyncckpt.format import names
from asyncckpt.testing import FaultyPosix, Hold, Promises, ServiceDriver, examine
from asyncckpt.testing.promises import Saved, Saving
from asyncckpt.testing.service import content_of_value
from asyncckpt.write import client
from asyncckpt.write import messages as m
from crash import planted, planted_face
from crash.errors import DEEDS, Trial
from crash.rig import cut_everywhere, cut_recovery, places, record
from crash.scenarios import SCENARIOS, catching_up, value

PATIENCE = 60.0
KILLED_WRITER = str(Path(processes.__file__).with_name("killed_writer.py"))

# The checks: what they find, in words


def power(name, direct=False, samples=16):
    """Power cuts all along a scenario."""

    def check(base):
        scenario = SCENARIOS[name]
        base.mkdir()
        log = record(scenario, base, direct=direct)
        return cut_everywhere(log, base, places(scenario), samples=samples, seed=1, patience=10_000).violations

    return check


def takeover(name, verb):
    """A kill just before the first call of `verb`, another owner, power cuts."""

    def check(base):
        scenario = SCENARIOS[name]
        base.mkdir()
        log = record(scenario, base, direct=False)
        at = next(i for i, entry in enumerate(log) if getattr(entry, "verb", None) == verb)
        return cut_recovery(log, base, scenario, at=at, samples=16, seed=1, patience=10_000).violations

    return check


def mirror_resumed(base):
    """A kill once the first file of the mirror has its blocks and none of its bytes, another owner, power cuts."""
    scenario = SCENARIOS["mirrored"]
    base.mkdir()
    log = record(scenario, base, direct=False)
    verbs = [getattr(entry, "verb", None) for entry in log]
    made = next(i for i, verb in enumerate(verbs) if verb == "create" and "/mirror/step" in log[i].arguments[0])
    at = verbs.index("reserve", made) + 1
    return cut_recovery(log, base, scenario, at=at, samples=16, seed=1, patience=10_000, then=catching_up).violations


def error(verb, code, samples=0):
    """An error at the first call of `verb`, in a save."""

    def check(base):
        return Trial(base, DEEDS["save"], direct=False).run(verb, 1, code, samples=samples)

    return check


def death(base):
    """Writers that are killed at one operation after another: what is reported committed is there."""
    found = []
    for verb in ("create", "fsync", "link"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(client, "COMMAND", [sys.executable, "-P", KILLED_WRITER, verb, "1"])
            with asyncckpt.Checkpointer(base / verb) as ckpt:
                handle = ckpt.save(1, {"x": torch.arange(3000)})
                try:
                    handle.result(PATIENCE)
                except asyncckpt.StorageError:
                    continue
                found += [] if ckpt.steps() == [1] else ["step 1 was reported committed and is not there"]
    return found


def arenas(base):
    """A save whose writing stands still while the next one is taken keeps its own values."""
    hold = Hold()
    posix = FaultyPosix().hold("pwrite", 1, hold)
    states = {step: {"x": torch.full((3000,), step)} for step in (1, 2)}
    with asyncckpt.Checkpointer(base, writer="thread", overlap=False, _posix=posix) as ckpt:
        first = ckpt.save(1, states[1])
        assert hold.wait_reached()
        second = ckpt.save(2, states[2])
        hold.release()
        for handle in (first, second):
            handle.result(PATIENCE)
    found = []
    for step, state in states.items():
        try:
            same = torch.equal(asyncckpt.load(base, step)["x"], state["x"])
        except asyncckpt.CorruptCheckpointError as failure:
            found.append(f"step {step} is damaged: {failure}")
        else:
            found += [] if same else [f"step {step} holds the values of another"]
    return found


def one_of_two_ranks(base):
    """Of two ranks only one writes."""
    attempt, promises = names.new_attempt(), Promises()
    with ServiceDriver(str(base)) as driver:
        driver.reserve(1, attempt)
        number = driver.begin(1, value(1), member=m.Member(0, 2, attempt, patience=0.3))
        try:
            driver.finish(number)
        except RankError:
            pass
    return promises.violations(examine(base))


def flipped(base):
    """A byte of a tensor is changed on disk."""
    promises = Promises()
    with ServiceDriver(str(base)) as driver:
        for step in (1, 2):
            driver.save(step, value(step, parts=1))
            for event in (Saving, Saved):
                promises.tell(event(step, content_of_value(value(step, parts=1))))
    (file,) = base.glob("step-00000001/*/part0.safetensors")
    flip(file, 5000)
    found = examine(base)
    return [] if 1 in found.damaged else promises.violations(found)


def all_damaged(base):
    """Every checkpoint is damaged, and a training wants to resume."""
    with ServiceDriver(str(base)) as driver:
        for step in (1, 2):
            driver.save(step, value(step, parts=1))
    for file in base.rglob("part0.safetensors"):
        flip(file, 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step = asyncckpt.restore(base, {"note": {"seed": 0}, "part0": {}}, strict=False)
        except asyncckpt.CorruptCheckpointError:
            return []
    return [f"restore gave {step} where every checkpoint is damaged"]


LOST = "reported committed and is not there"
DAMAGED = "damaged"
BUGS = {
    "data fsync left out, buffered": (planted.no_data_fsync, power("plain"), DAMAGED),
    "data fsync left out, O_DIRECT": (planted.no_data_fsync, power("plain", direct=True), DAMAGED),
    "directory fsync left out before the commit": (planted.without("settle", "fsync_dir"), power("plain"), DAMAGED),
    "directory fsync left out after the commit": (planted.without("publish", "fsync_dir"), power("plain"), LOST),
    "fsync of a new parent left out": (planted.without("make_root", "fsync_dir"), power("plain"), LOST),
    "manifest published before data": (planted.manifest_before_data, power("plain"), DAMAGED),
    "manifest not fsynced": (planted.without("publish", "fsync"), power("plain"), DAMAGED),
    "prepare record not fsynced": (planted.without("put", "fsync"), power("plain"), DAMAGED),
    "retention before commit": (planted.retention_before_commit, power("retention"), LOST),
    "bytes removed before the manifest": (planted.bytes_before_manifest, power("deleting"), DAMAGED),
    "set aside before the manifest is gone": (
        planted.recycled_before_the_manifest,
        power("retention", direct=True),
        DAMAGED,
    ),
    "written over though its unlink is not durable": (
        planted.without("delete", "fsync_dir"),
        power("retention", direct=True),
        DAMAGED,
    ),
    "rewind not durable": (planted.not_durable(names.REWINDS), power("rewinding"), "taken back"),
    "pin not durable": (planted.not_durable(names.NOTES), power("pinning"), "reported pinned and is not"),
    "pins not looked at": (planted.pins_not_looked_at, power("pinning"), LOST),
    "overwrite that unlinks first": (planted.overwrite_unlinks_first, power("overwriting"), LOST),
    "temp name reused without truncating": (planted.temporary_reused, takeover("overwriting", "rename"), DAMAGED),
    "fsync retried after failure": (planted.fsync_retried, error("fsync", "EIO"), "fsynced again"),
    "fsync retried, and what it loses": (planted.fsync_retried, error("fsync", "EIO", samples=16), DAMAGED),
    "worker exception swallowed": (planted.worker_error_swallowed, error("pwrite", "ENOSPC"), DAMAGED),
    "writer death taken for done": (planted_face.death_taken_for_done, death, LOST),
    "a later save overwrites a leased arena": (planted_face.leased_arena_given_out, arenas, "damaged|of another"),
    "record of a rank seen before it is durable": (planted.rank_record_not_durable, power("ranks"), DAMAGED),
    "commit without waiting for the other ranks": (planted.ranks_not_waited_for, one_of_two_ranks, DAMAGED),
    "mirror: directory fsync left out before the commit": (
        planted.mirrored_before_it_is_durable,
        power("mirrored", samples=4),
        "mirror: .*damaged",
    ),
    "mirror: told before the manifest is durable": (
        planted.told_mirrored_too_early,
        power("mirrored", samples=4),
        "mirror: .*reported mirrored and is not there",
    ),
    "mirror: what is there taken for whole": (
        planted.mirrored_files_taken_for_whole,
        mirror_resumed,
        "mirror: .*damaged",
    ),
    "mirror: files noted before they are whole": (
        planted.mirrored_files_noted_too_early,
        power("mirrored", samples=4),
        "though the journal says so",
    ),
    "mirror: what an earlier writer left is forgotten": (
        planted.mirror_goes_on_with_nothing,
        mirror_resumed,
        "mirror: .*reported mirrored and is not there",
    ),
    "digest not checked": (planted.digest_not_checked, flipped, "never saved"),
    "nothing when all are bad": (planted_face.nothing_when_all_are_bad, all_damaged, "restore gave None"),
}


@pytest.mark.parametrize("name", BUGS)
def test_found_where_it_is_and_nowhere_else(tmp_path, monkeypatch, caplog, name):
    caplog.set_level(logging.CRITICAL)
    plant, check, expected = BUGS[name]
    with monkeypatch.context() as patched:
        plant(patched)
        found = check(tmp_path / "mutant")
    assert any(re.search(expected, why) for why in found), f"not found; instead {found[:3]}"
    assert check(tmp_path / "whole") == []
