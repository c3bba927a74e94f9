"""Under asyncio, on the stock loop and on uvloop."""

import asyncio

import pytest
import uvloop
from support.models import train_step, training
from support.processes import PATIENCE, Hold

import asyncckpt
import asyncckpt.testing
from asyncckpt.write import client


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["stock", "uvloop"])
def runner(request):
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_handles_are_awaited_while_the_loop_goes_on(runner, writer, tmp_path, monkeypatch):
    """The loop itself lets the writing go on: were it to stand still, the saves would never be over."""
    if writer == "process":
        release, options = Hold(tmp_path / "hold", "pwrite").install(monkeypatch).release, {}
    else:
        hold = asyncckpt.testing.Hold()
        release, options = hold.release, {"_posix": asyncckpt.testing.FaultyPosix().hold("pwrite", 1, hold)}

    async def main():
        state = training()
        async with asyncckpt.Checkpointer(tmp_path / "run", writer=writer, max_in_flight=4, **options) as ckpt:

            async def tick():
                for _ in range(10):
                    await asyncio.sleep(0)
                release()

            handles = []
            for step in range(4):
                train_step(state)
                handles.append(ckpt.save(step, state))
            return await asyncio.gather(*handles, tick())

    assert runner.run(main()) == ["committed"] * 4 + [None]
    assert asyncckpt.open(tmp_path / "run").steps() == [0, 1, 2, 3]


def test_a_failed_save_raises_where_it_is_awaited(runner, tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite").install(monkeypatch)

    async def main():
        async with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
            handle = ckpt.save(1, training())
            hold.wait_reached()
            import os

            os.kill(ckpt.stats().writer_pid, 9)
            with pytest.raises(asyncckpt.StorageError):
                await handle

    runner.run(main())


async def test_waiting_can_be_given_up_and_taken_up_again(tmp_path, monkeypatch):
    hold = Hold(tmp_path / "hold", "pwrite").install(monkeypatch)
    async with asyncckpt.Checkpointer(tmp_path / "run") as ckpt:
        handle = ckpt.save(1, training())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.05)
        hold.release()
        assert await asyncio.wait_for(handle, PATIENCE) == "committed"


def test_the_service_runs_on_uvloop_where_there_is_one():
    loop = client.new_event_loop()
    assert isinstance(loop, uvloop.Loop)
    loop.close()


def test_and_on_the_stock_loop_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    with asyncckpt.Checkpointer(tmp_path / "run", writer="thread") as ckpt:
        assert ckpt.save(1, training()).result(PATIENCE) == "committed"
