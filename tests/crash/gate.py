"""The mutation gate: for each promise a bug that breaks it, and the tests of the suite that must fail with it.

    python -m crash.gate [NAME ...]

runs the named ones, or all, each in a process forked for it, and prints as JSON what was wrong: of a bug that was not
found, or whose tests fail without it. The bugs that the crash rig finds by checks of its own are in
`test_planted_bugs`. It has torch imported and no thread but its first, so that it may fork.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
from dataclasses import dataclass

import pytest
import torch

import asyncckpt
from crash import rig

PLANTING = rig.TESTS / "support" / "planting"
SECONDS = 300
"""After which a test that hangs with its bug is given up."""

ROOM = 4 << 30
"""Bytes of address space of a test with a bug: some bugs take all there is."""


@dataclass(frozen=True)
class Mutant:
    """`plant` is a function of `planted` or `planted_face`; `found` a pattern in what pytest says of `tests`."""

    promise: str
    plant: str
    tests: str
    found: str
    slow: bool = False
    """For the long form: it takes more than a few seconds."""


_KILLS = "crash/test_kills.py::test_kills_at_every_operation"
_TRAINER = "service/test_trainer_death.py::test_"
_BYTES = "read/test_reader.py::test_every_flipped_byte_of_every_file_is_found"
_OPERATION = "killed_while_the_writer_is_at[fsync-None"
MUTANTS = {
    "kills, retention before commit": Mutant(
        "1",
        "planted:retention_before_commit",
        f"{_KILLS}[retention-buffered]",
        "reported committed and is not there",
        slow=True,
    ),
    "kills, leftovers stay": Mutant(
        "18", "planted:leftovers_stay", f"{_KILLS}[plain-buffered]", "the sweep left", slow=True
    ),
    "staged given up with its trainer": Mutant(
        "3",
        "planted:staged_given_up_with_the_trainer",
        f"{_TRAINER}{_OPERATION}-kill]",
        "CheckpointNotFound|== 2",
        slow=True,
    ),
    "staged given up, at any instant": Mutant(
        "3",
        "planted:staged_given_up_with_the_trainer",
        "crash/test_trainer_kills.py",
        "had been promised",
        slow=True,
    ),
    "writer in the trainer's group": Mutant(
        "3", "planted:writer_in_the_trainers_group", f"{_TRAINER}{_OPERATION}-killpg]", "Error|== 2", slow=True
    ),
    "trainer's end told by the link alone": Mutant(
        "3",
        "planted:trainers_end_told_by_the_link_alone",
        f"{_TRAINER}killed_with_data_loader_workers_alive",
        "does not end",
        slow=True,
    ),
    "digest not checked": Mutant(
        "5",
        "planted:digest_not_checked",
        _BYTES,
        "assert refused",
    ),
    "seal not checked": Mutant("5", "planted:seal_not_checked", _BYTES, "assert refused", slow=True),
    "fence does not wait": Mutant("8", "planted_face:fence_does_not_wait", "snapshot/test_fence.py", "Error"),
    "buffers copied late": Mutant(
        "8",
        "planted_face:all_is_copied_late",
        "snapshot/test_fence.py::test_what_no_optimizer_owns_is_copied_before_save_returns",
        "Error",
    ),
    "tears not looked for": Mutant(
        "8",
        "planted_face:tears_not_looked_for",
        "snapshot/test_torn.py::test_a_change_that_no_fence_sees",
        "DID NOT RAISE|committed",
    ),
    "run not locked": Mutant("10", "planted:run_not_locked", "catalog/test_ownership.py", "DID NOT RAISE|assert"),
    "writer left over not waited for": Mutant(
        "10",
        "planted:writer_left_over_not_waited_for",
        f"{_TRAINER}the_next_start_waits_for_the_writer_left_over_and_gets_its_checkpoint",
        "ConflictError",
        slow=True,
    ),
    "leaving does not drain": Mutant(
        "12",
        "planted_face:leaving_does_not_drain",
        "service/test_leaving.py::test_with_the_writer_thread[end]",
        "Error",
    ),
    "second signal not heard": Mutant(
        "13",
        "planted_face:second_signal_not_heard",
        "service/test_preempted_processes.py::test_the_same_signal_again_aborts",
        "does not end",
        slow=True,
    ),
    "handler before not called": Mutant(
        "13", "planted_face:handler_before_not_called", "service/test_signal_handlers.py", "assert"
    ),
    "forked child not noticed": Mutant(
        "14", "planted_face:forked_child_not_noticed", "service/test_fork.py", "hung", slow=True
    ),
    "memory not asked for": Mutant(
        "15",
        "planted_face:memory_not_asked_for",
        "service/test_limits.py::test_a_limit_of_the_cgroup_is_told_before_it_is_met",
        "assert",
        slow=True,
    ),
    "arenas never used again": Mutant(
        "15",
        "planted_face:arenas_never_used_again",
        "service/test_queue.py::test_memory_is_bounded_by_the_slots_and_does_not_grow",
        "assert",
        slow=True,
    ),
    "storage looked at by every save": Mutant(
        "16",
        "planted_face:storage_looked_at_by_every_save",
        "service/test_hung_storage.py::test_a_save_does_not_look_at_the_storage",
        "the storage was looked at",
        slow=True,
    ),
    "hung storage not told": Mutant(
        "16",
        "planted_face:hung_storage_not_told",
        "service/test_hung_storage.py::test_a_save_that_waits_for_a_place_says_so",
        "assert|Error",
        slow=True,
    ),
    "deleted though it is read": Mutant(
        "17", "planted:deleted_though_read", "catalog/test_in_use.py", "assert|DID NOT RAISE"
    ),
    "header taken at its word": Mutant(
        "20", "planted:header_taken_at_its_word", "hostile/test_attacks.py", "Error|assert", slow=True
    ),
    "offsets taken at their word": Mutant(
        "20", "planted:offsets_taken_at_their_word", "hostile/test_attacks.py", "Error|assert", slow=True
    ),
    "links followed": Mutant("20", "planted:links_followed", "hostile/test_attacks.py", "opened|assert", slow=True),
    "files for all to read": Mutant("21", "planted:files_for_all_to_read", "service/test_privacy.py", "assert"),
}


def run(mutant: Mutant, planted: bool) -> tuple[int, str]:
    """The exit code of pytest and what it says."""
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = _child(mutant, planted)
            finally:
                sys.stdout.flush()
                os._exit(code)
        if not select.select([watched := os.pidfd_open(pid)], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(watched)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read()


def _child(mutant: Mutant, planted: bool) -> int:
    os.chdir(rig.TESTS.parent)
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    if planted:
        module, _, name = mutant.plant.partition(":")
        os.environ["ASYNCCKPT_TESTS_PLANT"] = f"crash.{module}:{name}"
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (PLANTING, rig.TESTS, rig.TESTS.parent)))
        getattr(importlib.import_module(f"crash.{module}"), name)(pytest.MonkeyPatch())
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"--timeout={SECONDS - 60}"]
    return int(pytest.main([*options, f"tests/{mutant.tests}"]))


def wrong(name: str, control: bool) -> str | None:
    """What is wrong with the gate's answer to a bug; with `control`, without the bug too."""
    mutant = MUTANTS[name]
    code, said = run(mutant, planted=True)
    if code == pytest.ExitCode.OK and re.search(r"\bskipped\b", said) and not re.search(r"\bpassed\b", said):
        return None  # what the test needs is not here
    if code != pytest.ExitCode.TESTS_FAILED or not re.search(mutant.found, said):
        return f"not found, exit code {code}: {said[-1500:]}"
    if control and (answer := run(mutant, planted=False))[0] != pytest.ExitCode.OK:
        return f"fails without it: {answer[1][-1500:]}"
    return None


def main() -> None:
    torch.set_num_threads(1)
    assert asyncckpt.__version__
    control = "--control" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("--")] or list(MUTANTS)
    progress, answers = rig.Progress("planted bugs", len(names)), {}
    for name in names:
        answers[name] = wrong(name, control)
        progress.step(name)
    print(json.dumps({name: why for name, why in answers.items() if why is not None}))


if __name__ == "__main__":
    main()
