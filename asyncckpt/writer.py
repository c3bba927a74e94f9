"""The writer process: `python -m asyncckpt.writer`, started by the trainer, never by hand.

It imports no torch, has a session of its own, and ignores INT, TERM and HUP. It watches the trainer by a pidfd
(the socket alone would not do: a forked DataLoader worker holds the other end open); when the trainer is gone, it
finishes every snapshot that is whole, commits it, and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket

from asyncckpt.storage.posix import Posix
from asyncckpt.write import messages as m
from asyncckpt.write.client import THREADS, new_event_loop
from asyncckpt.write.service import Service
from asyncckpt.write.workers import Workers

NICE = 10
"""How far the worker threads stand back while nobody waits for them."""
_LAST_WORDS = 5.0


def main(arguments: list[str] | None = None, posix: Posix | None = None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="asyncckpt.writer", description=__doc__)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--trainer", type=int, help="a pidfd of the trainer")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="asyncckpt writer: %(message)s")
    os.chdir("/")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(options.socket, options.trainer, posix))


async def _serve(fd: int, trainer: int | None, posix: Posix | None) -> None:
    loop = asyncio.get_running_loop()
    link = socket.socket(fileno=fd)
    link.setblocking(False)
    outgoing: asyncio.Queue[m.Reply] = asyncio.Queue()
    service = Service(outgoing.put_nowait, workers=Workers(THREADS, NICE), posix=posix)
    incoming = m.Deframer(m.Request)
    arenas: list[int] = []

    def receive() -> bool:
        """Take what has arrived; False where nothing had."""
        try:
            data, fds, _, _ = socket.recv_fds(link, 1 << 16, 16)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        arenas.extend(fds)
        for message in incoming.feed(data):
            arena = arenas.pop(0) if arenas and isinstance(message, m.Share) else None
            service.receive(message, arena)
        if not data:
            loop.remove_reader(link)
            service.orphaned()
        return bool(data)

    def trainer_ended() -> None:
        assert trainer is not None
        loop.remove_reader(trainer)
        while receive():  # its last words
            pass
        service.orphaned()

    async def answer() -> None:
        while True:
            reply = await outgoing.get()
            try:
                await loop.sock_sendall(link, m.frame(reply))
            except OSError:
                pass  # nobody listens any more; what was promised is kept all the same
            outgoing.task_done()

    loop.add_reader(link, receive)
    if trainer is not None:
        loop.add_reader(trainer, trainer_ended)
    answering = asyncio.create_task(answer())
    await service.finished()
    with contextlib.suppress(TimeoutError):  # a forked child of a dead trainer may hold the link and never read
        await asyncio.wait_for(outgoing.join(), _LAST_WORDS)
    answering.cancel()


if __name__ == "__main__":
    main()
