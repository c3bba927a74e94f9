"""What works on a directory works on a URL: the library's face, its command line, real processes."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.faulty_proxy import FaultyProxy
from support.object_schedules import value_of
from support.processes import PATIENCE, Trainer, until, wait_for_end
from support.seaweed import KEY, SECRET, Server
from typer.testing import CliRunner

import asyncckpt
from asyncckpt.catalog.catalog import Catalog
from asyncckpt.cli.app import app
from asyncckpt.read.reader import CheckpointReader
from asyncckpt.storage.object import ObjectStorage
from asyncckpt.storage.urls import StorageOptions
from asyncckpt.testing.ranks import RanksDriver

pytest.importorskip("obstore")


@pytest.fixture
def place(server: Server, new_url, monkeypatch):
    """The URL of a run whose credentials are in the environment, as the command line finds them."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return new_url()


@pytest.fixture
def cli():
    def run(*words: object):
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        return result.exit_code, json.loads(result.stdout)

    return run


def state_of(value: float, size: int = 1000):
    model = torch.nn.Linear(size, 1)
    with torch.no_grad():
        model.weight.fill_(value)
    return {"model": model, "step": {"value": value}}


def save(ckpt, step, state, **options):
    assert ckpt.save(step, state, **options).result(PATIENCE) == "committed"


@pytest.mark.parametrize("kind", ["server", "memory"])
@pytest.mark.parametrize("codec", ["raw", "delta"])
def test_saved_restored_retired_and_pruned(kind, codec, server, new_url, tmp_path):
    url = new_url() if kind == "server" else f"memory://{tmp_path.name}-{codec}"
    options = server.options() if kind == "server" else None
    with asyncckpt.Checkpointer(url, storage_options=options, codec=codec, keep=asyncckpt.Keep(last=2)) as ckpt:
        assert ckpt.stats().writer == ("process" if kind == "server" else "thread")
        for step in range(1, 6):
            save(ckpt, step, state_of(float(step)))
        save(ckpt, 5, state_of(5.5), overwrite=True)
        ckpt.pin(5)
        ckpt.wait_until_flushed()
        assert ckpt.verify() == 5
        assert ckpt.path(5).startswith(f"{url}/step-00000005/")
    run = asyncckpt.open(url, storage_options=options)
    assert run.steps() == [4, 5]
    state = state_of(0.0)
    assert run.restore(state) == 5
    assert state["step"]["value"] == state["model"].weight[0, 7] == 5.5
    loaded = asyncckpt.load(url, 4, parts=["model"], keys=["weight"], storage_options=options)
    assert loaded["model"]["weight"][0, 0] == 4.0


def test_a_second_start_resumes_rewinds_and_finds_the_run_its_own(place):
    with asyncckpt.Checkpointer(place) as ckpt:
        for step in (1, 2, 3):
            save(ckpt, step, state_of(float(step)))
    state = state_of(0.0)
    with asyncckpt.Checkpointer(place, lock_timeout=5) as ckpt:
        assert ckpt.restore(state, step=1, rewind=True) == 1
        save(ckpt, 2, state_of(20.0))
        with pytest.raises(asyncckpt.ConflictError):
            asyncckpt.Checkpointer(place, lock_timeout=0)
    with asyncckpt.Checkpointer(place, lock_timeout=5) as ckpt:
        assert ckpt.restore(state) == 2
    assert state["step"]["value"] == 20.0


def test_a_corrupt_newest_is_passed_over(place):
    with asyncckpt.Checkpointer(place) as ckpt:
        for step in (1, 2):
            save(ckpt, step, state_of(float(step)))
        key = ckpt.path(2).removeprefix(place + "/") + "/model.safetensors"
    storage = ObjectStorage(place)
    file = storage.open(key)
    data = bytearray(file.size)
    file.read_into(0, memoryview(data))
    data[-1] ^= 1
    storage.put(key, bytes(data))
    state = state_of(0.0)
    with pytest.warns(UserWarning, match="passed over step 2"):
        assert asyncckpt.restore(place, state) == 1


def test_one_tensor_of_a_large_checkpoint_takes_only_its_chunks(server, new_url):
    url, chunk = new_url(), 8 << 20
    tensors = {f"t{i}": torch.full((chunk // 4,), float(i)) for i in range(6)}
    with asyncckpt.Checkpointer(url, storage_options=server.options(), overlap=False) as ckpt:
        save(ckpt, 1, {"big": tensors})
    with FaultyProxy(server.port) as proxy:
        options = server.options(proxy.port)
        found = asyncckpt.load(url, 1, parts=["big"], keys=["t3"], storage_options=options)
        taken = proxy.sent
    assert torch.equal(found["big"]["t3"], tensors["t3"])
    assert taken < 3.2 * chunk  # its two chunks, and that of the header; not all seven


def test_several_ranks_commit_one_checkpoint(server: Server, new_url):
    """Their services alone: what they share is the store."""
    url, options = new_url(), StorageOptions.of(server.options())
    with RanksDriver(url, world=3, options=options) as ranks:
        ranks.save(1, value_of(1))
        ranks.save(1, value_of(2), replace=True)
    for rank in range(3):
        with CheckpointReader(Catalog(ObjectStorage(url, options)), 1, rank) as reader:
            reader.verify()
            assert reader.tree("model") == {"rank": rank, "value": {"seed": 2}}


def test_the_command_line(place, cli, tmp_path):
    with asyncckpt.Checkpointer(place) as ckpt:
        for step in (1, 2, 3):
            save(ckpt, step, state_of(float(step)), metrics={"loss": 1.0 / step})
    code, listed = cli("ls", place)
    assert (code, [c["step"] for c in listed["checkpoints"]]) == (0, [1, 2, 3])
    assert cli("show", f"{place}@2")[1]["step"] == 2
    assert cli("verify", place, "--all")[0] == 0
    assert cli("diff", f"{place}@1", f"{place}/step-00000002")[0] == 1
    code, found = cli("path", place, "model")
    assert found["path"].startswith(f"{place}/step-00000003/") and found["path"].endswith("/model.safetensors")
    assert cli("export", place, tmp_path / "out.safetensors")[1]["tensors"] == 2
    assert cli("pin", f"{place}@1")[0] == 0
    code, pruned = cli("prune", place, "--keep-last", 1)
    assert (code, pruned["deleted"]) == (0, [2])
    assert asyncckpt.open(place).steps() == [1, 3]
    assert cli("ls", place + "-none")[0] == 3
    assert cli("ls", "ftp://x/y")[0] == 2


def test_the_command_line_does_not_load_obstore_for_a_directory(tmp_path):
    code = (
        "import sys; from asyncckpt.cli import listing; listing.ls(sys.argv[1]);"
        "assert not {'obstore', 'torch', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)


def test_without_obstore_a_url_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "import asyncckpt\n"
        "try: asyncckpt.open('s3://bucket/run')\n"
        "except asyncckpt.NotSupportedError as error: assert 'asyncckpt[object]' in str(error)\n"
        "else: raise SystemExit(1)\n"
        f"asyncckpt.open({str(tmp_path)!r}).steps()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_secrets_go_by_the_socket_only(server, new_url, capfd, caplog):
    """The command line and environment of the writer, what it logs, and what is stored."""
    url, options = new_url(), server.options()
    with asyncckpt.Checkpointer(url, storage_options=options) as ckpt:
        save(ckpt, 1, state_of(1.0))
        pid = ckpt.stats().writer_pid
        seen = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        seen.append(repr(ckpt).encode() + repr(vars(ckpt)).encode() + repr(ckpt._session.options).encode())
    storage = ObjectStorage(url, StorageOptions.of(options))
    attempt = next(name for name in storage.list("step-00000001") if name != "manifest.json")
    seen += [storage.read(key, 1 << 20) for key in (".asyncckpt.lock", "step-00000001/manifest.json")]
    seen.append(storage.read(f"step-00000001/{attempt}/state.json", 1 << 20))
    with FaultyProxy(server.port, lambda request: "403" if request.kind == "put" else None) as proxy:
        refused = server.options(proxy.port)
        with pytest.raises(asyncckpt.StorageError, match="AccessDenied") as caught:
            asyncckpt.Checkpointer(url, storage_options=refused, lock_timeout=2)
    out, err = capfd.readouterr()
    seen += [str(caught.value).encode(), out.encode(), err.encode(), "".join(caplog.messages).encode()]
    assert not [text for text in seen if SECRET.encode() in text]


TRAINER = """
import json, os, sys
import torch, asyncckpt

url, options, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
state = {"model": {"w": torch.arange(size, dtype=torch.float32)}}
ckpt = asyncckpt.Checkpointer(url, storage_options=options, overlap=False)
handle = ckpt.save(1, state)
assert handle.wait_staged(60)
print("staged", ckpt.stats().writer_pid, flush=True)
sys.stdin.read()
"""


def test_a_trainer_killed_in_the_middle_of_an_upload_loses_nothing(server: Server, new_url):
    """Its writer finishes the upload, and the next start waits for that and gets the checkpoint."""
    url, size = new_url(), 10 << 20
    held = []
    with FaultyProxy(server.port) as proxy:

        def hold_back_one(request):
            if request.kind == "part" and "partNumber=3" in request.query and not held:
                held.append(request)
                return "stall"
            return None

        proxy.choose = hold_back_one
        options = server.options(proxy.port, client_options={"allow_http": True, "timeout": 1})
        trainer = Trainer(TRAINER, url, json.dumps(options), size)
        try:
            word, writer = trainer.read_line().split()
            assert word == "staged"
            until(lambda: held)
            os.killpg(trainer.pid, signal.SIGKILL)
            trainer.end()
            assert asyncckpt.open(url, storage_options=server.options()).steps() == []
            with asyncckpt.Checkpointer(url, storage_options=server.options(), lock_timeout=PATIENCE) as ckpt:
                found = {"model": {"w": torch.zeros(size)}}
                assert ckpt.restore(found) == 1
                assert ckpt.verify() == 1
            wait_for_end(int(writer))
        finally:
            trainer.close()
    assert torch.equal(found["model"]["w"], torch.arange(size, dtype=torch.float32))


def test_a_writer_killed_too_leaves_a_run_that_the_next_start_owns_at_once(server: Server, new_url):
    url, size = new_url(), 10 << 20
    with FaultyProxy(server.port) as proxy:
        proxy.choose = lambda request: "stall" if request.kind == "part" else None
        trainer = Trainer(TRAINER, url, json.dumps(server.options(proxy.port)), size)
        try:
            writer = int(trainer.read_line().split()[1])
            until(lambda: proxy.of_kind("part"))
            os.killpg(trainer.pid, signal.SIGKILL)
            os.kill(writer, signal.SIGKILL)
            trainer.end()
            wait_for_end(writer)
        finally:
            trainer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncckpt.Checkpointer(url, storage_options=server.options(), lock_timeout=10) as ckpt:
            assert ckpt.restore({"model": {"w": torch.zeros(size)}}) is None
            save(ckpt, 1, state_of(1.0))
    assert asyncckpt.open(url, storage_options=server.options()).verify() == 1
