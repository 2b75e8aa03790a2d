"""Carries out chained loads on one rank: peers and stores at once, and each other's fallback.

A load is pieces: blocks of one group that are had together. A peer's mover fetches them, a store
fills them; `kvconnect.chain.plan` says who gives which, and who takes over when one fails.

* The rank decides alone, by rates that it measured itself: a piece's bytes are the same from
  every source, so ranks need not agree.
* A peer has one fetch of a load at a time, under a name of its own; the load's lease stays open
  until all is there, and is then released, whether or not anything was fetched.
* Every fill of a load is answered once: by whoever carries it out, or declined at the load's end.
* A load ends once, when nothing touches its blocks any more, whatever became of its pieces.
* Not thread-safe: the engine's thread owns it. Moves no bytes and asks nobody: `Carriers` do.
"""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvconnect.chain.plan import Hop, Load, Rates, Source
from kvconnect.offload.jobs import Fill
from kvconnect.orders import Cancel, Fetch, Offer, Release

logger = logging.getLogger(f"vllm.{__name__}")

PEER_S = 1 / 2e9  # per byte, as stores' below: guesses, until the first loads were measured
STORES_S = {"host": 1 / 5e9, "disk": 1 / 1e9, "beside": 1 / 4e9}
TOKENS_FROM = {
    "host": "tokens_from_host",
    "disk": "tokens_from_disk",
    "beside": "tokens_from_beside",
    "peers": "tokens_from_peers",
}  # what is counted, by where they were loaded from


class Piece(NamedTuple):
    """Blocks of a group, to be filled, that are had together."""

    group: int
    blocks: tuple[tuple[int, int], ...]
    """(place in the request's block table, our block id)."""
    end_token: int
    """Who has the prompt up to here has the piece."""
    tokens: int
    """Of the prompt that the blocks stand for; 0 in all groups but one."""
    fill: Fill | None = None
    """Has a store fill it …"""
    store: str = ""
    """… from one of STORES_S."""


class ChainedLoad(NamedTuple):
    """What a request is to load, and who has it. Every rank gets the same."""

    request_id: str
    pieces: tuple[Piece, ...]
    offers: tuple[tuple[str, Offer], ...] = ()
    """Of peers, by the name of the tier that got each."""


class Abort(NamedTuple):
    """The request of a load has ended; so should the load."""

    request_id: str


class Ended(NamedTuple):
    """A load that has ended."""

    request_id: str
    lost: frozenset[int] = frozenset()
    """Ids of our blocks that nobody could fill."""
    from_start: bool = False
    """Whether the prompt's first block is one of them."""


class Carriers(Protocol):
    """Who moves the bytes. None of these returns anything or waits."""

    def tell(self, peer: str, order: Fetch | Cancel | Release) -> None:
        """An order for the mover of a tier of peers; `Chained.fetched` follows each Fetch."""

    def fill(self, fills: Sequence[Fill]) -> None:
        """Fills for the store; `Chained.filled` follows each."""

    def decline(self, fills: Sequence[Fill]) -> None:
        """Fills that are not wanted: answer them without carrying them out."""


@dataclass
class _Loading:
    order: ChainedLoad
    load: Load
    peers: dict[str, deque[Hop]]  # of each: its hop that runs, and those that wait for it
    unused: dict[int, Fill] = field(default_factory=dict)  # fills, by piece, not carried out yet
    aborted: bool = False


@dataclass
class _Going:
    """A hop under way."""

    loading: _Loading
    hop: Hop
    started_s: float
    fills: dict[int, int] = field(default_factory=dict)  # number → piece, not answered yet
    failed: set[int] = field(default_factory=set)  # pieces


class Chained:
    """See the module's contract."""

    def __init__(
        self,
        carriers: Carriers,
        peers: Iterable[str],
        block_bytes: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
        rates: Rates | None = None,
    ) -> None:
        """``block_bytes``: of each group, on this rank; ``clock``: that of who carries out."""
        self.counts: Counter[str] = Counter()
        """Tokens from each source, fallbacks, and pieces and tokens that nobody could give."""
        self._carriers = carriers
        self._rates = rates or Rates(STORES_S | dict.fromkeys(peers, PEER_S))
        self._block_bytes = block_bytes
        self._clock = clock
        self._names = itertools.count(1)
        self._loads: dict[str, _Loading] = {}
        self._fetches: dict[str, _Going] = {}  # name of the fetch → hop
        self._fills: dict[int, _Going] = {}  # number of the fill → hop
        self._ended: list[Ended] = []

    def begin(self, order: ChainedLoad) -> None:
        """Start a load."""
        load = Load(range(len(order.pieces)), self._sources(order))
        fills = {i: piece.fill for i, piece in enumerate(order.pieces) if piece.fill}
        loading = _Loading(order, load, {peer: deque() for peer, _ in order.offers}, fills)
        self._loads[order.request_id] = loading
        self._start(loading, load.start())
        self._end_if_done(loading)

    def abort(self, order: Abort) -> None:
        """Its request has ended: start nothing more of it, cut short what can be."""
        loading = self._loads.get(order.request_id)
        if loading is None or loading.aborted:
            return
        loading.aborted = True
        for waiting in loading.peers.values():
            while len(waiting) > 1:
                loading.load.ended(waiting.pop())
        for name, going in self._fetches.items():
            if going.loading is loading:
                self._carriers.tell(going.hop.source, Cancel(name))

    def fetched(self, name: str, error: str | None, ended_s: float) -> bool:
        """A fetch has ended, and touches nothing any more; False: it is not one of ours."""
        going = self._fetches.pop(name, None)
        if going is None:
            return False
        if error is not None:
            going.failed.update(going.hop.chunks)
        loading, source = going.loading, going.hop.source
        self._hop_ended(going, ended_s)
        loading.peers[source].popleft()
        self._next_fetch(loading, source)
        self._end_if_done(loading)
        return True

    def filled(self, number: int, error: str, ended_s: float) -> bool:
        """A fill was answered; False: it is not one of ours."""
        going = self._fills.pop(number, None)
        if going is None:
            return False
        piece = going.fills.pop(number)
        if error:
            going.failed.add(piece)
        if not going.fills:
            self._hop_ended(going, ended_s)
            self._end_if_done(going.loading)
        return True

    def take(self) -> list[Ended]:
        """Loads that have ended since the last call, each once."""
        ended, self._ended = self._ended, []
        return ended

    # -- inside --------------------------------------------------------------------------

    def _sources(self, order: ChainedLoad) -> list[Source]:
        """Who has which pieces, and what they cost."""
        has: dict[str, list[int]] = {peer: [] for peer, _ in order.offers}
        for number, piece in enumerate(order.pieces):
            if piece.fill is not None:
                has.setdefault(piece.store, []).append(number)
            for peer, offer in order.offers:
                if piece.end_token <= offer.tokens:
                    has[peer].append(number)
        mean = sum(map(self._nbytes, order.pieces)) // max(len(order.pieces), 1)
        return [
            Source(name, pieces, self._rates.start_s(name), self._rates.seconds(name, mean))
            for name, pieces in has.items()
        ]

    def _nbytes(self, piece: Piece) -> int:
        return len(piece.blocks) * self._block_bytes[piece.group]

    def _start(self, loading: _Loading, hops: Iterable[Hop]) -> None:
        for hop in hops:
            if hop.source in loading.peers:
                loading.peers[hop.source].append(hop)
                if len(loading.peers[hop.source]) == 1:
                    self._next_fetch(loading, hop.source)
            else:
                fills = {piece: loading.unused.pop(piece) for piece in hop.chunks}
                numbers = {fill.number: piece for piece, fill in fills.items()}
                going = _Going(loading, hop, self._clock(), numbers)
                self._fills |= dict.fromkeys(numbers, going)
                self._carriers.fill(list(fills.values()))

    def _next_fetch(self, loading: _Loading, peer: str) -> None:
        """Start the hop that waits for this peer, if one does."""
        if not loading.peers[peer]:
            return
        hop = loading.peers[peer][0]
        pieces = [loading.order.pieces[number] for number in hop.chunks]
        blocks = tuple(
            tuple(pair for piece in pieces if piece.group == group for pair in piece.blocks)
            for group in range(len(self._block_bytes))
        )
        offer = dict(loading.order.offers)[peer]
        name = f"{loading.order.request_id}#{next(self._names)}"
        self._fetches[name] = _Going(loading, hop, self._clock())
        fetch = Fetch(name, offer.source, blocks, offer.tokens, offer.digest)
        self._carriers.tell(peer, fetch)

    def _hop_ended(self, going: _Going, ended_s: float) -> None:
        loading, hop = going.loading, going.hop
        good = [loading.order.pieces[n] for n in hop.chunks if n not in going.failed]
        if loading.aborted:  # what ended so, was perhaps cut short
            loading.load.ended(hop)
            return
        self.counts[TOKENS_FROM[self._kind(hop.source)]] += sum(p.tokens for p in good)
        if not going.failed:
            nbytes = sum(map(self._nbytes, good))
            self._rates.measured(hop.source, nbytes, ended_s - going.started_s)
        self._start(loading, loading.load.ended(hop, going.failed))

    def _kind(self, source: str) -> str:
        return source if source in STORES_S else "peers"

    def _end_if_done(self, loading: _Loading) -> None:
        order, load = loading.order, loading.load
        if load.running:
            return
        del self._loads[order.request_id]
        self._carriers.decline(list(loading.unused.values()))
        for peer, offer in order.offers:
            self._carriers.tell(peer, Release(order.request_id, offer.source))
        lost = [pair for n in load.failed for pair in order.pieces[n].blocks]
        from_start = any(place == 0 for place, _ in lost)
        self._ended.append(
            Ended(order.request_id, frozenset(block for _, block in lost), from_start)
        )
        self._tell(order, load)

    def _tell(self, order: ChainedLoad, load: Load) -> None:
        """What went wrong, in one line of the log."""
        self.counts["fallbacks"] += len(load.fell_back)
        self.counts["pieces_failed"] += len(load.failed)
        self.counts["tokens_lost"] += sum(order.pieces[n].tokens for n in load.failed)
        if not (load.fell_back or load.failed):
            return
        stood_in = Counter(
            (hop.source, other.source) for hop, other in load.fell_back for _ in other.chunks
        )
        parts = [f"{n} from {new} that {old} failed" for (old, new), n in stood_in.items()]
        if load.failed:
            parts.append(f"{len(load.failed)} that nobody could give, to be computed again")
        pieces = len(order.pieces)
        logger.warning("request %s: of %d chunks %s", order.request_id, pieces, ", ".join(parts))
