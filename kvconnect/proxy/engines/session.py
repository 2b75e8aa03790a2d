"""Connections to engines: pooled, kept alive, quick to notice that an engine is gone.

Does not know what is sent over them, nor how an answer is read (``exchange``).

- Redirects are not followed, cookies not kept, bodies not decompressed: answers pass as they are.
- Nothing is sent twice: what an engine that broke off has done, and whether its KV is still to be
  had, is for who asked to judge.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import aiohappyeyeballs

from kvconnect.proxy.engines.exchange import EngineAnswer, EngineConnection

LOST = (OSError,)
"""The engine, or the way to it, is gone. TimeoutError and `EngineLostError` are among them."""
# uvicorn, under vLLM, closes connections after 5 idle seconds; we have to be first, or a request
# is written into a closing connection and a healthy engine looks dead.
_KEEPALIVE_S = 3.0
_RESOLVED_S = 10.0
# The second address of a name is tried when the first has not answered for so long (RFC 8305).
_NEXT_ADDRESS_S = 0.25
# What would end a line, or a word of the request line.
_NO_VALUE = re.compile(r"[\0-\x08\n-\x1f\x7f]")
_NO_TARGET = re.compile(r"[\0-\x20\x7f]")


class UnreachedError(ConnectionError):
    """No byte of the request went out: the engine did not accept a connection."""


class _Origin:
    """An engine's address, and the connections to it that wait for a request."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        self.path = parts.path
        self.host_line = f" HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self.idle: list[EngineConnection] = []
        self.sweeping = False
        self._lookup: asyncio.Task[list[aiohappyeyeballs.AddrInfoType]] | None = None
        self._looked_up_s = 0.0

    async def addresses(self) -> list[aiohappyeyeballs.AddrInfoType]:
        """Where its name leads, remembered for `_RESOLVED_S`. Whoever asks shares one lookup."""
        now, lookup = asyncio.get_running_loop().time(), self._lookup
        old = now - self._looked_up_s >= _RESOLVED_S
        if lookup is None or (lookup.done() and (old or lookup.exception() is not None)):
            lookup = self._lookup = asyncio.create_task(self._look_up())
            self._looked_up_s = now
        return await asyncio.shield(lookup)

    async def _look_up(self) -> list[aiohappyeyeballs.AddrInfoType]:
        loop = asyncio.get_running_loop()
        return list(await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))


class EngineSession:
    """Asks engines, without limits on connections, or on how long an engine may generate."""

    def __init__(
        self, connect_timeout_s: float, silence_timeout_s: float | None, api_key: str | None = None
    ) -> None:
        """Made and used within one event loop.

        Parameters:
            connect_timeout_s: how long a connection may take to be made, with TLS.
            silence_timeout_s: how long an answer may stop; None: as long as it likes.
            api_key: what engines are sent where a request does not bring its client's.
        """
        # byte for byte: an engine must not compress what the client did not ask to have so
        self._headers = {
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._loop = asyncio.get_running_loop()
        self._origins: dict[str, _Origin] = {}
        self._open: set[EngineConnection] = set()
        self._trusted: ssl.SSLContext | None = None

    def close(self) -> None:
        """Closes all connections, with what is under way on them. Idempotent."""
        for connection in list(self._open):
            connection.close()

    async def ask(
        self,
        method: str,
        url: str,
        target: str,
        headers: Mapping[str, str] = {},
        body: bytes | None = None,
    ) -> EngineAnswer:
        """Sends a request, and waits for the answer's status and headers. To be closed.

        Parameters:
            method: GET, POST and so on. Not HEAD: its answer tells of a body that never comes.
            url: the engine's, as `config.engine_url` writes it.
            target: path and query, after ``url``'s own path.
            headers: beside those of every request, or in their place.
            body: None: it has none.

        Raises:
            UnreachedError: nothing was sent.
            OSError: the engine broke off, or was silent too long.
            ValueError: target or headers cannot be sent.
        """
        origin = self._origin(url)
        head = self._head(method, origin, target, headers, body)
        connection = self._idle(origin) or await self._connect(url, origin)
        answer = connection.send(head, body or b"", self._silence_timeout_s)
        try:
            await answer.headers_there()
        except BaseException:
            answer.close()
            raise
        return answer

    async def whole(
        self,
        method: str,
        url: str,
        target: str,
        timeout_s: float,
        headers: Mapping[str, str] = {},
        body: bytes | None = None,
    ) -> tuple[EngineAnswer, bytes]:
        """`ask`, and the whole body, within so many seconds. TimeoutError if it takes longer."""
        async with asyncio.timeout(timeout_s):
            with await self.ask(method, url, target, headers, body) as answer:
                return answer, await answer.read()

    def _origin(self, url: str) -> _Origin:
        if (origin := self._origins.get(url)) is None:
            origin = self._origins[url] = _Origin(url)
        return origin

    def _head(
        self,
        method: str,
        origin: _Origin,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None,
    ) -> bytes:
        sent = {**self._headers, **headers}
        if _NO_TARGET.search(target) or _NO_VALUE.search("".join(sent.values())):
            raise ValueError(f"{target!r} or its headers have control characters; leave them out")
        lines = "".join([f"{name}: {value}\r\n" for name, value in sent.items()])
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        head = f"{method} {origin.path}{target}{origin.host_line}{lines}{length}\r\n"
        return head.encode("utf-8", "surrogateescape")

    async def _connect(self, url: str, origin: _Origin) -> EngineConnection:
        def kept(connection: EngineConnection) -> None:
            self._keep(url, connection)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connected = await aiohappyeyeballs.start_connection(
                    await origin.addresses(),
                    happy_eyeballs_delay=_NEXT_ADDRESS_S,
                    interleave=1,
                    socket_factory=watched_socket,
                )
                try:
                    _, connection = await self._loop.create_connection(
                        lambda: EngineConnection(kept, self._lost),
                        sock=connected,
                        ssl=self._tls() if origin.tls else None,
                        server_hostname=origin.host if origin.tls else None,
                    )
                except BaseException:
                    connected.close()
                    raise
        except TimeoutError:
            waited = f"no connection to {url} within {self._connect_timeout_s} s"
            raise UnreachedError(waited) from None
        except (OSError, UnicodeError) as error:  # the latter of a name that DNS cannot have
            raise UnreachedError(f"cannot connect to {url}: {error}") from error
        if connection.usable:  # it may be gone already
            self._open.add(connection)
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._trusted is None:
            self._trusted = ssl.create_default_context()
        return self._trusted

    # --- connections that wait -----------------------------------------------------------------

    def _idle(self, origin: _Origin) -> EngineConnection | None:
        """The one that was used last, if an engine cannot have become tired of it."""
        while origin.idle:
            connection = origin.idle.pop()
            young = self._loop.time() - connection.idle_since_s < _KEEPALIVE_S
            if young and connection.usable:
                return connection
            connection.close()
        return None

    def _keep(self, url: str, connection: EngineConnection) -> None:
        origin = self._origin(url)
        connection.idle_since_s = self._loop.time()
        origin.idle.append(connection)
        if not origin.sweeping:
            origin.sweeping = True
            self._loop.call_later(_KEEPALIVE_S, self._sweep, url, origin)

    def _sweep(self, url: str, origin: _Origin) -> None:
        """Closes those that nobody needed lately; forgets an engine to which none is left."""
        since = self._loop.time() - _KEEPALIVE_S
        while origin.idle and origin.idle[0].idle_since_s <= since:
            origin.idle.pop(0).close()
        origin.idle = [connection for connection in origin.idle if connection.usable]
        if origin.idle:
            wait_s = origin.idle[0].idle_since_s - since
            self._loop.call_later(wait_s, self._sweep, url, origin)
        else:
            origin.sweeping = False
            self._origins.pop(url, None)

    def _lost(self, connection: EngineConnection) -> None:
        self._open.discard(connection)


def watched_socket(address: aiohappyeyeballs.AddrInfoType) -> socket.socket:
    """A socket that notices within 30 s when its peer's host has gone without a word.

    Nothing else would: generation has no time limit, and a dead host sends no reset.
    """
    family, kind, protocol, *_ = address
    watched = socket.socket(family, kind, protocol)
    watched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere; the system's defaults are hours
            watched.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return watched
