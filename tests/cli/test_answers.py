"""Exit codes, and names that are meant to harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import Part, commit, flip, snapshot
from support.cli import Command, manifest_of

from asyncckpt.cli import answers
from asyncckpt.storage.local import LocalStorage

HOSTILE = "w\x1b[31m\n\x07\u202e\x9b"
"""A tensor's name that would colour, break a line, beep, turn the text around, and start a control sequence."""


# Exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls"], answers.USAGE),
        (["nonsense"], answers.USAGE),
        (["ls", "{run}", "--nonsense"], answers.USAGE),
        (["ls", "ftp://bucket/run"], answers.USAGE),
        (["ls", ""], answers.USAGE),
        (["ls", "{run}/nothing"], answers.NOT_FOUND),
        (["show", "{run}@7"], answers.NOT_FOUND),
        (["show", "{run}", "--part", "nothing"], answers.NOT_FOUND),
        (["path", "{run}", "note"], answers.NOT_FOUND),
        (["path", "{run}@7"], answers.NOT_FOUND),
        (["verify", "{run}@7"], answers.NOT_FOUND),
        (["verify", "{run}@100", "--all"], answers.USAGE),
        (["diff", "{run}", "{run}@7"], answers.NOT_FOUND),
        (["pin", "{run}@7"], answers.NOT_FOUND),
        (["prune", "{run}"], answers.USAGE),
        (["prune", "{run}", "--keep-last", "0"], answers.USAGE),
        (["prune", "{run}", "--keep-last", "-3"], answers.USAGE),
        (["prune", "{run}", "--keep-best", "1"], answers.USAGE),
        (["prune", "{run}", "--keep-best", "1", "--metric", "loss", "--mode", "most"], answers.USAGE),
        (["prune", "{run}", "--keep-within", "soon"], answers.USAGE),
        (["prune", "{run}", "--keep-within", "99999999999d"], answers.USAGE),
        (["show", "{run}@300"], answers.CORRUPT),
        (["diff", "{run}", "{run}@300"], answers.CORRUPT),
        (["path", "{run}@300"], answers.CORRUPT),
        (["pin", "{run}@300"], answers.CORRUPT),
        (["plan"], answers.USAGE),
        (["plan", "--state", "much"], answers.USAGE),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(cli: Command, run: Path, words: list[str], code: int) -> None:
    flip(manifest_of(run, 300), 5)
    before = snapshot(run)
    found = cli(*(word.format(run=run) for word in words))
    assert found.code == code
    assert found.out == "" and found.err != ""
    assert snapshot(run) == before, "what fails changes nothing"


def test_a_storage_that_fails_has_its_exit_code(cli: Command, tmp_path: Path) -> None:
    commit(LocalStorage(str(tmp_path)), 1)
    manifest_of(tmp_path, 1).unlink()
    manifest_of(tmp_path, 1).mkdir()
    found = cli("show", tmp_path, "--json")
    assert (found.code, found.json["error"]["type"]) == (answers.STORAGE, "StorageError")


def test_errors_are_json_too(cli: Command, run: Path) -> None:
    found = cli("show", f"{run}@7", "--json")
    assert found.json["code"] == found.code == answers.NOT_FOUND
    assert found.json["error"]["type"] == "CheckpointNotFoundError" and "step 7" in found.json["error"]["message"]


def test_a_bug_of_ours_is_told_as_such(cli: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncckpt.cli import listing

    monkeypatch.setattr(listing, "ls", lambda location: 1 / 0)
    found = cli("ls", run)
    assert found.code == answers.BUG and "Traceback" in found.err


def test_the_exit_codes_stand_in_the_help(cli: Command) -> None:
    """And in the README."""
    text = " ".join(cli("--help").out.split())
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for code, meaning in answers.EXIT_CODES.items():
        assert f"{code} {meaning}" in text
        assert f"| {code} | {meaning} |" in readme


# Names that are meant to harm


def controls(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n"}


@pytest.mark.parametrize(
    "words", [["show"], ["show", "--json"], ["diff"], ["diff", "--json"], ["ls"], ["ls", "--json"]]
)
def test_no_control_character_of_a_name_reaches_the_terminal(cli: Command, tmp_path: Path, words: list[str]) -> None:
    storage = LocalStorage(str(tmp_path))
    metrics = {HOSTILE: 1.0}
    commit(storage, 1, {"p": Part({HOSTILE: np.zeros(3)}, {HOSTILE: HOSTILE})}, metrics=metrics)
    commit(storage, 2, {"p": Part({HOSTILE: np.ones(3)}, {HOSTILE: HOSTILE + "x"})}, metrics=metrics)
    command, *options = words
    places = [f"{tmp_path}@1", f"{tmp_path}@2"] if command == "diff" else [f"{tmp_path}"]
    found = cli(command, *places, *options)
    assert not controls(found.out) and "\\u202e" in found.out
    if command == "show" and not options:
        assert r"w\x1b[31m\n\x07\u202e\x9b" in found.out
    if command == "show" and options:
        assert found.json["parts"]["p"]["tensors"][0]["name"] == HOSTILE


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "[link=file:///]"])
def test_names_are_no_markup(cli: Command, tmp_path: Path, name: str) -> None:
    commit(LocalStorage(str(tmp_path)), 1, {"p": Part({name: np.zeros(3)})})
    assert name in cli("show", tmp_path).out


def test_errors_are_escaped(cli: Command, tmp_path: Path) -> None:
    found = cli("ls", tmp_path / HOSTILE.replace("\n", ""))
    assert found.code == answers.NOT_FOUND and not controls(found.err) and "\\x1b" in found.err
