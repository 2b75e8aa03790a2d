"""One HTTP/1.1 connection to an engine: a request is sent, its answer arrives, and so on.

Knows neither other connections (``session``) nor what is asked for. Parsing is llhttp's, by
httptools.

- An `EngineAnswer` is closed, or read to its end; closing it early closes the connection, by which
  vLLM learns that it may stop.
- A connection is kept (``kept`` is called) after an answer that came whole and said nothing else,
  and only where nothing followed it.
- What an engine sends is not trusted: what is no HTTP, announces two lengths, or has more than
  `MAX_HEAD_BYTES` between two pieces of body breaks off the answer.
- Who reads slowly slows the engine: at `HIGH_WATER_BYTES` nothing more is read from the connection.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

import httptools

MAX_HEAD_BYTES = 64 * 1024
HIGH_WATER_BYTES = 128 * 1024


class EngineLostError(ConnectionError):
    """The engine broke off, or sent what is no HTTP."""


class EngineAnswer:
    """What an engine answers, while it arrives. Reading raises EngineLostError or TimeoutError."""

    __slots__ = (
        "_closes",
        "_ends_with_connection",
        "_fault",
        "_gone",
        "_parts",
        "_resumes",
        "_silence_s",
        "_waiter",
        "begun",
        "complete",
        "content_length",
        "content_type",
        "headers",
        "held_bytes",
        "reason",
        "status",
    )

    def __init__(
        self, closes: Callable[[], None], resumes: Callable[[], None], silence_s: float | None
    ) -> None:
        """``closes`` ends the connection, ``resumes`` reads from it again."""
        self.status = 0
        self.reason = ""
        self.headers: list[tuple[str, str]] = []
        self.content_type = ""
        """Lower case, without parameters."""
        self.content_length: int | None = None
        """Bytes, if the engine told them beforehand."""
        self.begun = False
        """Whether status and headers are there."""
        self.complete = False
        self.held_bytes = 0
        """Of the body: arrived, and not read yet."""
        self._closes, self._resumes = closes, resumes
        self._silence_s = silence_s
        self._parts: list[bytes] = []
        self._fault: OSError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ends_with_connection = False

    def __enter__(self) -> "EngineAnswer":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Want no more of it. Idempotent."""
        if not self.complete and self._fault is None:
            self._fault = EngineLostError("the answer was closed")
            self._closes()

    async def headers_there(self) -> None:
        """Waits for status and headers."""
        while not self.begun:
            await self._more()

    async def read(self) -> bytes:
        """The whole body, or what is left of it."""
        parts = [self._take()]
        while not self.complete:
            await self._more()
            parts.append(self._take())
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def readany(self) -> bytes:
        """All of the body that is there, or the next of it; empty at the end."""
        while not (self._parts or self.complete):
            await self._more()
        return self._take()

    def _take(self) -> bytes:
        parts, self._parts = self._parts, []
        if self.held_bytes > HIGH_WATER_BYTES and not self.complete:
            self._resumes()
        self.held_bytes = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _more(self) -> None:
        """Waits until something arrived; what arrived is read before a fault is raised."""
        if self._fault is not None:
            raise self._fault
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._silence_s is None:
                await self._waiter
            else:
                await asyncio.wait_for(self._waiter, self._silence_s)
        except TimeoutError:
            raise TimeoutError(f"no byte came for {self._silence_s} s") from None
        finally:
            self._waiter = None

    # --- what the connection tells it ----------------------------------------------------------

    def add_body(self, data: bytes) -> None:
        self._parts.append(data)
        self.held_bytes += len(data)

    def begin(self, status: int, reason: bytes, raw: list[tuple[bytes, bytes]]) -> None:
        """Status and headers are there."""
        self.status, self.reason, self.begun = status, reason.decode("latin-1"), True
        chunked = False
        for raw_name, raw_value in raw:
            name, value = raw_name.decode("latin-1"), raw_value.decode("utf-8", "replace")
            self.headers.append((name, value))
            lower = name.lower()
            if lower == "content-length":
                self.content_length = int(value)
            elif lower == "content-type":
                self.content_type = value.partition(";")[0].strip().lower()
            elif lower == "transfer-encoding":
                chunked = value.rpartition(",")[2].strip().lower() == "chunked"
        self._ends_with_connection = not chunked and self.content_length is None

    def wake(self) -> None:
        """Something arrived, or nothing more will."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, fault: OSError) -> None:
        """Nothing more will arrive, and it should."""
        if not self.complete and self._fault is None:
            self._fault = fault
        self.wake()

    def connection_ended(self, error: Exception | None) -> None:
        """Where the body has no other end, that is its end."""
        if self.begun and self._ends_with_connection and error is None:
            self.complete = True
            self.wake()
        else:
            before = "broke off its answer" if self.begun else "broke off before it answered"
            self.fail(EngineLostError(str(error or f"the engine {before}")))


class EngineConnection(asyncio.Protocol):
    """Answers one request at a time. ``lost`` and ``kept`` tell its owner what became of it."""

    def __init__(
        self,
        kept: Callable[["EngineConnection"], None],
        lost: Callable[["EngineConnection"], None],
    ) -> None:
        """``kept``: it can have the next request. ``lost``: it is gone."""
        self.idle_since_s = 0.0
        """By its owner's clock."""
        self._kept, self._lost = kept, lost
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answer: EngineAnswer | None = None
        self._keep = self._paused = False
        self._dry_bytes = 0
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []

    @property
    def usable(self) -> bool:
        """Whether it can have a request."""
        return self._answer is None and not self._transport.is_closing()

    def close(self) -> None:
        self._transport.abort()

    def send(self, head: bytes, body: bytes, silence_s: float | None) -> EngineAnswer:
        """Sends a request.

        Parameters:
            head: request line and headers, with the empty line.
            body: as long as ``head`` says.
            silence_s: how long the answer may stop; None: as long as it likes.
        """
        answer = self._answer = EngineAnswer(self.close, self._resume, silence_s)
        self._dry_bytes = 0
        if self._transport.is_closing():
            answer.fail(EngineLostError("the engine closed the connection"))
        else:
            self._transport.writelines((head, body) if body else (head,))
        return answer

    def _resume(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    # --- asyncio's calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked
            self.close()
            return
        self._dry_bytes += len(data)
        fault = ""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            fault = f"the engine's answer is no HTTP/1.1: {error}"
        else:
            if self._dry_bytes > MAX_HEAD_BYTES:
                fault = f"the engine sent more than {MAX_HEAD_BYTES} bytes of headers"
        if fault:
            answer.fail(EngineLostError(fault))
            self.close()
        elif answer.complete:
            # not while the request is on its way: the engine did not want the rest of it
            if self._keep and not self._transport.get_write_buffer_size():
                self._resume()
                self._kept(self)
            else:
                self.close()
        elif answer.held_bytes > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        answer.wake()

    def connection_lost(self, error: Exception | None) -> None:
        answer, self._answer = self._answer, None
        del self._parser  # it holds us
        self._lost(self)
        if answer is not None:
            answer.connection_ended(error)

    # --- httptools' calls ----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._answer is None:
            raise EngineLostError("the engine went on after its answer")
        self._reason, self._headers = b"", []

    def on_status(self, part: bytes) -> None:
        self._reason += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))  # a trailer, too, which nobody reads

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is not None and status >= 200:
            self._answer.begin(status, self._reason, self._headers)

    def on_body(self, data: bytes) -> None:
        self._dry_bytes = 0
        if self._answer is not None:
            self._answer.add_body(data)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.begun:  # 1xx: the answer is still to come
            self._keep = self._parser.should_keep_alive()
            self._answer.complete = True
            self._answer = None
