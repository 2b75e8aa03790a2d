"""Control channels inside one process, whose frames a test may hold, lose, repeat and reorder.

* `Network.channel` makes what ZMQ would bind; both are held to the same contract
  (`kvconnect.testing.check_channel`).
* Frames arrive at once and in order, unless ``held``: then they wait in ``pending`` until the
  test names the one to deliver, drop or repeat. Nothing is random here.
* A connection that breaks is told by a frame too, which may be held and lost like any other:
  a host may vanish without a word.
* A frame is addressed when it is sent and handed over when it is delivered: one to an address
  where nobody listens by then is lost; where somebody else does by then (a restart), whose key is
  another, its link is refused, as with ZMQ.
"""

import itertools
import threading
from collections import deque
from typing import NamedTuple

from kvconnect.control.channel import Frame, Link, key_answer
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, WireError


class Pending(NamedTuple):
    """A frame on its way: to whoever listens on ``address``, or back along a dialled link."""

    sender: "MemoryChannel"
    link: Link
    address: Address | None
    dialer: "MemoryChannel | None"
    data: bytes | None  # None: the connection broke
    refused: bool = False


class Network:
    """What connects channels: those made on one network reach each other."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.pending: list[Pending] = []
        self.lock = threading.RLock()
        self.listening: dict[tuple[str, int], MemoryChannel] = {}
        self.dialled: dict[bytes, tuple[MemoryChannel, Address]] = {}
        self.numbers = itertools.count(1)
        self._ports = itertools.count(20_000)

    def channel(self, host: str = "test", port: int = 0) -> "MemoryChannel":
        """A channel that listens on ``host``; ``port`` 0 takes a free one."""
        with self.lock:
            key_address = Address(host, next(self._ports))
            address = Address(host, port or next(self._ports), f"key {key_address.port}")
            if (host, address.port) in self.listening:
                raise ConfigError(f"control channel cannot listen on {address}: it is taken")
            made = MemoryChannel(self, address, key_address)
            self.listening[host, address.port] = self.listening[host, key_address.port] = made
            return made

    def carry(self, frame: Pending) -> None:
        """Put a frame on its way."""
        with self.lock:
            if self.held:
                self.pending.append(frame)
            else:
                self._arrive(frame)

    def deliver(self, index: int = 0) -> None:
        """Let the pending frame at ``index`` arrive."""
        with self.lock:
            self._arrive(self.pending.pop(index))

    def drop(self, index: int = 0) -> None:
        """Lose a pending frame."""
        with self.lock:
            del self.pending[index]

    def repeat(self, index: int = 0) -> None:
        """Let a pending frame arrive and stay pending: it arrives again."""
        with self.lock:
            self._arrive(self.pending[index])

    def flush(self) -> None:
        """Let everything arrive that is pending now, in order."""
        with self.lock:
            pending, self.pending = self.pending, []
            for frame in pending:
                self._arrive(frame)

    def _arrive(self, frame: Pending) -> None:
        key, to = frame.link.key, frame.address
        if to is None:
            if frame.dialer is not None and key in self.dialled:
                frame.dialer.take(Frame(Link(True, key), frame.data, frame.refused))
            return
        there = self.listening.get((to.host, to.port))
        if there is not None and to == there.address:
            there.take(Frame(Link(False, key), frame.data))
        elif key in self.dialled:
            told = (
                key_answer(there.address) if there is not None and to == there.key_address else None
            )
            dialer = self.dialled[key][0]
            self.carry(Pending(there or dialer, frame.link, None, dialer, told, told is None))


class MemoryChannel:
    """See `kvconnect.control.channel`; made by `Network.channel`."""

    def __init__(self, network: Network, address: Address, key_address: Address) -> None:
        self.address = address
        self.key_address = key_address
        self._network = network
        self._arrived: deque[Frame] = deque()
        self._changed = threading.Condition(network.lock)
        self._woken = False
        self._closed = False

    def dial(self, address: Address) -> Link:
        if not address.host.isprintable() or " " in address.host:
            raise WireError(f"{address} cannot be dialled")
        with self._network.lock:
            link = Link(True, str(next(self._network.numbers)).encode())
            self._network.dialled[link.key] = (self, address)
            return link

    def send(self, link: Link, data: bytes) -> None:
        with self._network.lock:
            known = self._network.dialled.get(link.key)
            if known is None:
                return  # dropped since: lost, as on any network
            dialer, address = known
            if link.dialled:
                self._network.carry(Pending(self, link, address, None, data))
            else:
                self._network.carry(Pending(self, link, None, dialer, data))

    def poll(self, timeout_s: float) -> list[Frame]:
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._arrived or self._woken, timeout_s)
            self._woken = False
            arrived = list(self._arrived)
            self._arrived.clear()
            return arrived

    def drop(self, link: Link) -> None:
        with self._network.lock:
            if link.dialled:
                self._network.dialled.pop(link.key, None)
            self._arrived = deque(f for f in self._arrived if f.link != link)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._network.lock:
            if self._closed:
                return
            self._closed = True
            for where in (self.address, self.key_address):
                del self._network.listening[where.host, where.port]
            for key, (dialer, address) in list(self._network.dialled.items()):
                if dialer is self:
                    del self._network.dialled[key]
                elif address in (
                    self.address,
                    self.key_address,
                ):  # a kernel would close the connection
                    self._network.carry(Pending(self, Link(True, key), None, dialer, None))
            self._arrived.clear()

    def take(self, frame: Frame) -> None:
        """A frame arrives."""
        with self._changed:
            if not self._closed:
                self._arrived.append(frame)
                self._changed.notify_all()
