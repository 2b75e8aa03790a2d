"""Both halves of a chain: connectors of ours that load together, from where vLLM calls them.

Which of them has what is asked when vLLM asks; which gives what each rank decides by itself, see
`kvconnect.chain.load`. They save, lend and count as if they were alone.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvconnect.chain.load import CancelLoad, ChainedLoad, ChainLoader, LoadUnit, request_of
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.jobs import Fill
from kvconnect.orders import Cancel, Fetch, Offer, Release
from kvconnect.stats import PeerRead
from kvconnect.telemetry.handovers import HandOverTraces
from kvconnect.vllm import _compat
from kvconnect.vllm.engine import this_rank
from kvconnect.vllm.offload.messages import WantedChunk
from kvconnect.vllm.offload.scheduler import OffloadScheduler
from kvconnect.vllm.offload.worker import OffloadWorker
from kvconnect.vllm.scheduler import Scheduler
from kvconnect.vllm.worker import Worker


class ChainScheduler:
    """One per engine. ``peers`` by label. A unit is a chunk of the store, or else a block."""

    def __init__(
        self, kv_cache_config: Any, peers: Mapping[str, Scheduler], store: OffloadScheduler | None
    ) -> None:
        self._peers = peers
        self._store = store
        self._groups = _compat.transfer_group_ids(kv_cache_config)
        self._block_tokens = [
            kv_cache_config.kv_cache_groups[g].kv_cache_spec.block_size for g in self._groups
        ]
        self._chunk_blocks = (
            [config.chunk_blocks for config in store.group_configs]
            if store
            else [1] * len(self._groups)
        )
        self._local: dict[str, int] = {}  # tokens cached here, as vLLM last said
        self._sources: dict[str, Counter[Any]] = {}  # of the load that is under way
        self._orders: list[ChainedLoad | CancelLoad] = []

    def get_num_new_matched_tokens(self, request: Any, local_tokens: int) -> int | None:
        """Tokens to load beyond those cached here, from all together; None: ask again later."""
        offered = stored = 0
        for peer in self._peers.values():
            peer.cached(request, local_tokens)
            if (tokens := peer.get_num_new_matched_tokens(request, 0)) is None:
                return None
            offered = max(offered, tokens)
        if self._store:
            if (
                tokens := self._store.get_num_new_matched_tokens(request, local_tokens, offered)
            ) is None:
                return None
            stored = tokens
        self._local[request.request_id] = local_tokens
        return max(offered - local_tokens, stored, 0)

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """Blocks were allocated, of which ``tokens`` are to be loaded."""
        if not tokens:
            for peer in self._peers.values():
                peer.update_state_after_alloc(request, blocks, 0)
            return
        request_id = request.request_id
        end = self._local.pop(request_id) + tokens
        units = self._units(request, blocks, end)
        filled = tuple(
            tuple(pair for unit in units if unit.group == group for pair in unit.blocks)
            for group in range(len(self._groups))
        )
        offers: list[tuple[str, Offer]] = []
        needed_from: list[tuple[str, tuple[int, ...]]] = []
        for label, peer in self._peers.items():
            if (offer := peer.take_offer(request)) is not None:
                offers.append((label, offer))
                if first := peer.needed_from(request_id, filled, offer):
                    needed_from.append((label, first))
                    if self._store:
                        self._store.stores_from(request_id, first)
        traced = tuple((getattr(request, "trace_headers", None) or {}).items())
        load = ChainedLoad(request_id, units, tuple(offers), traced, tuple(needed_from))
        self._orders.append(load)
        stored = sum(unit.tokens for unit in units if unit.fill)
        self._sources[request_id] = Counter({_compat.HOST_HIT_SOURCE: min(stored, tokens)})
        self._sources[request_id][_compat.CACHE_HIT_SOURCE] += tokens - min(stored, tokens)

    def get_external_cache_hit_sources(self, request_id: str, tokens: int) -> dict[Any, int]:
        """How many tokens of a load a store has, and how many only a peer."""
        found = self._sources.get(request_id, Counter())
        if found.total() != tokens:
            return {_compat.CACHE_HIT_SOURCE: tokens} if tokens else {}
        return {source: count for source, count in found.items() if count}

    def update_connector_output(self, request_ids: Iterable[str]) -> None:
        """All ranks ended these loads."""
        for request_id in request_ids:
            self._sources.pop(request_id, None)

    def request_finished(self, request_id: str) -> None:
        """The request ended, whatever became of its load."""
        self._local.pop(request_id, None)
        if self._sources.pop(request_id, None) is not None:
            self._orders.append(CancelLoad(request_id))

    def take_orders(self) -> list[ChainedLoad | CancelLoad]:
        """For every rank, since the last call."""
        taken, self._orders = self._orders, []
        return taken

    def _units(self, request: Any, blocks: Any, end: int) -> tuple[LoadUnit, ...]:
        """What the request is to fill to go on at token ``end``, and the spares of the store."""
        wanted, units = [], []
        for group, (group_id, each) in enumerate(
            zip(self._groups, self._block_tokens, strict=True)
        ):
            table, size = blocks.blocks[group_id][: -(-end // each)], self._chunk_blocks[group]
            for first in range(0, len(table), size):
                ours = {
                    place: block.block_id
                    for place, block in enumerate(table[first : first + size], first)
                    if block.block_hash is None and not block.is_null
                }
                if not ours:
                    continue
                ids = tuple(ours.get(place, NO_BLOCK) for place in range(first, first + size))
                wanted.append(WantedChunk(group, first // size, ids))
                last = min((max(ours) + 1) * each, end)
                units.append(LoadUnit(group, tuple(ours.items()), last, last - min(ours) * each))
        units = _counted_once(units)
        if not self._store:
            return tuple(units)
        spares = self._store.spares(request, wanted)
        return tuple(
            unit._replace(fill=fill, store=store)
            for unit, (fill, store) in zip(units, spares, strict=True)
        )


class Results(NamedTuple):
    """Requests that some peer has sent, once for each; whose load ended; of those, who got nothing
    that is of use."""

    sent: list[str]
    received: set[str]
    failed: set[str]


class ChainWorker:
    """One per rank; the `Carriers` of its `ChainLoader`."""

    def __init__(
        self, kv_cache_config: Any, peers: Mapping[str, Worker], store: OffloadWorker | None
    ) -> None:
        self._kv_cache_config = kv_cache_config
        self._peers = peers
        self._store = store
        groups = kv_cache_config.kv_cache_groups
        transferred = _compat.transfer_group_ids(kv_cache_config)
        sizes = [_compat.block_bytes(groups[g]) for g in transferred]
        self._chained = ChainLoader(self, peers, sizes)
        self.traces = HandOverTraces()
        for worker in peers.values():
            worker.on_read.append(self._read)
        self._rank = 0  # known once the caches are registered
        self.counts_tokens = False
        """Whether this is the first rank: tokens are the same on all, and counted there alone."""
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        self._lost: set[int] = set()

    def register_kv_caches(self) -> None:
        """The children have registered the caches."""
        self._rank = this_rank().index
        self.counts_tokens = self._rank == 0

    def put(self, orders: Sequence[ChainedLoad | CancelLoad]) -> None:
        """A step's orders, after the children's own."""
        for order in orders:
            if isinstance(order, CancelLoad):
                self._chained.cancel(order)
            else:
                if order.trace_headers:
                    self.traces.ordered({order.request_id: dict(order.trace_headers)})
                self._chained.load(order)

    def take(self) -> Results:
        """What has ended since the last call."""
        results = Results([], set(), set())
        self._end(results, time.monotonic())  # those that had nothing to wait for
        for worker in self._peers.values():
            outcome, _ = worker.take()
            results.sent.extend(outcome.sent)
            for name in outcome.received:
                self._chained.fetched(name, outcome.failed.get(name), outcome.ended_s[name])
                self._end(results, outcome.ended_s[name])
        if self._store:
            self._store.collect()
            for answer, ended_s in self._store.answered:
                self._chained.filled(answer.id, answer.error, ended_s)
                self._end(results, ended_s)
        for read in self._chained.fill_reads:
            self.traces.read(read)
        self._chained.fill_reads.clear()
        return results

    def _end(self, results: Results, ended_s: float) -> None:
        """Take note of the loads that have ended at that time."""
        for ended in self._chained.take():
            request_id, lost = ended.request_id, len(ended.lost)
            results.received.add(request_id)
            # vLLM keeps what lies before lost blocks, of one group and if anything does
            if ended.from_start or (ended.lost and not self._one_group):
                results.failed.add(request_id)
            else:
                self._lost |= ended.lost
            why = {request_id: f"{lost} blocks that no source could give"} if lost else {}
            self.traces.ended({request_id: ended_s}, why)

    def _read(self, read: PeerRead) -> None:
        """A peer's read for one of our fetches has ended."""
        self.traces.read(read._replace(request_id=request_of(read.request_id)))

    def take_lost(self) -> set[int]:
        """Ids of blocks that nobody could fill, of loads that have not failed altogether."""
        lost, self._lost = self._lost, set()
        return lost

    def take_counts(self) -> dict[str, int] | None:
        """What was counted since the last call; tokens by the first rank alone.

        After the children's stats: spans of loads that have ended are written here.
        """
        self.traces.write(self._rank)
        counts, self._chained.counts = self._chained.counts, Counter()
        kept = {n: c for n, c in counts.items() if c and (self.counts_tokens or "tokens" not in n)}
        return kept or None

    # -- Carriers ------------------------------------------------------------------------

    def ask(self, peer: str, order: Fetch | Cancel | Release) -> None:
        """See `kvconnect.chain.load.Carriers`."""
        self._peers[peer].put([order])

    def fill(self, fills: Sequence[Fill]) -> None:
        """See `kvconnect.chain.load.Carriers`."""
        assert self._store is not None
        self._store.fill(fills)

    def decline(self, fills: Sequence[Fill]) -> None:
        """See `kvconnect.chain.load.Carriers`."""
        if self._store is not None:
            self._store.decline(fills)


def _counted_once(units: list[LoadUnit]) -> list[LoadUnit]:
    """Tokens of the group that is to get most of them: a sliding window's get only the last."""
    of_group: Counter[int] = Counter()
    for unit in units:
        of_group[unit.group] += unit.tokens
    [(most, _)] = of_group.most_common(1) or [(0, 0)]
    return [p if p.group == most else p._replace(tokens=0) for p in units]
