"""What an engine says of itself to a peer, and how two engines would be paired.

Greets as any peer does, asks for nothing else and hangs up: no lease is opened, no memory is
reached, and what the engine keeps of the greeting is bounded there (`kvconnect.control.listener`).
An engine says it to those who know its secret. One that has no secret cannot be inspected.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from kvconnect.control.channel import ZmqChannel
from kvconnect.control.dialer import NO_LEASE, Dialer
from kvconnect.control.peer import Peer, PeerState
from kvconnect.control.wire import Address, Body
from kvconnect.errors import GeometryError, KvConnectError
from kvconnect.geometry.blocks import DENSE, BlockView, Part
from kvconnect.geometry.chunks import ChunkPlan
from kvconnect.geometry.intersect import Rect, assign, joined, why_not_direct
from kvconnect.geometry.rows import Memory, Route
from kvconnect.staging import MOST_SLOT_BYTES

LOOK_S = 0.05


class InspectError(KvConnectError):
    """An engine could not be greeted."""


@dataclass(frozen=True)
class Layers:
    """Layers of one rank that differ in nothing but their place."""

    first: str
    last: str
    count: int
    group: int
    blocks: int
    block_tokens: int
    heads: str
    """``first..last of total``."""
    dtype: str
    layout: str
    """Axes, outermost first: Block, Head, N (token), Content; or a packing's name."""
    parts: tuple[str, ...]


@dataclass(frozen=True)
class InspectedRank:
    """One rank of an engine."""

    address: str
    incarnation: str
    memory: str
    memory_bytes: int
    layers: tuple[Layers, ...]


@dataclass(frozen=True)
class InspectedEngine:
    """All that an engine says of itself."""

    address: str
    wire_version: str
    fingerprint: dict[str, str]
    versions: dict[str, str]
    transport: str
    direct: bool
    staged: bool
    ranks: tuple[InspectedRank, ...]
    bodies: tuple[Body, ...] = field(repr=False)
    """As they came; not for people."""


@dataclass(frozen=True)
class PairPath:
    """Whether one of the two paths is open, and if not why."""

    works: bool
    why_not: str = ""
    detail: str = ""


@dataclass(frozen=True)
class EnginePair:
    """How the second engine would read from the first."""

    differences: tuple[str, ...]
    """Why they refuse each other at the greeting; none if they do not."""
    direct: PairPath
    staged: PairPath
    reads: tuple[str, ...]
    """Which rank reads from which."""

    @property
    def works(self) -> bool:
        """Whether any KV could be handed over."""
        return not self.differences and (self.direct.works or self.staged.works)


class Greeting:
    """Engines greeted over links that stay until the end of this context."""

    def __init__(self, secret: bytes, timeout_s: float) -> None:
        self._channel = ZmqChannel("127.0.0.1")  # nobody is meant to dial it
        self.dialer = Dialer(self._channel, time.monotonic, None, secret, timeout_s)
        self.peers: list[Peer] = []
        """The ranks of the last engine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def engine(self, address: Address) -> InspectedEngine:
        """The engine that has a rank at ``address``; raises InspectError."""
        (first,) = self.peers = self._greeted([address])
        assert first.body is not None
        known = first.body.shards or (address,)
        if len(known) > 1:
            self.peers = self._greeted(known)
        bodies = tuple(peer.body for peer in self.peers if peer.body)
        return InspectedEngine(
            address=str(address),
            wire_version=".".join(map(str, first.version or ())),
            fingerprint=dict(first.fingerprint),
            versions=dict(first.body.versions),
            transport=first.body.transport,
            direct=all(body.direct for body in bodies),
            staged=all(body.staged for body in bodies),
            ranks=tuple(_rank(p.at, b) for p, b in zip(self.peers, bodies, strict=True)),
            bodies=bodies,
        )

    def step(self) -> None:
        """Take in what arrives, waiting shortly for it."""
        for frame in self._channel.poll(LOOK_S):
            if frame.link.dialled:
                self.dialer.receive(frame)
        self.dialer.tick()

    def _greeted(self, addresses: Sequence[Address]) -> list[Peer]:
        peers = [self.dialer.greet(address) for address in addresses]
        while any(peer.state is PeerState.GREETING for peer in peers):
            self.step()
        if failed := next((peer for peer in peers if peer.state is PeerState.FAILED), None):
            why = (
                failed.error
                if failed.error != NO_LEASE
                else (
                    "tells a stranger nothing; give it a secret, as auth_secret_file, and us the "
                    "same: `inspect --secret`, `doctor --config`, or KVCONNECT_AUTH_SECRET"
                )
            )
            raise InspectError(f"{failed}: {why}")
        return peers


def greet(address: Address, secret: bytes, timeout_s: float) -> InspectedEngine:
    """The engine that has a rank at ``address``; raises InspectError."""
    with Greeting(secret, timeout_s) as greeting:
        return greeting.engine(address)


def _rank(address: Address, body: Body) -> InspectedRank:
    # of a direct path's regions; a rank that is only staged shows none
    kinds = sorted({f"{r.kind} {r.device}" for r in body.regions})
    layers = []
    for facts, same in itertools.groupby(map(_layers, body.views), key=_aside_from_place):
        alike = list(same)
        layers.append(replace(facts, first=alike[0].first, last=alike[-1].last, count=len(alike)))
    nbytes = sum(r.nbytes for r in body.regions)
    return InspectedRank(str(address), body.incarnation, ", ".join(kinds), nbytes, tuple(layers))


def _layers(view: BlockView) -> Layers:
    held, layout = view.heads, view.layout
    if layout == DENSE:
        whole = joined(view)
        layout = " + ".join(
            dict.fromkeys(_order(view, part) for part in ((whole,) if whole else view.parts))
        )
    return Layers(
        first=view.layer,
        last=view.layer,
        count=1,
        group=view.group,
        blocks=view.num_blocks,
        block_tokens=view.block_tokens,
        heads=f"{held.first}..{held.first + held.count - 1} of {held.total}",
        dtype=view.dtype,
        layout=layout,
        parts=tuple(f"{part.name} {part.shape[2]}{_scaled(part)}" for part in view.parts),
    )


def _aside_from_place(layers: Layers) -> Layers:
    return replace(layers, first="", last="", count=0)


def _scaled(part: Part) -> str:
    return "" if part.scale == 1 else f" × {part.scale:g}"


def _order(view: BlockView, part: Part) -> str:
    extents = (view.num_blocks, *part.shape)
    axes = sorted(range(4), key=lambda i: (-part.strides[i], extents[i]))
    tiled = [
        f"{name} in tiles of {tile.cells}"
        for name, tile in zip("NC", part.tiles, strict=True)
        if tile.cells
    ]
    return ", ".join(["".join("BHNC"[i] for i in axes), *tiled])


# -- two engines ------------------------------------------------------------------------------


def pair(source: InspectedEngine, target: InspectedEngine) -> EnginePair:
    """How ``target`` would read what ``source`` prefilled, as its movers decide it."""
    ours, theirs = target.fingerprint, source.fingerprint
    differences = tuple(
        f"{key}: {theirs.get(key)!r} and {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )
    views = [body.views for body in source.bodies]
    try:
        rects = [assign(body.views, views, i) for i, body in enumerate(target.bodies)]
    except GeometryError as e:
        return EnginePair(differences, PairPath(False, str(e)), PairPath(False, str(e)), ())
    links = [
        _InspectedLink(source, s, target, t, found)
        for t, wanted in enumerate(rects)
        for s, found in enumerate(wanted)
        if found
    ]
    return EnginePair(
        differences,
        _all([link.direct() for link in links]),
        _all([link.staged() for link in links]),
        tuple(map(str, links)),
    )


@dataclass(frozen=True)
class _InspectedLink:
    source: InspectedEngine
    source_rank: int
    target: InspectedEngine
    target_rank: int
    rects: list[Rect]

    def __str__(self) -> str:
        layers = len({rect.dst.layer for rect in self.rects})
        target, source = self.target.ranks[self.target_rank], self.source.ranks[self.source_rank]
        return f"{target.address} from {source.address}: {layers} layers"

    def direct(self) -> PairPath:
        for engine in (self.source, self.target):
            if not engine.direct:
                return PairPath(False, f"transfer_mode of {engine.address} is staged")
        if self.source.transport != self.target.transport:
            both = f"{self.source.transport} and {self.target.transport}"
            return PairPath(False, f"transports differ: {both}; set the same on both engines")
        if why := next(filter(None, map(why_not_direct, self.rects)), ""):
            return PairPath(False, why)
        memory = Memory("DRAM", 0)  # whichever it is, rows are the same
        try:
            sizes = Route(self.rects, memory, memory).dst.rows[:, 1]
        except GeometryError as e:
            return PairPath(False, str(e))
        return PairPath(True, "", f"{len(sizes)} rows a block, of {_sizes(sizes.tolist())}")

    def staged(self) -> PairPath:
        for engine in (self.source, self.target):
            if not engine.staged:
                return PairPath(
                    False,
                    f"{engine.address} does not stage; set its transfer_mode to auto or staged",
                )
        if self.source.transport != self.target.transport:
            both = f"{self.source.transport} and {self.target.transport}"
            return PairPath(False, f"transports differ: {both}; set the same on both engines")
        join = self.source.bodies[self.source_rank].joins
        try:
            plan = ChunkPlan(self.rects, MOST_SLOT_BYTES, join=join)
        except GeometryError as e:
            return PairPath(False, str(e))
        return PairPath(True, "", f"{len(plan.slices)} head slices a token")


def _all(paths: Sequence[PairPath]) -> PairPath:
    """One path for all ranks: open where it is open for each."""
    shut = next((path for path in paths if not path.works), None)
    details = dict.fromkeys(path.detail for path in paths)
    return shut or PairPath(True, "", "; ".join(details))


def _sizes(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,} bytes" if low == high else f"{low:,} to {high:,} bytes"
