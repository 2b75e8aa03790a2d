"""A remote engine as one of our ranks sees it: its ranks, and paths from those we read.

Becomes READY when every rank has been greeted and their geometries intersected with ours.
Named by the addresses that a source gives, keys included: what was started anew is another one.
Without a ticket rank 0 names the others. Tickets say nothing about a remote that greeting does not:
a stale or forged one fails alone.
"""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvconnect.config import Mode
from kvconnect.consumer.stage import StagedPath
from kvconnect.control.dialer import Dialer
from kvconnect.control.peer import LeaseRef, Peer, PeerState
from kvconnect.control.wire import Address, Body
from kvconnect.costs import Costs
from kvconnect.errors import GeometryError, TransportError, contained
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.blocks import Shard as Memory
from kvconnect.geometry.chunks import ChunkPlan
from kvconnect.geometry.intersect import Rect, assign, why_not_direct
from kvconnect.geometry.rows import DstBlocks, Route
from kvconnect.geometry.rows import Memory as MemoryKind
from kvconnect.geometry.stretch import ALL, Stretch
from kvconnect.lease import Clock
from kvconnect.ops import Kernels
from kvconnect.orders import Source
from kvconnect.staging import Slots
from kvconnect.transport.base import Transport

logger = logging.getLogger(f"vllm.{__name__}")

IDLE_S = 600.0
MAX_REMOTES = 2048


@dataclass(frozen=True)
class ConsumerContext:
    """What all remotes of a rank share: our memory, and how it may be filled."""

    dialer: Dialer
    transport: Transport
    clock: Clock
    mine: Memory
    rank: int
    mode: Mode = "auto"
    allow_lossy: bool = False
    kernels: Kernels | None = None
    slots: Slots | None = None
    """To be written to; without them nothing is staged."""
    names: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    changed: "list[Remote]" = field(default_factory=list)
    """Remotes that have become READY or FAILED, until `Remotes.take_changed`."""


class PathChoice(NamedTuple):
    """Which path is taken; ``descriptors``: how many the direct one takes or would take."""

    staged: bool
    descriptors: int


@dataclass
class PeerPath:
    """How one rank is read: by ``route``, ``staged``, or by the faster of the two."""

    route: Route | None
    staged: StagedPath | None
    costs: Costs = field(default_factory=Costs)
    was_read: bool = False
    """Whether a direct read has ever ended well: if one then fails, greeting anew may help."""

    def choose_staged(
        self, tables: Sequence[Sequence[int]], blocks: DstBlocks, stretch: Stretch = ALL
    ) -> PathChoice:
        """How a transfer (see `Route.select`) is to be made."""
        if self.route is None:
            return PathChoice(True, 0)
        found = self.route.descriptors(tables, blocks, stretch)
        if self.staged is None:
            return PathChoice(False, found)
        staged = self.costs.choose_staged(found, self.route.nbytes(blocks, stretch))
        return PathChoice(staged and (self.staged.fast or self.costs.direct_fails), found)


class Remote:
    """One remote engine. FAILED is final; `Remotes.of` then makes a new one."""

    def __init__(
        self, addresses: Sequence[Address], context: ConsumerContext, lease: LeaseRef
    ) -> None:
        """``lease``: one that it may know, as those that it is shown later."""
        self.state = PeerState.GREETING
        self.error = ""
        self._shown = {lease: None}  # to ranks, while any is greeted
        self.peers: list[Peer] = [
            context.dialer.greet(a, self._shown) for a in dict.fromkeys(addresses)
        ]
        self.paths: list[PeerPath | None] = []
        """What we read from each peer; None where nothing."""
        self._context = context
        self._dialer = context.dialer
        self._transport = context.transport
        self.fetches = 0
        """How many use it now."""
        self._outdated = ""  # why it is to be greeted anew
        self._added: dict[int, str] = {}  # index of a peer → the transport's name of it
        self.used_at = context.clock()
        """When a request last needed it."""
        if len(set(addresses)) < len(addresses):
            self.state, self.error = PeerState.FAILED, "the source names one address twice"

    def advance(self) -> None:
        """See how its ranks stand; moves GREETING on to READY or FAILED, READY to FAILED."""
        if self.state is PeerState.FAILED:
            return
        failed = next((p for p in self.peers if p.state is PeerState.FAILED), None)
        if failed is not None:
            self.fail(f"peer {failed}: {failed.error}")
        elif self.state is PeerState.GREETING and all(
            p.state is PeerState.READY for p in self.peers
        ):
            self._greeted()

    def fail(self, error: str) -> None:
        """Give up on it: fences its transport, so that tickets to it end."""
        if self.state is PeerState.FAILED:
            return
        self.state, self.error = PeerState.FAILED, error
        self._context.changed.append(self)
        for name in self._added.values():
            self._transport.drop_peer(name)

    def greet_anew(self, why: str) -> None:
        """Its transport may have been made anew: greet it again when nothing uses it."""
        self._outdated = why

    @property
    def is_outdated(self) -> bool:
        """Whether it is still to be greeted anew."""
        return bool(self._outdated) and self.state is not PeerState.FAILED

    def tick(self) -> None:
        """Advance, or give up one that is to be greeted anew and that nothing uses."""
        self.advance()
        if self._outdated and not self.fetches and self.state is PeerState.READY:
            for peer in self.peers:
                self._dialer.fail(peer, self._outdated)
            self.advance()

    def name_of(self, index: int) -> str:
        """The transport's name of a rank that we read from."""
        return self._added[index]

    def show(self, lease: LeaseRef) -> None:
        """While it is being greeted: a lease that it may know."""
        if self.state is PeerState.GREETING:
            self._shown[lease] = None
            for peer in self.peers:
                self._dialer.show(peer, (lease,))

    def _greeted(self) -> None:
        bodies = [p.body for p in self.peers if p.body]
        if len(bodies) == 1 and len(bodies[0].shards) > 1:
            first = self.peers[0]
            self.peers = [
                first if address == first.at else self._dialer.greet(address, self._shown)
                for address in bodies[0].shards
            ]
            return self.advance()
        try:
            self._connect()
        except (GeometryError, TransportError) as e:
            logger.error("remote engine at %s cannot be read from: %s", self.peers[0], e)
            self.fail(str(e))
            if len(bodies) == 1:  # perhaps it did not know its other ranks yet: ask again
                self._dialer.fail(self.peers[0], str(e))
        else:
            self.state = PeerState.READY
            self._shown.clear()
            self._context.changed.append(self)

    def _connect(self) -> None:
        bodies = [p.body for p in self.peers if p.body]
        self.paths = [None] * len(bodies)
        context = self._context
        rects = assign(
            context.mine.views, [body.views for body in bodies], context.rank, context.allow_lossy
        )
        for index, (peer, body, wanted) in enumerate(zip(self.peers, bodies, rects, strict=True)):
            if not wanted:
                continue
            route, not_direct = self._route(body, wanted)
            staged, not_staged = self._staged(peer, body, wanted)
            if route is None and staged is None:
                raise GeometryError(
                    f"peer {peer}: its KV cannot be read directly ({not_direct}), nor staged "
                    f"({not_staged})"
                )
            if route is not None:
                name = f"{peer}#{body.incarnation}#{next(context.names)}"
                self._transport.add_peer(name, body.hello)
                self._added[index] = name
            self.paths[index] = PeerPath(route, staged)

    def _route(self, body: Body, wanted: list[Rect]) -> tuple[Route | None, str]:
        """The direct path, or why there is none."""
        if self._context.mode == "staged":
            return None, "our transfer_mode is staged"
        if not body.direct:
            return None, "its transfer_mode is staged"
        if differs := next(filter(None, map(why_not_direct, wanted)), ""):
            return None, differs
        try:
            return Route(wanted, _kind(body.regions), _kind(self._context.mine.regions)), ""
        except GeometryError as e:
            return None, str(e)

    def _staged(self, peer: Peer, body: Body, wanted: list[Rect]) -> tuple[StagedPath | None, str]:
        """The staged path, or why there is none."""
        context = self._context
        if context.mode == "direct":
            return None, "our transfer_mode is direct"
        if context.kernels is None or context.slots is None:
            return None, "we have no staging memory or no kernels for this device"
        if not body.staged:
            return None, "it does not stage: its transfer_mode is direct, or it is older"
        try:
            slot_bytes = min(context.slots.slot_bytes, body.slot_bytes or context.slots.slot_bytes)
            chunk_plan = ChunkPlan(wanted, slot_bytes, join=body.joins)
        except GeometryError as e:
            return None, str(e)
        return StagedPath(
            context.dialer, peer, chunk_plan, context.kernels, context.slots, context.clock
        ), ""


def _kind(regions: Sequence[Region]) -> MemoryKind:
    kinds = {MemoryKind(r.kind, r.device) for r in regions}
    if len(kinds) != 1:
        raise GeometryError(f"KV memory lies in {sorted(kinds)}, expected one kind and device")
    return kinds.pop()


class Remotes:
    """Remote engines by the addresses of their ranks.

    * Clients may choose the addresses, and so how many there are: one that no request needs goes
      after `IDLE_S`, and the one that was needed longest ago when there are `MAX_REMOTES`.
    * A step costs nothing for the remotes of which nothing has changed.
    """

    def __init__(self, context: ConsumerContext) -> None:
        self.context = context
        self._by_addresses: OrderedDict[tuple[Address, ...], Remote] = OrderedDict()  # by last use
        self._seen = -1  # of the dialer's changes
        self._idle_at = context.clock() + IDLE_S

    def of(self, source: Source) -> Remote:
        """The engine at the source's addresses; greets it unless that is under way or done."""
        key, lease = source.shards, LeaseRef(source.lease_id, source.request_id, source.wait_s)
        remote = self._by_addresses.get(key)
        if remote is not None:
            remote.tick()
        if remote is None or remote.state is PeerState.FAILED:
            remote = self._by_addresses[key] = Remote(key, self.context, lease)
            self._seen = -1
        else:
            remote.show(lease)
        self._by_addresses.move_to_end(key)
        remote.used_at = self.context.clock()
        if len(self._by_addresses) > MAX_REMOTES:
            unused = (key for key, one in self._by_addresses.items() if not one.fetches)
            if (oldest := next(unused, None)) is not None:
                self._drop(oldest)
        return remote

    def paths(self) -> dict[str, list[PeerPath | None]]:
        """How each rank of each engine is read, by the address of its first rank."""
        return {str(key[0]): remote.paths for key, remote in self._by_addresses.items()}

    def tick(self) -> None:
        """Advance those whose ranks may stand otherwise; forget the failed ones."""
        if self._seen != self.context.dialer.changes:
            self._seen = self.context.dialer.changes
            for key, remote in list(self._by_addresses.items()):
                with contained(f"remote engine at {remote.peers[0]}", remote.fail):
                    remote.tick()
                if remote.state is PeerState.FAILED:
                    del self._by_addresses[key]
                elif remote.is_outdated:
                    self._seen = -1  # until nothing uses it
        now = self.context.clock()
        if now >= self._idle_at:
            self._idle_at = now + IDLE_S / 10
            for key, remote in list(self._by_addresses.items()):
                if not remote.fetches and now >= remote.used_at + IDLE_S:
                    self._drop(key)

    def take_changed(self) -> list[Remote]:
        """Those that have become READY or FAILED since the last call."""
        taken = list(self.context.changed)
        self.context.changed.clear()
        return taken

    def look_again(self) -> None:
        """A remote is to be greeted anew."""
        self._seen = -1

    def _drop(self, key: tuple[Address, ...]) -> None:
        """Forget a remote, and hang up on those of its ranks that no other remote has."""
        dropped = self._by_addresses.pop(key)
        kept = {id(peer) for remote in self._by_addresses.values() for peer in remote.peers}
        dropped.fail("it was not needed for a while")
        for peer in dropped.peers:
            if id(peer) not in kept:
                self.context.dialer.hang_up(peer)
