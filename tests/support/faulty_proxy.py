"""An HTTP proxy on loopback, before an S3 server, that answers some requests wrongly, late, twice or not at all.

It passes requests on as they are, so that signatures stay right. Each connection serves one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_PATIENCE = 60.0
_XML = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
_REFUSALS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "409": ("409 Conflict", "ConditionalRequestConflict", "A conflicting conditional operation is under way."),
    "412": ("412 Precondition Failed", "PreconditionFailed", "At least one of the preconditions did not hold."),
    "403": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "404": ("404 Not Found", "NoSuchBucket", "The specified bucket does not exist"),
}
FAULTS = ("500", "503", "reset", "lost", "500 after", "reset after", "cut", "slow", "twice")
"""Those that any request may meet; a conditional put may meet 409 and 412, too."""


@dataclass(frozen=True)
class Request:
    """What a client asked for. `part` is the number of a part of an upload; `conditional` puts name a condition."""

    number: int
    method: str
    path: str
    query: str
    size: int
    conditional: bool

    @property
    def kind(self) -> str:
        if self.method == "POST" and self.query.startswith("delete"):
            return "delete"
        if "partNumber=" in self.query:
            return "part"
        if "uploadId=" in self.query:
            return {"POST": "complete", "DELETE": "abort"}.get(self.method, "other")
        if "uploads" in self.query:
            return "start upload"
        return "list" if "list-type" in self.query else self.method.lower()

    @property
    def key(self) -> str:
        return self.path.rpartition("/")[2]


class FaultyProxy:
    """`choose` is asked for each request what to do with it: None to pass it on, or

    "500", "503", "409", "412", "403", "404"  that answer, and nothing is passed on
    "reset"        the connection is reset, and nothing is passed on
    "lost"         it is passed on, and the answer thrown away: the connection closes
    "reset after", "500 after", "503 after"   the same, with a reset or that answer
    "cut"          half the answer comes, then a reset
    "slow"         the answer comes in small pieces
    "stall"        nothing comes, until the client goes away
    "twice"        it is passed on twice, and the second answer comes
    "die"          this, and all later connections, are reset
    """

    def __init__(self, upstream: int, choose: Callable[[Request], str | None] = lambda request: None) -> None:
        self.choose = choose
        self.requests: list[Request] = []
        self.sent = 0
        """Bytes of bodies that went to clients."""
        self._upstream = upstream
        self._dead = False
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(_PATIENCE)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        while tasks := asyncio.all_tasks(self._loop):  # a connection that was just taken becomes one after the other
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # what was aborted ends with the next turn
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def of_kind(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            try:
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            except asyncio.CancelledError:
                writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        request = self._understand(head, len(body))
        self.requests.append(request)
        fault = "reset" if self._dead else self.choose(request)
        if fault == "die":
            self._dead, fault = True, "reset"
        if fault == "reset":
            _reset(writer)
        elif fault == "stall":
            await reader.read()
        elif fault in _REFUSALS:
            await self._answer(writer, _refusal(fault))
        else:
            await self._pass_on(head, body, writer, fault or "")

    async def _pass_on(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, fault: str) -> None:
        answer = await self._ask(head, body)
        if fault == "twice":
            answer = await self._ask(head, body)
        if fault == "reset after":
            _reset(writer)
        elif fault.endswith(" after"):
            await self._answer(writer, _refusal(fault.removesuffix(" after")))
        elif fault == "cut":
            await self._answer(writer, answer[: len(answer) // 2])
            _reset(writer)
        elif fault == "slow":
            step = max(1, len(answer) // 5)
            for start in range(0, len(answer), step):
                await self._answer(writer, answer[start : start + step])
                await asyncio.sleep(0.01)
        elif fault != "lost":
            await self._answer(writer, answer)

    async def _answer(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.sent += len(data)
        writer.write(data)
        await writer.drain()

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            writer.write(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body)
            return await reader.read()
        finally:
            writer.transport.abort()

    def _understand(self, head: bytes, size: int) -> Request:
        line, *_ = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ")
        path, _, query = target.partition("?")
        conditional = re.search(rb"(?i)\r\nif-(none-)?match:", head) is not None
        return Request(len(self.requests), method, path, query, size, conditional)


def _refusal(fault: str) -> bytes:
    status, code, message = _REFUSALS[fault]
    body = _XML.format(code=code, message=message)
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
