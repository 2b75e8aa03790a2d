"""A remote engine as one of our ranks sees it: its ranks, and routes to those we read from.

Becomes READY when every rank has been greeted and their geometries intersected with ours.
Named by the addresses that a source gives; without a ticket rank 0 names the others.
"""

import logging
from collections.abc import Sequence

from kvconnect.blocks import Shard as Memory
from kvconnect.dialler import Dialler, Peer, State
from kvconnect.errors import GeometryError, TransportError
from kvconnect.order import Shard, Source
from kvconnect.plan import Memory as MemoryKind
from kvconnect.plan import Route, assign
from kvconnect.transport.base import Transport
from kvconnect.wire import Address

logger = logging.getLogger(__name__)


class Remote:
    """One remote engine. FAILED is final; `Remotes.of` then makes a new one."""

    def __init__(
        self,
        shards: Sequence[Shard],
        dialler: Dialler,
        transport: Transport,
        mine: Memory,
        rank: int,
    ) -> None:
        self.state = State.GREETING
        self.error = ""
        self.peers: list[Peer] = []
        self.routes: list[Route | None] = []
        """Of each peer; None where we read nothing from it."""
        self._known = list(shards)
        self._dialler = dialler
        self._transport = transport
        self._mine = mine
        self._rank = rank
        self._added: list[str] = []
        self.peers = [dialler.greet(s.address) for s in shards]

    @property
    def identity(self) -> tuple[str, ...]:
        """Incarnations of its ranks, once greeted."""
        return tuple(p.body.incarnation for p in self.peers if p.body)

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
        self.state, self.error = State.FAILED, error
        for name in self._added:
            self._transport.drop_peer(name)
        self._added.clear()

    def name_of(self, index: int) -> str:
        """The transport's name of a rank; another after a restart."""
        peer = self.peers[index]
        assert peer.body is not None
        return f"{peer.address}#{peer.body.incarnation}"

    def _greeted(self) -> None:
        named = self.peers[0].body.shards
        if len(self._known) == 1 and len(named) > 1:
            self._known = [Shard(address, None) for address in named]
            self.peers = [self._dialler.greet(address) for address in named]
            return
        for shard, peer in zip(self._known, self.peers, strict=True):
            if shard.incarnation not in (None, peer.body.incarnation):
                self.fail(f"peer {peer} was restarted since the ticket was made")
                return
        try:
            self._connect()
        except (GeometryError, TransportError) as e:
            self.fail(str(e))
            logger.error("remote engine at %s cannot be read from: %s", self.peers[0], e)
        else:
            self.state = State.READY

    def _connect(self) -> None:
        rects = assign(self._mine.views, [p.body.views for p in self.peers], self._rank)
        self.routes = [None] * len(self.peers)
        for index, (peer, wanted) in enumerate(zip(self.peers, rects, strict=True)):
            if not wanted:
                continue
            self._transport.add_peer(self.name_of(index), peer.body.hello)
            self._added.append(self.name_of(index))
            self.routes[index] = Route(wanted, _kind(peer.body.regions), _kind(self._mine.regions))


def _kind(regions: Sequence) -> MemoryKind:
    kinds = {MemoryKind(r.kind, r.device) for r in regions}
    if len(kinds) != 1:
        raise GeometryError(f"KV memory lies in {sorted(kinds)}, expected one kind and device")
    return kinds.pop()


class Remotes:
    """Remote engines by the addresses of their ranks."""

    def __init__(self, dialler: Dialler, transport: Transport, mine: Memory, rank: int) -> None:
        self._dialler = dialler
        self._transport = transport
        self._mine = mine
        self._rank = rank
        self._by_addresses: dict[tuple[Address, ...], Remote] = {}

    def of(self, source: Source) -> Remote:
        """The engine that holds ``source``; greets it unless that is under way or done.

        An engine whose incarnation is not the ticket's is greeted anew: either it or the ticket
        is from before a restart, and greeting tells which.
        """
        key = tuple(s.address for s in source.shards)
        wanted = tuple(s.incarnation for s in source.shards if s.incarnation)
        remote = self._by_addresses.get(key)
        if remote is not None:
            remote.advance()
            if remote.state is State.READY and wanted and remote.identity != wanted:
                for peer in remote.peers:
                    self._dialler.fail(peer, "another incarnation is wanted")
                remote.fail("it was restarted")
        if remote is None or remote.state is State.FAILED:
            remote = Remote(source.shards, self._dialler, self._transport, self._mine, self._rank)
            self._by_addresses[key] = remote
        return remote

    def tick(self) -> None:
        """Advance all; forget the failed ones."""
        for key, remote in list(self._by_addresses.items()):
            remote.advance()
            if remote.state is State.FAILED:
                del self._by_addresses[key]
