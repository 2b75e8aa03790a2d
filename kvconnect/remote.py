"""A remote engine as one of our ranks sees it: its ranks, and routes to those we read from.

Becomes READY when every rank has been greeted and their geometries intersected with ours.
Named by the addresses that a source gives; without a ticket rank 0 names the others. Tickets
say nothing about a remote that greeting does not: a stale or forged one fails alone.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence

from kvconnect.blocks import Shard as Memory
from kvconnect.dialler import Dialler, Peer, State
from kvconnect.errors import GeometryError, TransportError
from kvconnect.order import Source
from kvconnect.plan import Memory as MemoryKind
from kvconnect.plan import Route, assign
from kvconnect.transport.base import Transport
from kvconnect.wire import Address

logger = logging.getLogger(__name__)


class Remote:
    """One remote engine. FAILED is final; `Remotes.of` then makes a new one."""

    def __init__(
        self,
        addresses: Sequence[Address],
        dialler: Dialler,
        transport: Transport,
        mine: Memory,
        rank: int,
        names: Iterator[int],
    ) -> None:
        self.state = State.GREETING
        self.error = ""
        self.peers: list[Peer] = [dialler.greet(address) for address in addresses]
        self.routes: list[Route | None] = []
        """Of each peer; None where we read nothing from it."""
        self._dialler = dialler
        self._transport = transport
        self._mine = mine
        self._rank = rank
        self._names = names
        self._added: dict[int, str] = {}  # index of a peer → the transport's name of it

    def advance(self) -> None:
        """See how its ranks stand; moves GREETING on to READY or FAILED, READY to FAILED."""
        if self.state is State.FAILED:
            return
        failed = next((p for p in self.peers if p.state is State.FAILED), None)
        if failed is not None:
            self.fail(f"peer {failed}: {failed.error}")
        elif self.state is State.GREETING and all(p.state is State.READY for p in self.peers):
            self._greeted()

    def fail(self, error: str) -> None:
        """Give up on it: fences its transport, so that tickets to it end."""
        if self.state is State.FAILED:
            return
        self.state, self.error = State.FAILED, error
        for name in self._added.values():
            self._transport.drop_peer(name)

    def name_of(self, index: int) -> str:
        """The transport's name of a rank that we read from."""
        return self._added[index]

    def was_restarted(self, source: Source) -> bool:
        """Whether a READY remote is not the one that made the source's ticket.

        A link to a process that ended breaks, so of two incarnations ours is the present one.
        """
        wanted = [shard.incarnation for shard in source.shards]
        present = [peer.body.incarnation for peer in self.peers if peer.body]
        return None not in wanted and wanted != present

    def _greeted(self) -> None:
        bodies = [p.body for p in self.peers if p.body]
        if len(bodies) == 1 and len(bodies[0].shards) > 1:
            self.peers = [self._dialler.greet(address) for address in bodies[0].shards]
            return self.advance()
        try:
            self._connect()
        except (GeometryError, TransportError) as e:
            logger.error("remote engine at %s cannot be read from: %s", self.peers[0], e)
            self.fail(str(e))
            if len(bodies) == 1:  # perhaps it did not know its other ranks yet: ask again
                self._dialler.fail(self.peers[0], str(e))
        else:
            self.state = State.READY

    def _connect(self) -> None:
        bodies = [p.body for p in self.peers if p.body]
        self.routes = [None] * len(bodies)
        rects = assign(self._mine.views, [body.views for body in bodies], self._rank)
        for index, (peer, body, wanted) in enumerate(zip(self.peers, bodies, rects, strict=True)):
            if wanted:
                name = f"{peer}#{body.incarnation}#{next(self._names)}"
                self._transport.add_peer(name, body.hello)
                self._added[index] = name
                kinds = _kind(body.regions), _kind(self._mine.regions)
                self.routes[index] = Route(wanted, *kinds)


def _kind(regions: Sequence) -> MemoryKind:
    kinds = {MemoryKind(r.kind, r.device) for r in regions}
    if len(kinds) != 1:
        raise GeometryError(f"KV memory lies in {sorted(kinds)}, expected one kind and device")
    return kinds.pop()


class Remotes:
    """Remote engines by the addresses of their ranks."""

    def __init__(self, dialler: Dialler, transport: Transport, mine: Memory, rank: int) -> None:
        self._made_of = (dialler, transport, mine, rank, itertools.count(1))
        self._by_addresses: dict[tuple[Address, ...], Remote] = {}

    def of(self, source: Source) -> Remote:
        """The engine at the source's addresses; greets it unless that is under way or done."""
        key = tuple(s.address for s in source.shards)
        remote = self._by_addresses.get(key)
        if remote is not None:
            remote.advance()
        if remote is None or remote.state is State.FAILED:
            remote = self._by_addresses[key] = Remote(key, *self._made_of)
        return remote

    def tick(self) -> None:
        """Advance all; forget the failed ones."""
        for key, remote in list(self._by_addresses.items()):
            remote.advance()
            if remote.state is State.FAILED:
                del self._by_addresses[key]
