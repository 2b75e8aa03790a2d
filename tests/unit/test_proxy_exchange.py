"""One connection to an engine, over a transport that only remembers; then the pool of them, over
loopback."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.proxy.engines import session
from kvconnect.proxy.engines.exchange import (
    HIGH_WATER_BYTES,
    MAX_HEAD_BYTES,
    EngineAnswer,
    EngineConnection,
    EngineLostError,
)
from kvconnect.proxy.engines.session import EngineSession, UnreachedError

OK = b"HTTP/1.1 200 OK\r\n"


class Wire:
    """A transport: what was written to it, and whether it is open, and read."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False
        self.paused = False
        self.unsent_bytes = 0

    def writelines(self, parts: Sequence[bytes]) -> None:
        self.sent += parts

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Peer:
    """A connection, its wire, and what it told its owner."""

    def __init__(self) -> None:
        self.kept = self.lost = 0
        self.wire = Wire()
        self.connection = EngineConnection(self._kept, self._lost)
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]

    def _kept(self, _connection: EngineConnection) -> None:
        self.kept += 1

    def _lost(self, _connection: EngineConnection) -> None:
        self.lost += 1


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scenario(), 30)

    asyncio.run(limited())


async def whole(answer: EngineAnswer) -> bytes:
    await answer.headers_there()
    return await answer.read()


class Told(NamedTuple):
    """An answer as it should be read."""

    status: int
    body: bytes
    kept: bool = True
    length: int | None = None


WHOLE = [
    (OK + b"Content-Length: 5\r\n\r\nhello", Told(200, b"hello", length=5)),
    (OK + b"content-length: 0\r\n\r\n", Told(200, b"", length=0)),
    (
        OK + b"Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nT: 1\r\n\r\n",
        Told(200, b"hello"),
    ),
    (b"HTTP/1.1 204 No Content\r\nA: b\r\n\r\n", Told(204, b"")),
    (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
        b"HTTP/1.1 503 Later\r\nContent-Length: 2\r\n\r\nno",
        Told(503, b"no", length=2),
    ),
    (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", Told(200, b"ok", False, 2)),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", Told(200, b"ok", False, 2)),
]


@pytest.mark.parametrize(("sent", "told"), WHOLE)
@given(cuts=st.sets(st.integers(1, 150)))
def test_an_answer_is_the_same_however_it_is_cut(sent, told, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]

    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"head", b"body", None)
        assert peer.wire.sent == [b"head", b"body"]
        for start, end in itertools.pairwise(edges):
            if not peer.wire.closed:
                peer.connection.data_received(sent[start:end])
        await answer.headers_there()
        assert (answer.status, await answer.read()) == (told.status, told.body)
        assert answer.content_length == told.length
        assert not await answer.readany()
        assert (peer.connection.usable, peer.kept) == (told.kept, int(told.kept))

    run(scenario)


@pytest.mark.parametrize("head", [b"", b"Connection: close\r\n", b"Transfer-Encoding: gzip\r\n"])
def test_a_body_without_another_end_ends_with_its_connection(head):
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        peer.connection.data_received(OK + head + b"\r\nall of ")
        assert await answer.readany() == b"all of "
        peer.connection.data_received(b"it")
        assert not answer.complete
        peer.connection.connection_lost(None)
        assert await answer.read() == b"it"
        assert peer.lost == 1

    run(scenario)


BROKEN = [
    ("nothing", b"", "before it answered"),
    ("half a head", OK + b"Content-Le", "before it answered"),
    ("only 1xx", b"HTTP/1.1 100 Continue\r\n\r\n", "before it answered"),
    ("half a body", OK + b"Content-Length: 5\r\n\r\nhe", "broke off its answer"),
    ("no last chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", "broke off its"),
]


@pytest.mark.parametrize(("sent", "cause"), [row[1:] for row in BROKEN], ids=[r[0] for r in BROKEN])
def test_an_answer_that_is_broken_off_is_never_taken_for_whole(sent, cause):
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        if sent:
            peer.connection.data_received(sent)
        peer.connection.connection_lost(None)
        with pytest.raises(EngineLostError, match=cause):
            await whole(answer)
        assert not answer.complete

    run(scenario)


def test_what_arrived_before_the_end_is_read_before_it():
    """A stream's last events used to be lost if the reset was there before anybody read them."""

    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        peer.connection.data_received(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        reading = asyncio.create_task(answer.readany())
        await asyncio.sleep(0)
        peer.connection.data_received(b"4\r\nlast\r\n")
        peer.connection.connection_lost(ConnectionResetError("reset by peer"))
        assert await reading == b"last"
        with pytest.raises(EngineLostError, match="reset by peer"):
            await answer.readany()

    run(scenario)


def test_a_reset_ends_no_body_that_ends_with_its_connection():
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        peer.connection.data_received(OK + b"\r\nhalf")
        peer.connection.connection_lost(ConnectionResetError("reset by peer"))
        with pytest.raises(EngineLostError, match="reset by peer"):
            await answer.read()

    run(scenario)


HOSTILE = [
    ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP"),
    ("two lengths", OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", "no HTTP"),
    (
        "length and chunks",
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        "no HTTP",
    ),
    ("a length of words", OK + b"Content-Length: some\r\n\r\n", "no HTTP"),
    ("a length beyond all", OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", "no HTTP"),
    (
        "chunks beyond all",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 20 + b"\r\n",
        "no HTTP",
    ),
    ("bare line ends", b"HTTP/1.1 200 OK\nA: b\n\n", "no HTTP"),
    ("a NUL", OK + b"A: b\0\r\n\r\n", "no HTTP"),
    (
        "another protocol",
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        "no HTTP",
    ),
    ("endless head", OK + b"A: " + b"b" * MAX_HEAD_BYTES, "bytes of headers"),
    ("endless 1xx", b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD_BYTES // 20), "bytes of headers"),
    (
        "endless trailer",
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nT: " + b"x" * 2 * MAX_HEAD_BYTES,
        "bytes of headers",
    ),
]


@pytest.mark.parametrize(
    ("sent", "cause"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_what_is_no_answer_ends_the_connection(sent, cause):
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        for at in range(0, len(sent), 1000):
            if not peer.wire.closed:
                peer.connection.data_received(sent[at : at + 1000])
        assert peer.wire.closed
        assert peer.kept == 0
        with pytest.raises(EngineLostError, match=cause):
            await whole(answer)

    run(scenario)


@given(
    sent=st.sampled_from([row[0] for row in WHOLE]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.binary(max_size=9))),
    cuts=st.sets(st.integers(1, 150)),
)
def test_whatever_an_engine_sends_its_answer_ends(sent, changes, cuts):
    """Whole, or lost; never with an exception in the event loop, nor with two ends."""
    for at, dropped, added in changes:
        sent = sent[:at] + added + sent[at + dropped :]
    edges = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]

    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        for start, end in itertools.pairwise(edges):
            if not peer.wire.closed:
                peer.connection.data_received(sent[start:end])
        peer.connection.connection_lost(None)
        assert peer.lost == 1
        with contextlib.suppress(EngineLostError):
            await whole(answer)
            assert answer.complete
            assert answer.status >= 200
        assert not (peer.kept and not answer.complete)

    run(scenario)


def test_what_follows_an_answer_belongs_to_nobody():
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        peer.connection.data_received(OK + b"Content-Length: 2\r\n\r\nok" + OK)
        assert await whole(answer) == b"ok"
        assert (peer.wire.closed, peer.kept) == (True, 0)

    run(scenario)


def test_what_an_engine_says_unasked_ends_the_connection():
    peer = Peer()
    peer.connection.data_received(OK)
    assert peer.wire.closed
    assert not peer.connection.usable


def test_a_request_into_a_connection_that_is_closing_is_lost_at_once():
    async def scenario() -> None:
        peer = Peer()
        peer.wire.closed = True
        peer.connection.connection_lost(None)
        answer = peer.connection.send(b"", b"", None)
        with pytest.raises(EngineLostError):
            await answer.headers_there()

    run(scenario)


def test_closing_an_answer_closes_its_connection_unless_it_is_complete():
    async def scenario() -> None:
        peer = Peer()
        with peer.connection.send(b"", b"", None):
            peer.connection.data_received(OK + b"Content-Length: 2\r\n\r\nok")
        assert not peer.wire.closed
        with peer.connection.send(b"", b"", None) as answer:
            peer.connection.data_received(OK + b"Content-Length: 2\r\n\r\n")
        assert peer.wire.closed
        with pytest.raises(EngineLostError, match="closed"):
            await answer.read()

    run(scenario)


def test_an_answer_that_comes_before_its_request_is_sent_ends_the_connection():
    """The engine did not want the rest, which would be read as the next request."""
    peer = Peer()
    peer.connection.send(b"head", b"large", None)
    peer.wire.unsent_bytes = 1
    peer.connection.data_received(b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n")
    assert peer.wire.closed
    assert peer.kept == 0


def test_who_reads_slowly_slows_the_engine():
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", None)
        length = 3 * HIGH_WATER_BYTES
        peer.connection.data_received(OK + f"Content-Length: {length}\r\n\r\n".encode())
        peer.connection.data_received(b"x" * HIGH_WATER_BYTES)
        assert not peer.wire.paused
        peer.connection.data_received(b"x")
        assert peer.wire.paused
        assert len(await answer.readany()) == HIGH_WATER_BYTES + 1
        assert not peer.wire.paused
        # the whole rest at once: nobody is held up by what nobody reads
        peer.connection.data_received(b"x" * (length - HIGH_WATER_BYTES - 1))
        assert not peer.wire.paused
        assert peer.kept == 1

    run(scenario)


def test_an_answer_may_stop_for_so_long():
    async def scenario() -> None:
        peer = Peer()
        answer = peer.connection.send(b"", b"", 0.01)
        with answer, pytest.raises(TimeoutError, match=r"no byte came for 0\.01 s"):
            await answer.headers_there()
        assert peer.wire.closed

    run(scenario)


# --- the pool of them ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def engine(*answers: bytes) -> AsyncIterator[tuple[str, list[int], list[bytes]]]:
    """An engine that gives these answers in turn, the last one for ever: its URL, the number of
    each request's connection, and the requests."""
    of_request: list[int] = []
    requests: list[bytes] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        number = connections
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                of_request.append(number)
                writer.write(answers[min(len(requests), len(answers)) - 1])
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", of_request, requests


EMPTY = OK + b"Content-Length: 0\r\n\r\n"


def test_connections_are_used_again_while_they_are_young(monkeypatch):
    async def scenario() -> None:
        async with engine(EMPTY) as (url, of_request, _):
            with contextlib.closing(EngineSession(5, None)) as engines:
                for _ in range(3):
                    await engines.whole("GET", url, "/", 5)
                monkeypatch.setattr(session, "_KEEPALIVE_S", 0.0)
                await engines.whole("GET", url, "/", 5)
        assert of_request == [1, 1, 1, 2]

    run(scenario)


def test_connections_that_nobody_needs_are_closed(monkeypatch):
    monkeypatch.setattr(session, "_KEEPALIVE_S", 0.02)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EMPTY)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        closed.set()
        writer.close()

    async def scenario() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with contextlib.closing(EngineSession(5, None)) as engines:
                await engines.whole("GET", url, "/", 5)
                await closed.wait()

    run(scenario)


def test_a_connection_that_the_engine_closed_is_not_used_again():
    async def scenario() -> None:
        async with engine(OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n", EMPTY) as (
            url,
            of_request,
            _,
        ):
            with contextlib.closing(EngineSession(5, None)) as engines:
                await engines.whole("GET", url, "/", 5)
                await engines.whole("GET", url, "/", 5)
        assert of_request == [1, 2]

    run(scenario)


def test_what_is_sent_is_one_request_with_its_headers():
    async def scenario() -> None:
        async with engine(EMPTY) as (url, _, requests):
            with contextlib.closing(EngineSession(5, None, "key")) as engines:
                await engines.whole("GET", url + "/base", "/v1/a?b=%20", 5, {"Accept": "x/y"})
        assert requests[0].splitlines() == [
            b"GET /base/v1/a?b=%20 HTTP/1.1",
            b"Host: " + url.removeprefix("http://").encode(),
            b"Accept: x/y",
            b"Accept-Encoding: identity",
            b"Content-Type: application/json",
            b"Authorization: Bearer key",
            b"",
        ]

    run(scenario)


@pytest.mark.parametrize(
    ("target", "value"), [("/a b", ""), ("/a\r\nX: y", ""), ("/", "a\r\nX: y"), ("/", "a\0")]
)
def test_nothing_can_be_slipped_into_a_request(target, value):
    async def scenario() -> None:
        engines = EngineSession(5, None)
        with pytest.raises(ValueError, match="control characters"):
            await engines.ask("GET", "http://127.0.0.1:1", target, {"X-Session-ID": value})

    run(scenario)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "a..b"])
def test_an_engine_that_cannot_be_reached_was_sent_nothing(host):
    async def scenario() -> None:
        with socket.socket() as taken, contextlib.closing(EngineSession(5, None)) as engines:
            taken.bind(("127.0.0.1", 0))
            url = f"http://{host}:{taken.getsockname()[1]}"
            with pytest.raises(UnreachedError, match="cannot connect to"):
                await engines.ask("GET", url, "/")

    run(scenario)


def test_who_gives_up_waiting_closes_the_connection():
    async def scenario() -> None:
        asked, gone = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            gone.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with contextlib.closing(EngineSession(5, None)) as engines:
                asking: asyncio.Task[Any] = asyncio.create_task(engines.ask("GET", url, "/"))
                await asked.wait()
                asking.cancel()
                await gone.wait()

    run(scenario)


def test_a_name_that_is_found_slowly_is_found_once(monkeypatch):
    """Who asks first gives up waiting; the lookup goes on for those who come after."""

    async def scenario() -> None:
        loop, lookups, found = asyncio.get_running_loop(), [], asyncio.Event()
        really = loop.getaddrinfo

        async def slowly(*args: Any, **kwargs: Any) -> Any:
            lookups.append(args)
            await found.wait()
            return await really(*args, **kwargs)

        monkeypatch.setattr(loop, "getaddrinfo", slowly)
        async with engine(EMPTY) as (url, _, _):
            with contextlib.closing(EngineSession(0.5, None)) as engines:
                with pytest.raises(UnreachedError, match=r"within 0\.5 s"):
                    await engines.ask("GET", url, "/")
                found.set()
                for _ in range(2):
                    with await engines.ask("GET", url, "/"):
                        pass
        assert len(lookups) == 1

    run(scenario)


def test_a_name_that_is_not_found_is_looked_for_again():
    async def scenario() -> None:
        with contextlib.closing(EngineSession(5, None)) as engines:
            for _ in range(2):
                with pytest.raises(UnreachedError, match="cannot connect to"):
                    await engines.ask("GET", "http://a..b", "/")

    run(scenario)
