"""A run, and the command line that is called on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import commit
from support.cli import Command, Result

from asyncckpt.cli.app import app
from asyncckpt.storage.local import LocalStorage


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(word) for word in words], prog_name="asyncckpt")
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100 to 500, each with a loss."""
    storage = LocalStorage(str(tmp_path / "run"))
    for step, loss in zip(range(100, 600, 100), [5.0, 1.0, 3.0, 4.0, 2.0], strict=True):
        commit(storage, step, metrics={"loss": loss})
    return tmp_path / "run"
