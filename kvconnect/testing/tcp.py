"""A TCP proxy that spoils what passes: cuts, delays, blocks one way, flips bits,
puts bytes in.

* `TcpFaults` listens, and carries bytes between whoever connects and one target. It knows nothing
  of what it carries, so it can stand before any listener: a control channel, an HTTP server.
* Faults are attributes and calls of any thread, and hold until they are changed or `heal` is
  called. What is blocked or delayed waits and arrives later, as TCP has it; bytes are never
  reordered. A flipped bit is one that a checksum of TCP did not notice.
* Which bits are flipped follows from the seed, the number of the connection and the direction.
"""

import asyncio
import contextlib
import random
import threading
from typing import Literal, Self

Way = Literal["there", "back"]
"""To the target, or from it."""
LOOK_S = 0.005  # how often a blocked way is looked at
READ_BYTES = 1 << 16


class TcpFaults:
    """See the module's contract. A context; it listens from the start of it to its end."""

    def __init__(self, target: tuple[str, int], seed: int, port: int = 0) -> None:
        """``target`` is connected to anew for every connection; ``port`` 0: any free one."""
        self.delay_s = 0.0
        """That bytes wait, either way."""
        self.blocked: frozenset[Way] = frozenset()
        """Ways that nothing passes."""
        self.flip_every = 0
        """A bit is flipped in about one of so many bytes; 0: none."""
        self.refuses = False
        """Whether new connections are closed at once."""
        self.inserted: dict[Way, bytes] = {}
        """Bytes to put, once, before what passes next: a length, say, of what never comes."""
        self.carried: dict[Way, int] = {"there": 0, "back": 0}
        """Bytes that passed."""
        self.flipped = 0
        self.connections = 0
        self._target, self._seed, self._port = target, seed, port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, name="tcp-faults", daemon=True)
        self._up = threading.Event()
        self._stop: asyncio.Future[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._target[0], self._port

    def heal(self) -> None:
        """No faults from now on."""
        self.delay_s, self.blocked, self.flip_every, self.refuses = 0.0, frozenset(), 0, False
        self.inserted = {}

    def cut(self) -> None:
        """Break all connections."""
        self._loop.call_soon_threadsafe(self._cut)

    def __enter__(self) -> Self:
        self._thread.start()
        self._up.wait()
        if self._stop is None:
            raise OSError(f"cannot listen on {self.address}")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set_result, None)
        self._thread.join()

    # -- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._up.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, self._target[0], self._port)
        self._port = server.sockets[0].getsockname()[1]
        self._stop = self._loop.create_future()
        self._up.set()
        await self._stop
        server.close()
        self.heal()
        self._cut()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*carrying, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        seed = f"{self._seed} {self.connections}"
        self._open.add(writer)
        if self.refuses:
            self._drop(writer)
            return
        try:
            theirs, to_theirs = await asyncio.open_connection(*self._target)
        except OSError:  # nobody listens there now
            self._drop(writer)
            return
        self._open.add(to_theirs)
        ways = [
            asyncio.ensure_future(self._carry("there", seed, reader, to_theirs)),
            asyncio.ensure_future(self._carry("back", seed, theirs, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            self._drop(writer, to_theirs)

    async def _carry(
        self, way: Way, seed: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until either end closes."""
        rng = random.Random(f"{seed} {way}")
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                while way in self.blocked and not writer.is_closing():
                    await asyncio.sleep(LOOK_S)
                self.carried[way] += len(data)
                writer.write(self.inserted.pop(way, b""))
                writer.write(self._flipped(data, rng) if self.flip_every else data)
                await writer.drain()

    def _flipped(self, data: bytes, rng: random.Random) -> bytes:
        changed = bytearray(data)
        at = int(rng.expovariate(1 / self.flip_every))
        while at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
            self.flipped += 1
            at += 1 + int(rng.expovariate(1 / self.flip_every))
        return bytes(changed)

    def _cut(self) -> None:
        self._drop(*self._open)

    def _drop(self, *writers: asyncio.StreamWriter) -> None:
        """Close at once, what is still to be written included."""
        for writer in writers:
            self._open.discard(writer)
            writer.transport.abort()
