"""What was there before preemption handlers stays in use: handlers, wakeup fds, event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading

import pytest
import torch
from support.processes import PATIENCE, until
from support.torch_states import run

import asyncckpt
from asyncckpt import Preemption, signals

USR1 = Preemption(signals=(signal.SIGUSR1,))
RARELY = asyncckpt.Every(steps=10**6)
pytestmark = pytest.mark.usefixtures("signals_are_left_as_they_were")


@pytest.fixture
def mine():
    """A handler of the user's for SIGUSR1; gives the list of its calls."""
    calls = []

    def handler(number, frame):
        calls.append((number, frame is not None))

    before = signal.signal(signal.SIGUSR1, handler)
    calls_of = calls
    yield calls_of, handler
    signal.signal(signal.SIGUSR1, before)


def test_the_handler_before_is_called_too_and_put_back(mine, tmp_path):
    calls, handler = mine
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        assert signal.getsignal(signal.SIGUSR1) is not handler
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [(signal.SIGUSR1, True)] and ckpt.should_save(1)
    assert signal.getsignal(signal.SIGUSR1) is handler
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(calls) == 2


def test_a_second_signal_goes_to_the_handler_before(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_ECHO", 0.0)
    calls, _ = mine
    with run(tmp_path / "run", preempt=USR1):
        for count in (1, 2, 3):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert len(calls) == count


def test_a_handler_before_that_raises_is_obeyed_and_what_is_in_flight_is_committed(tmp_path):
    def leave(number, frame):
        raise SystemExit(3)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        with pytest.raises(SystemExit), run(tmp_path / "run", preempt=USR1) as ckpt:
            ckpt.save(1, {"x": torch.arange(1000)})
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asyncckpt.open(tmp_path / "run").verify() == 1


@pytest.mark.parametrize("first_hears", [True, False])
@pytest.mark.parametrize("chaining", [True, False])
def test_a_handler_that_somebody_puts_on_top_stays(chaining, first_hears, mine, tmp_path):
    """The notice is heard all the same, by the wakeup fd; after `close` a chain ends at the handler before."""
    calls, _ = mine
    ckpt = run(tmp_path / "run", preempt=USR1)
    ours = signal.getsignal(signal.SIGUSR1)
    top_calls = []

    def top(number, frame):
        top_calls.append(number)
        if chaining:
            ours(number, frame)

    signal.signal(signal.SIGUSR1, top)
    if first_hears:
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: ckpt.should_save(1))
    with run(tmp_path / "other", preempt=USR1) as other:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.should_save(1) and other.should_save(1)
    ckpt.close()
    assert signal.getsignal(signal.SIGUSR1) is top
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(top_calls) == 2 + first_hears and len(calls) == (len(top_calls) if chaining else 0)


def test_two_checkpointers_both_hear_and_the_last_one_puts_back(mine, tmp_path):
    calls, handler = mine
    first, second, third = (run(tmp_path / name, preempt=USR1) for name in "abc")
    first.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (second.should_save(1), third.should_save(1), len(calls)) == (True, True, 1)
    third.close()
    assert signal.getsignal(signal.SIGUSR1) is not handler
    second.close()
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_closed_on_another_thread_the_handler_steps_aside(mine, tmp_path):
    calls, handler = mine
    ckpt = run(tmp_path / "run", preempt=USR1)
    closing = threading.Thread(target=ckpt.close)
    closing.start()
    closing.join(PATIENCE)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert len(calls) == 1
    assert signal.getsignal(signal.SIGUSR1) is handler
    signals.settle()


async def test_leaving_an_async_block_puts_the_handler_back(mine, tmp_path):
    async with run(tmp_path / "run", preempt=USR1):
        assert signal.getsignal(signal.SIGUSR1) is not mine[1]
    assert signal.getsignal(signal.SIGUSR1) is mine[1]


@pytest.mark.parametrize("order", ["loop first", "checkpointer first"])
def test_signal_handlers_of_an_event_loop_go_on(order, tmp_path, caplog):
    """The loop takes the wakeup fd, or has it: neither it nor the notice is missed."""

    async def main():
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        if order == "loop first":
            loop.add_signal_handler(signal.SIGUSR2, heard.set)
        ckpt = run(tmp_path / "run", preempt=USR1)
        if order == "checkpointer first":
            loop.add_signal_handler(signal.SIGUSR2, heard.set)
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.wait_for(heard.wait(), PATIENCE)
        assert not ckpt.should_save(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ckpt.should_save(1)
        until(lambda: "notice of a preemption (SIGUSR1)" in caplog.text)
        ckpt.close()
        heard.clear()
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.wait_for(heard.wait(), PATIENCE)
        loop.remove_signal_handler(signal.SIGUSR2)

    asyncio.run(main())


def test_a_wakeup_fd_before_gets_all_it_would_have_got_and_comes_back(tmp_path):
    reading, writing = socket.socketpair()
    reading.settimeout(PATIENCE)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno())
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        with run(tmp_path / "run", preempt=USR1):
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(os.getpid(), number)
                assert reading.recv(1) == bytes([number])
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert signal.set_wakeup_fd(-1) == writing.fileno()
        reading.close()
        writing.close()


def test_a_wakeup_fd_before_that_was_closed_meanwhile_is_forgotten(tmp_path):
    """Its number may be that of another pipe by then, which must not be written to."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno())
    innocent = os.pipe()
    for fd in innocent:
        os.set_blocking(fd, False)
    with run(tmp_path / "run", preempt=USR1) as ckpt:
        number = writing.fileno()
        reading.close()
        writing.close()
        os.dup2(innocent[1], number)
        os.kill(os.getpid(), signal.SIGUSR1)
        ckpt.maybe_save(1, {"x": 1})
    assert signal.set_wakeup_fd(-1) == -1
    for fd in (number, innocent[1]):
        os.close(fd)
    assert os.read(innocent[0], 1) == b""
    os.close(innocent[0])
