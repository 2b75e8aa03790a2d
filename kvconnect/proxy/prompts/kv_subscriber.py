"""Listens to the KV events of the engines of both pools: a socket for each rank of each.

What the events say is ``kv_events``'. Where they are published follows from the engine's URL:

- ``5557``: at the host of every engine. ``5557-5560``: the ranks of data-parallel engines, which
  publish on port + rank.
- ``http://HOST:8200=tcp://HOST:5558``: for that engine, where several share a host.
- An engine whose connection breaks has told nothing; ZMQ connects again by itself. One that is gone
  from its pool, or drains, is not listened to any more.
- Publishers are not authenticated (vLLM's have no such thing): who can reach proxy and engines on
  the network could mislead the proxy. That costs time, and no answer.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from kvconnect.errors import ConfigError
from kvconnect.proxy.prompts.kv_events import RankBlocks

LOOK_EVERY_S = 1.0
_MOST_MESSAGE_BYTES = 16 * 2**20
_MOST_QUEUED = 1000  # messages; what is lost beyond it shows in the numbers
_MOST_RANKS = 1024
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)

logger = logging.getLogger(f"vllm.{__name__}")

Endpoints = Callable[[str], tuple[str, ...]]
"""An engine's URL → where its ranks publish."""


def endpoints(given: Sequence[str]) -> Endpoints:
    """Where engines publish, by what the operator said; ConfigError says what is wrong with it."""
    named: dict[str, tuple[str, ...]] = {}
    everywhere: range | None = None
    for text in given:
        url, separator, address = text.rpartition("=")
        host, _, ports = address.removeprefix("tcp://").rpartition(":")
        found = _ports(ports)
        if found is None or bool(separator) != bool(host) or (host and "://" not in url):
            raise ConfigError(
                f"--kv-events {text!r} names no ports; write 5557, 5557-5560 for four ranks, or "
                "http://HOST:PORT=tcp://HOST:5557 for one engine"
            )
        if separator:
            named[url.rstrip("/")] = tuple(f"tcp://{host}:{port}" for port in found)
        else:
            everywhere = found

    def of(url: str) -> tuple[str, ...]:
        host = urlsplit(url).hostname or ""
        host = f"[{host}]" if ":" in host else host
        return named.get(url) or tuple(f"tcp://{host}:{port}" for port in everywhere or ())

    return of


def _ports(text: str) -> range | None:
    if (found := _PORTS.fullmatch(text)) is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    fits = 0 < first <= last < 2**16 and last - first < _MOST_RANKS
    return range(first, last + 1) if fits else None


class KvEvents:
    """What the engines have told; `watch` keeps it so."""

    def __init__(self, where: Endpoints, engines: Callable[[], Iterable[str]]) -> None:
        """``where`` engines publish; ``engines``: URLs of those that are to be listened to."""
        self._where = where
        self._engines = engines
        self._ranks: dict[str, dict[str, RankBlocks]] = {}  # engine → endpoint →
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}

    def ranks(self, url: str) -> tuple[RankBlocks, ...]:
        """All ranks of an engine; () unless each of them has told something."""
        ranks = tuple(self._ranks.get(url, {}).values())
        return ranks if all(rank.tells for rank in ranks) else ()

    async def watch(self) -> None:
        """Listen to engines as they come and go, until cancelled."""
        context = zmq.asyncio.Context()
        context.setsockopt(zmq.LINGER, 0)
        try:
            while True:
                self._follow(context)
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            left = [task for url in list(self._tasks) for task in self._leave(url)]
            await asyncio.gather(*left, return_exceptions=True)
            context.destroy()  # the monitors, too

    def _follow(self, context: zmq.asyncio.Context) -> None:
        engines = set(self._engines())
        for url in self._tasks.keys() - engines:
            self._leave(url)
        for url in engines - self._tasks.keys():
            self._ranks[url] = {endpoint: RankBlocks() for endpoint in self._where(url)}
            self._tasks[url] = [
                asyncio.create_task(_listen(context, endpoint, rank))
                for endpoint, rank in self._ranks[url].items()
            ]

    def _leave(self, url: str) -> list[asyncio.Task[None]]:
        self._ranks.pop(url, None)
        for task in (left := self._tasks.pop(url)):
            task.cancel()
        return left


async def _listen(context: zmq.asyncio.Context, endpoint: str, rank: RankBlocks) -> None:
    """Hear what is published at an endpoint, until cancelled."""
    with contextlib.closing(context.socket(zmq.SUB)) as heard:
        heard.setsockopt(zmq.MAXMSGSIZE, _MOST_MESSAGE_BYTES)
        heard.setsockopt(zmq.RCVHWM, _MOST_QUEUED)
        heard.setsockopt(zmq.IPV6, 1)
        heard.setsockopt(zmq.TCP_KEEPALIVE, 1)
        heard.subscribe(b"")
        broke = asyncio.create_task(_clear_when_it_breaks(heard, rank))
        try:
            heard.connect(endpoint)
            while True:
                # (topic, number, batch), as vLLM sends it
                _, number, batch = [*(await heard.recv_multipart()), b"", b"", b""][:3]
                rank.hear(int.from_bytes(number, "big"), batch)
        except asyncio.CancelledError:
            pass  # who left it goes on
        except zmq.ZMQError as error:
            logger.warning("KV events of %s cannot be heard: %s", endpoint, error)
        finally:
            rank.clear()
            broke.cancel()
            await asyncio.gather(broke, return_exceptions=True)
            heard.disable_monitor()


async def _clear_when_it_breaks(heard: zmq.asyncio.Socket, rank: RankBlocks) -> None:
    with contextlib.closing(heard.get_monitor_socket(zmq.EVENT_DISCONNECTED)) as monitor:
        while True:
            await recv_monitor_message(monitor)
            rank.clear()
