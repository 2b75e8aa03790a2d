"""Engines that do nothing, and clients that only count: what is measured is what is between them.

Both speak just enough HTTP/1.1 over asyncio's protocols that one core serves some ten thousand
requests a second. This file, run with a port, is the engine; with ``close`` behind it, one that
keeps no connection.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvloop

PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "engine",
    "remote_block_ids": [[*range(64)]],
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
}
_USAGE = {"prompt_tokens": 1000, "completion_tokens": 1, "total_tokens": 1001}
_BASE = {"id": "cmpl-1", "object": "text_completion", "model": "m", "usage": _USAGE}
_CHOICE = {"index": 0, "text": " Paris", "finish_reason": "length"}
_ENDS = b"\r\n\r\n"


def _answer(body: object, kind: str = "application/json") -> bytes:
    text = json.dumps(body).encode()
    return (
        f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(text)}\r\n\r\n"
    ).encode() + text


_PREFILLED = _answer(_BASE | {"choices": [_CHOICE], "kv_transfer_params": PARAMS})
_DECODED = _answer(_BASE | {"choices": [_CHOICE], "kv_transfer_params": None})
_HEALTHY = _answer({"data": [{"id": "m"}]})


class HttpMessages(asyncio.Protocol):
    """Calls ``got`` with each whole message that arrives, head and body."""

    def __init__(self, got: Callable[["HttpMessages", bytes], None]) -> None:
        """``got`` gets this connection and the message."""
        self.transport: asyncio.Transport
        self._got = got
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        pending = self._pending + data if self._pending else data
        while (end := _end_of(pending)) and len(pending) >= end:
            message, pending = pending[:end], pending[end:]
            self._got(self, message)
        self._pending = pending


def _end_of(data: bytes) -> int:
    """Where the first message of ``data`` ends; 0 if that is not known yet."""
    head_end = data.find(_ENDS)
    if head_end < 0:
        return 0
    head = data[:head_end].lower()
    if (at := head.find(b"content-length:")) >= 0:
        return head_end + 4 + int(head[at + 15 :].partition(b"\r\n")[0])
    if b"transfer-encoding: chunked" in head:
        last = data.find(b"\r\n0\r\n\r\n", head_end)
        return last + 7 if last >= 0 else 0
    return head_end + 4


def _answer_to(message: bytes) -> bytes:
    if message.startswith(b"GET"):
        return _HEALTHY
    if b'"do_remote_decode":true' in message or b'"do_remote_decode": true' in message:
        return _PREFILLED
    return _DECODED


async def engine(port: int, kept: bool = True) -> None:
    """Both engines of a pair: prefill's answer for who asks for it, decode's for anybody else.

    ``kept``: connections stay open after an answer.
    """

    def answer(connection: HttpMessages, message: bytes) -> None:
        said = _answer_to(message)
        if kept:
            connection.transport.write(said)
        else:
            connection.transport.write(said.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            connection.transport.close()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpMessages(answer), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def request(port: int, body: object) -> bytes:
    """What a client sends."""
    text = json.dumps(body).encode()
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    ).encode() + text


@dataclass
class HttpLoad:
    """Connections that each send a request when the answer to the one before is there."""

    port: int
    requests: Sequence[bytes]
    """One walk, in this order; what is counted is the whole walk."""
    kept: bool = True
    """Whether a connection is used again for the next walk."""
    latencies_s: list[float] = field(default_factory=list)
    answered: int = 0
    """Walks that came to their end, early and late ones too."""
    failed: int = 0

    def run(self, connections: int, seconds: float, warm_s: float = 0.5) -> float:
        """Walks a second; `latencies_s` are those after ``warm_s``."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._run(connections, seconds, warm_s))

    async def _run(self, connections: int, seconds: float, warm_s: float) -> float:
        counts_from = time.perf_counter() + warm_s
        ends = counts_from + seconds
        began: dict[HttpMessages, tuple[float, int]] = {}

        def got(connection: HttpMessages, message: bytes) -> None:
            start_s, step = began[connection]
            now = time.perf_counter()
            self.failed += not message.startswith(b"HTTP/1.1 200")
            if step + 1 < len(self.requests):
                began[connection] = (start_s, step + 1)
                connection.transport.write(self.requests[step + 1])
                return
            self.answered += 1
            if counts_from <= start_s and now <= ends:
                self.latencies_s.append(now - start_s)
            if now < ends and self.kept:
                began[connection] = (now, 0)
                connection.transport.write(self.requests[0])
            elif now < ends:
                del began[connection]
                connection.transport.abort()
                opening.add(task := loop.create_task(begin()))
                task.add_done_callback(opening.discard)

        async def begin() -> None:
            start_s = time.perf_counter()
            transport, protocol = await loop.create_connection(
                lambda: HttpMessages(got), "127.0.0.1", self.port
            )
            began[protocol] = (start_s, 0)
            transport.write(self.requests[0])

        loop = asyncio.get_running_loop()
        opening: set[asyncio.Task[None]] = set()
        for _ in range(connections):
            await begin()
        await asyncio.sleep(ends - time.perf_counter())
        await asyncio.gather(*opening)
        for protocol in began:
            protocol.transport.abort()
        return len(self.latencies_s) / seconds


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as main_runner:
        main_runner.run(engine(int(sys.argv[1]), kept="close" not in sys.argv))
