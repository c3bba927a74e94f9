"""Is what a peer reports saved really there after `kill -9`, and did anything ask the disk to keep it?"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.child import ChildError, Record

_CALLS = "fsync,fdatasync,sync_file_range,sync,syncfs,rename,renameat,renameat2,link,linkat,openat"
_SYNC = re.compile(r"^(?:fsync|fdatasync)\(\d+<(?P<path>[^>]*)>")
_WHOLE = re.compile(r"^(?:syncfs\(|sync\()")
_OPEN = re.compile(r'^openat\(.*"(?P<path>[^"]*)", (?P<flags>[A-Z_|]+).*= \d+')
_MOVE = re.compile(r"^(?:rename|renameat|renameat2|link|linkat)\((?P<rest>.*)\) = 0")


@dataclass(frozen=True)
class Synced:
    """What was fsynced of a checkpoint: files and directories, each with how many there are."""

    files: int
    of_files: int
    directories: int
    of_directories: int

    def __str__(self) -> str:
        if self.files == self.of_files and self.directories == self.of_directories:
            return "all"
        if self.files == self.directories == 0:
            return "no"
        return f"files {self.files}/{self.of_files}, dirs {self.directories}/{self.of_directories}"


def survives_kill(peer: str, shape: dict[str, Any], directory: Path, repeats: int, limit: float) -> Record:
    """Save, SIGKILL the trainer the moment it says "saved", and restore in a fresh process.

    Raises:
        ChildError: the save failed.
    """
    with child.Child("save", limit, peer=peer, shape=shape, directory=str(directory), leave=False) as trainer:
        saved = next(iter(trainer.records()), None)
        if saved is None:
            raise ChildError(trainer.last_words())
        trainer.kill()
    try:
        restored = _restored(peer, shape, directory, saved, repeats, limit)
    except ChildError as error:
        times = _times_without_kill(peer, shape, directory / "again", repeats, limit)
        return {**times, "survived": False, "why": str(error)}
    why = "" if restored["exact"] else "what came back is not what was saved"
    return {**restored, "survived": restored["exact"], "why": why}


def _restored(peer: str, shape: dict[str, Any], directory: Path, saved: Record, repeats: int, limit: float) -> Record:
    options = {"peer": peer, "shape": shape, "directory": str(directory), "repeats": repeats}
    return child.run("restore", limit, step=saved["step"], fingerprint=saved["fingerprint"], **options)[-1]


def _times_without_kill(peer: str, shape: dict[str, Any], directory: Path, repeats: int, limit: float) -> Record:
    """What a peer that lost its save restores at, when it may end in peace."""
    directory.mkdir()
    saved = child.run("save", limit, peer=peer, shape=shape, directory=str(directory), leave=True)[-1]
    return _restored(peer, shape, directory, saved, repeats, limit)


def fsynced(peer: str, shape: dict[str, Any], directory: Path, limit: float) -> Record:
    """Trace one save, and say what of its files and directories was fsynced; without strace, that it is not known.

    Raises:
        ChildError: the save failed.
    """
    strace = shutil.which("strace")
    if strace is None:
        return {"fsynced": "n/a", "why": "strace is not installed"}
    with tempfile.TemporaryDirectory(prefix="bench-strace-") as traces:
        options = ("-ff", "-y", "--seccomp-bpf", "-qq", "-e", f"trace={_CALLS}", "-o", f"{traces}/t")
        with child.Child(
            "save", limit, wrap=(strace, *options), peer=peer, shape=shape, directory=str(directory), leave=True
        ) as trainer:
            for _ in trainer.records():
                pass
        lines = [line for file in Path(traces).iterdir() for line in file.read_text(errors="replace").splitlines()]
    found = synced(lines, directory)
    if found.of_files == 0:
        raise ChildError("there are no files after the save")
    return {"fsynced": str(found), "why": ""}


def synced(trace: list[str], directory: Path) -> Synced:
    """What a trace says of the files and directories now at and below `directory`."""
    root = os.path.realpath(directory)
    paths: set[str] = set()
    moves: list[tuple[str, str]] = []
    everything = False
    for line in trace:
        if match := _SYNC.match(line):
            paths.add(match["path"])
        elif _WHOLE.match(line):
            everything = True
        elif (match := _OPEN.match(line)) and ("O_SYNC" in match["flags"] or "O_DSYNC" in match["flags"]):
            paths.add(match["path"])
        elif match := _MOVE.match(line):
            moves.append(_ends(match["rest"]))
    _follow(paths, moves)
    files, directories = [], [root]
    for folder, names, found in os.walk(root):
        directories += [os.path.join(folder, name) for name in names]
        files += [os.path.join(folder, name) for name in found if not name.endswith(".lock")]
    return Synced(
        sum(everything or path in paths for path in files),
        len(files),
        sum(everything or path in paths for path in directories),
        len(directories),
    )


def _ends(arguments: str) -> tuple[str, str]:
    """The two paths of a rename or link; a relative one is below the directory that stands before it."""
    parts = re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"', arguments)
    source, target = (os.path.normpath(os.path.join(base, name)) for base, name in parts[:2])
    return source, target


def _follow(paths: set[str], moves: list[tuple[str, str]]) -> None:
    """Add the names that synced files and directories have come to bear; traces are not in order between threads."""
    for _ in range(3):
        for source, target in moves:
            for path in list(paths):
                if path == source or path.startswith(source + "/"):
                    paths.add(target + path[len(source) :])
