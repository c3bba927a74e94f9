"""What others on the machine can see of a training's checkpoints: nothing, and no port to speak to."""

import os
from pathlib import Path

from support.models import training
from support.processes import PATIENCE

import asyncckpt


def descriptors(pid):
    """What the file descriptors of a process stand for."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:
            pass
    return found


def internet_sockets(pid):
    """Those of its network, as they stand in its descriptors."""
    lines = [line.split() for name in ("tcp", "tcp6", "udp", "udp6") for line in _table(f"/proc/{pid}/net/{name}")]
    return {f"socket:[{line[9]}]" for line in lines}


def _table(path):
    return Path(path).read_text().splitlines()[1:] if os.path.exists(path) else []


def test_of_all_that_is_made_nothing_is_for_others(tmp_path):
    state, run = training(), tmp_path / "new" / "run"
    before = os.umask(0)
    try:
        with asyncckpt.Checkpointer(run, keep=asyncckpt.Keep(last=3)) as ckpt:
            for step in (1, 2, 3):
                ckpt.save(step, state).result(PATIENCE)
            ckpt.pin(2)
            ckpt.annotate(2, {"loss": 1.0})
            ckpt.restore(state, 2, rewind=True)
            made = [run.parent, run, *run.rglob("*")]
            modes = {path: path.stat().st_mode & 0o777 for path in made}
    finally:
        os.umask(before)
    assert {"rewinds.json", "notes.json", "manifest.json", "state.json"} <= {path.name for path in made}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in made}


def test_memory_is_shared_without_a_name_and_no_port_is_opened(tmp_path):
    before = {*descriptors("self")}
    ports = internet_sockets("self") & before
    with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, training()).result(PATIENCE)
        for pid in ("self", ckpt.stats().writer_pid):
            held = descriptors(pid)
            assert internet_sockets(pid) & {*held} <= ports
            assert not [name for name in held if name.startswith("/dev/shm") and name not in before]
        assert any(name.startswith("/memfd:asyncckpt-arena (deleted)") for name in descriptors("self"))
