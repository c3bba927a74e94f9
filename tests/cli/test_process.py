"""The command line as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from support.checkpoints import commit

from asyncckpt.cli import answers
from asyncckpt.format import names
from asyncckpt.format.manifest import encode
from asyncckpt.storage.local import LocalStorage

LOOK = """
import sys
from asyncckpt.cli.app import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "numpy", "pandas") if name in sys.modules]
    print("loaded:", *heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        "ls R",
        "show R",
        "verify R",
        "path R",
        "diff R@1 R",
        "prune R --keep-last 1",
        "pin R",
        "unpin R",
        "plan --state 1GB",
    ],
)
def test_no_command_loads_torch(tmp_path: Path, words: str) -> None:
    """Nor numpy, which takes a third of the time that `ls` may take."""
    storage = LocalStorage(str(tmp_path))
    commit(storage, 1)
    commit(storage, 2)
    words = words.replace("R", str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, *words.split()], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode in (answers.OK, answers.NO), ended.stderr
    assert ended.stderr.splitlines()[-1] == "loaded:"


def test_an_export_loads_numpy_and_no_torch(run: Path) -> None:
    words = ["export", str(run), str(run.parent / "out.safetensors"), "--dtype", "fp16"]
    ended = subprocess.run([sys.executable, "-W", "error", "-c", LOOK, *words], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr.decode().splitlines()[-1]) == (answers.OK, "loaded: numpy")


def test_python_m_asyncckpt_is_the_command_line(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "asyncckpt", "ls", str(run), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and len(json.loads(ended.stdout)["checkpoints"]) == 5


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncckpt", "ls", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    with process.stderr as errors:
        assert errors.read() == b""


def test_a_thousand_checkpoints_are_listed_at_once(tmp_path: Path) -> None:
    """Under 300 ms alone on the machine; a loaded one gets four times that. With torch it would be seconds."""
    storage = LocalStorage(str(tmp_path))
    manifest = commit(storage, 0)
    for step in range(1, 1000):
        folder = tmp_path / names.step_name(step)
        (folder / manifest.attempt).mkdir(parents=True)
        (folder / names.MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, step=step, sequence=step)))
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "asyncckpt", "ls", str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        took.append(time.perf_counter() - begun)
        assert len(ended.stdout.splitlines()) == 1001
    assert min(took) < 1.2
