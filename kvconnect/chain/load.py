"""Carries out chained loads on one rank: peers and stores at once, and each other's fallback.

A load consists of units: blocks of one group that cross together. A peer's mover fetches them, a
store fills them; `kvconnect.chain.plan` says which source gives which, and which takes over when
one fails.

* Each rank decides alone, by rates that it measured itself: a unit's bytes are the same from every
  source, so ranks need not agree.
* A peer has one fetch of a load at a time, under a name of its own; the load's lease stays open
  until all is there, and is then released, whether or not anything was fetched.
* Every fill of a load is answered once: the store carries it out, or it is declined at the load's
  end.
* A load ends once, when nothing touches its blocks any more, whatever became of its units.
* Not thread-safe: the engine's thread owns it. Moves no bytes itself: `Carriers` do.
"""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvconnect.chain.plan import Hop, LoadPlan, Rates, SourceRate
from kvconnect.offload.jobs import Fill
from kvconnect.orders import Cancel, Fetch, Offer, Release
from kvconnect.stats import PeerRead
from kvconnect.telemetry.failed_loads import log_failed_load

logger = logging.getLogger(f"vllm.{__name__}")

REMEDY = (
    "`kvconnect doctor --peer HOST:PORT` looks at a peer, vllm:kvconnect_offload_* at what is "
    "stored; kv_load_failure_policy recompute computes what is lost"
)
PEER_S = 1 / 2e9  # per byte, as stores' below: guesses, until the first loads were measured
STORES_S = {"host": 1 / 5e9, "disk": 1 / 1e9, "beside": 1 / 4e9}
TOKENS_FROM = {
    "host": "tokens_from_host",
    "disk": "tokens_from_disk",
    "beside": "tokens_from_beside",
    "peers": "tokens_from_peers",
}  # what is counted, by where they were loaded from


class LoadUnit(NamedTuple):
    """Blocks of a group, to be filled, that come from one source: a store's chunk, or a block."""

    group: int
    blocks: tuple[tuple[int, int], ...]
    """(place in the request's block table, our block id)."""
    end_token: int
    """A peer whose offer covers this token has the unit."""
    tokens: int
    """How many tokens of the prompt the blocks stand for; 0 in all groups but one."""
    fill: Fill | None = None
    """Makes a store fill it."""
    store: str = ""
    """Which of STORES_S that store is."""


class ChainedLoad(NamedTuple):
    """What a request is to load, and which sources have it. Every rank gets the same."""

    request_id: str
    units: tuple[LoadUnit, ...]
    offers: tuple[tuple[str, Offer], ...] = ()
    """Offers of peers, by the label of the connector that got each."""
    trace_headers: tuple[tuple[str, str], ...] = ()
    """What tells the request's trace; without them it has none."""
    needed_from: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """As in `kvconnect.orders.Fetch`, by the labels of peers of which not every token is needed."""


class CancelLoad(NamedTuple):
    """The request of a load has ended; so should the load."""

    request_id: str


def request_of(fetch: str) -> str:
    """The request of whose load a fetch is a part, by the fetch's name."""
    return fetch.rpartition("#")[0]


class LoadDone(NamedTuple):
    """A load has ended."""

    request_id: str
    lost: frozenset[int] = frozenset()
    """Ids of our blocks that no source could fill."""
    from_start: bool = False
    """Whether the prompt's first block is one of them."""


class Carriers(Protocol):
    """What moves the bytes. None of these returns anything or waits."""

    def ask(self, peer: str, order: Fetch | Cancel | Release) -> None:
        """An order for a peer's mover; `ChainLoader.fetched` follows each Fetch."""

    def fill(self, fills: Sequence[Fill]) -> None:
        """Fills for the store; `ChainLoader.filled` follows each."""

    def decline(self, fills: Sequence[Fill]) -> None:
        """Fills that are not wanted: answer them without carrying them out."""


@dataclass
class _Loading:
    order: ChainedLoad
    plan: LoadPlan
    peers: dict[str, deque[Hop]]  # of each: its hop that runs, and those that wait for it
    unused: dict[int, Fill] = field(default_factory=dict)  # fills, by unit, not carried out yet
    aborted: bool = False
    problems: dict[str, str] = field(default_factory=dict)
    """Why a source failed, by its name; of many reasons the first."""


@dataclass
class _RunningHop:
    """A hop under way."""

    loading: _Loading
    hop: Hop
    started_s: float
    fills: dict[int, int] = field(default_factory=dict)  # number → unit, not answered yet
    failed: set[int] = field(default_factory=set)  # units


class ChainLoader:
    """All chained loads of one rank; the module says what it promises."""

    def __init__(
        self,
        carriers: Carriers,
        peers: Iterable[str],
        block_bytes: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
        rates: Rates | None = None,
    ) -> None:
        """``block_bytes``: bytes of a block of each group on this rank. ``clock`` must be the one
        that stamps ``ended_s``: the movers'.
        """
        self.counts: Counter[str] = Counter()
        """Tokens from each source, fallbacks, and units and tokens that nobody could give."""
        self.fill_reads: list[PeerRead] = []
        """What stores filled, until somebody takes it; their ``path`` is the store's name."""
        self._carriers = carriers
        self._rates = rates or Rates(STORES_S | dict.fromkeys(peers, PEER_S))
        self._block_bytes = block_bytes
        self._clock = clock
        self._names = itertools.count(1)
        self._loads: dict[str, _Loading] = {}
        self._fetches: dict[str, _RunningHop] = {}  # name of the fetch → hop
        self._fills: dict[int, _RunningHop] = {}  # number of the fill → hop
        self._ended: list[LoadDone] = []

    def load(self, order: ChainedLoad) -> None:
        """Start a load."""
        plan = LoadPlan(range(len(order.units)), self._sources(order))
        fills = {i: unit.fill for i, unit in enumerate(order.units) if unit.fill}
        loading = _Loading(order, plan, {peer: deque() for peer, _ in order.offers}, fills)
        self._loads[order.request_id] = loading
        self._start(loading, plan.start())
        self._end_if_done(loading)

    def cancel(self, order: CancelLoad) -> None:
        """Its request has ended: start nothing more of it, cut short what can be."""
        loading = self._loads.get(order.request_id)
        if loading is None or loading.aborted:
            return
        loading.aborted = True
        for waiting in loading.peers.values():
            while len(waiting) > 1:
                loading.plan.ended(waiting.pop())
        for name, going in self._fetches.items():
            if going.loading is loading:
                self._carriers.ask(going.hop.source, Cancel(name))

    def fetched(self, name: str, error: str | None, ended_s: float) -> bool:
        """A fetch has ended, and touches nothing any more; False: it is not one of ours."""
        going = self._fetches.pop(name, None)
        if going is None:
            return False
        if error is not None:
            going.failed.update(going.hop.chunks)
            going.loading.problems.setdefault(going.hop.source, error)
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
        unit = going.fills.pop(number)
        if error:
            going.failed.add(unit)
            going.loading.problems.setdefault(going.hop.source, error)
        if not going.fills:
            self._hop_ended(going, ended_s)
            self._end_if_done(going.loading)
        return True

    def take(self) -> list[LoadDone]:
        """Loads that have ended since the last call, each once."""
        ended, self._ended = self._ended, []
        return ended

    # -- inside --------------------------------------------------------------------------

    def _sources(self, order: ChainedLoad) -> list[SourceRate]:
        """Who has which units, and what they cost."""
        has: dict[str, list[int]] = {peer: [] for peer, _ in order.offers}
        for number, unit in enumerate(order.units):
            if unit.fill is not None:
                has.setdefault(unit.store, []).append(number)
            for peer, offer in order.offers:
                if unit.end_token <= offer.tokens:
                    has[peer].append(number)
        mean = sum(map(self._nbytes, order.units)) // max(len(order.units), 1)
        return [
            SourceRate(name, units, self._rates.start_s(name), self._rates.seconds(name, mean))
            for name, units in has.items()
        ]

    def _nbytes(self, unit: LoadUnit) -> int:
        return len(unit.blocks) * self._block_bytes[unit.group]

    def _start(self, loading: _Loading, hops: Iterable[Hop]) -> None:
        for hop in hops:
            if hop.source in loading.peers:
                loading.peers[hop.source].append(hop)
                if len(loading.peers[hop.source]) == 1:
                    self._next_fetch(loading, hop.source)
            else:
                fills = {unit: loading.unused.pop(unit) for unit in hop.chunks}
                numbers = {fill.number: unit for unit, fill in fills.items()}
                going = _RunningHop(loading, hop, self._clock(), numbers)
                self._fills |= dict.fromkeys(numbers, going)
                self._carriers.fill(list(fills.values()))

    def _next_fetch(self, loading: _Loading, peer: str) -> None:
        """Start the hop that waits for this peer, if one does."""
        if not loading.peers[peer]:
            return
        hop = loading.peers[peer][0]
        units = [loading.order.units[number] for number in hop.chunks]
        blocks = tuple(
            tuple(pair for unit in units if unit.group == group for pair in unit.blocks)
            for group in range(len(self._block_bytes))
        )
        offer = dict(loading.order.offers)[peer]
        needed_from = dict(loading.order.needed_from).get(peer, ())
        name = f"{loading.order.request_id}#{next(self._names)}"
        self._fetches[name] = _RunningHop(loading, hop, self._clock())
        source, tokens, digest = offer.source, offer.tokens, offer.digest
        fetch = Fetch(name, source, blocks, tokens, digest, needed_from, chained=True)
        self._carriers.ask(peer, fetch)

    def _hop_ended(self, going: _RunningHop, ended_s: float) -> None:
        loading, hop = going.loading, going.hop
        good = [loading.order.units[n] for n in hop.chunks if n not in going.failed]
        if loading.aborted:  # what ended so, was perhaps cut short
            loading.plan.ended(hop)
            return
        self.counts[TOKENS_FROM[self._kind(hop.source)]] += sum(p.tokens for p in good)
        nbytes = sum(map(self._nbytes, good))
        if good and hop.source in STORES_S:
            of, began_s = loading.order.request_id, going.started_s
            self.fill_reads.append(PeerRead(of, hop.source, "", nbytes, began_s, ended_s))
        offer = dict(loading.order.offers).get(hop.source)
        early = offer is not None and offer.source.wait_s > 0  # it was computed meanwhile
        if not (going.failed or early):
            self._rates.measured(hop.source, nbytes, ended_s - going.started_s)
        self._start(loading, loading.plan.ended(hop, going.failed))

    def _kind(self, source: str) -> str:
        return source if source in STORES_S else "peers"

    def _end_if_done(self, loading: _Loading) -> None:
        order, plan = loading.order, loading.plan
        if plan.running:
            return
        del self._loads[order.request_id]
        self._carriers.decline(list(loading.unused.values()))
        for peer, offer in order.offers:
            self._carriers.ask(peer, Release(order.request_id, offer.source))
        lost = [pair for n in plan.failed for pair in order.units[n].blocks]
        from_start = any(place == 0 for place, _ in lost)
        self._ended.append(
            LoadDone(order.request_id, frozenset(block for _, block in lost), from_start)
        )
        self._log(loading)

    def _log(self, loading: _Loading) -> None:
        """What went wrong and why, in one line of the log."""
        order, plan = loading.order, loading.plan
        self.counts["fallbacks"] += len(plan.fell_back)
        self.counts["pieces_failed"] += len(plan.failed)
        self.counts["tokens_lost"] += sum(order.units[n].tokens for n in plan.failed)
        if not (plan.fell_back or plan.failed) or loading.aborted:
            return
        stood_in = Counter(
            (hop.source, other.source) for hop, other in plan.fell_back for _ in other.chunks
        )
        parts = [f"{n} from {new} that {old} failed" for (old, new), n in stood_in.items()]
        if plan.failed:
            parts.append(f"{len(plan.failed)} that nobody could give")
        reasons = "; ".join(f"{source}: {why}" for source, why in loading.problems.items())
        told = f"of {len(order.units)} chunks {', '.join(parts)} ({reasons})"
        if plan.failed:
            firsts = [one.source.shards[:1] for _, one in order.offers]
            peers = ",".join(str(rank) for ranks in firsts for rank in ranks) or "none"
            log_failed_load(order.request_id, told, peers, "chain", "sources", REMEDY)
        else:
            logger.warning("request %s: %s", order.request_id, told)
