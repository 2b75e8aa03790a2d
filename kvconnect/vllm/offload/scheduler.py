"""The scheduler's half of the offloading connector: vLLM's requests → `OffloadTier` → jobs.

* No delayed frees: blocks that are being saved are referenced in the block pool until all ranks
  have answered, whatever becomes of their request.
* A load that fails, in whole or in part, is computed again and not tried again.
* Until all ranks have said what they can hold it answers "nothing" to everything.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.cache import CacheTier
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.eviction import Key, make
from kvconnect.offload.hits import hit_tokens, needed
from kvconnect.offload.jobs import Fill, Forget, Save
from kvconnect.offload.keys import ChunkKeys
from kvconnect.offload.tiers import Effects, KeyedChunk, OffloadTier, Writes, common
from kvconnect.vllm.adapter_reports import scheduler_adapters
from kvconnect.vllm.offload.hashing import hash_seed, hash_tokens, volatile_tokens
from kvconnect.vllm.offload.identity import GroupOffloadConfig, group_configs, identity
from kvconnect.vllm.offload.messages import (
    Loading,
    StepJobs,
    StoreHandshake,
    WantedChunk,
    WorkerResults,
)
from kvconnect.vllm.offload.request_chunks import RequestChunks

if TYPE_CHECKING:
    from kvconnect.vllm.offload.events import Events

logger = logging.getLogger(f"vllm.{__name__}")

TOKENS_FROM = {source: f"tokens_from_{source}" for source in ("host", "disk", "beside")}


class OffloadScheduler:
    """One per engine. Not thread-safe: vLLM's scheduler calls it."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: OffloadConfig) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self.group_configs = group_configs(kv_cache_config, config)
        self._groups = [config.group for config in self.group_configs]
        self._hash_tokens = hash_tokens(vllm_config, kv_cache_config)
        self._volatile = volatile_tokens(vllm_config)
        self._events = _events(vllm_config, kv_cache_config, self.group_configs, self._hash_tokens)
        self._chunk_keys: ChunkKeys | None = None
        self._tier: OffloadTier | None = None
        self._ranks = 1
        self._pool: Any = None
        self._adapters = scheduler_adapters(vllm_config)
        self._requests: dict[str, RequestChunks] = {}
        self._held: dict[int, tuple[Key, list[Any]]] = {}  # number of a save → blocks of the pool
        self._answers: dict[int, tuple[int, int]] = {}  # so far: ranks, failures
        self._declined: Counter[int] = Counter()  # of those ranks
        self._found: dict[int, StoreHandshake] = {}  # by rank, as workers introduced themselves
        self.waits_for_workers = False
        """Whether they will say what `named` could not."""
        self._work = StepJobs()
        self._counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()

    def set_xfer_handshake_metadata(self, found: Mapping[tuple[int, int], StoreHandshake]) -> None:
        """All ranks are up, and have said what they can hold and what they held before."""
        ranks = [one for _, one in sorted(found.items())]
        self._ranks, self.waits_for_workers = len(ranks), False
        config = self._config
        slots, disk_slots = min(r.slots for r in ranks), min(r.disk_slots for r in ranks)
        policy = config.eviction_policy
        host = CacheTier("host", make(policy, slots), config.store_threshold)
        disk = CacheTier("disk", make(policy, disk_slots)) if disk_slots else None
        self._tier = OffloadTier(host, disk, Writes(config.write_policy), self._ranks)
        in_memory, extra = common([one.host for one in ranks])
        on_disk, extra_on_disk = common([one.disk for one in ranks])
        self._absorb(self._tier.recovered(in_memory, on_disk))
        self._work.jobs += [Forget(key, False) for key in set().union(*extra)]
        self._work.jobs += [Forget(key, True) for key in set().union(*extra_on_disk)]

    def bind(self, pool: Any) -> None:
        """The block pool whose blocks are referenced while they are saved."""
        self._pool = pool

    # -- as vLLM schedules ---------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, local_tokens: int, elsewhere_tokens: int = 0
    ) -> int | None:
        """Tokens to load beyond those cached here; None: ask again after a step.

        ``elsewhere_tokens``: the first ones, which need not be here.
        """
        if self.waits_for_workers:
            return None
        if self._tier is None or request.skip_reading_prefix_cache:
            return 0
        self._adapters.arrived(request)
        if self._adapters.undecided(request):
            return None
        self._adapters.cached(request, local_tokens)
        tracked = self._track(request)
        if tracked.no_loads or self._adapters.digest(request) == "":
            return 0
        if self._config.share and not tracked.looked:
            tracked.looked = True  # an idle engine has not heard from its workers for long
            return None
        tracked.local_tokens = local_tokens
        most = min(request.num_tokens - 1, local_tokens + tracked.most_loaded)
        keys, tier = tracked.keys(), self._tier
        elsewhere = {
            key
            for group, own in zip(self._groups, keys, strict=True)
            for key in own[: elsewhere_tokens // group.chunk_tokens]
        }

        def has(key: Key) -> bool:
            return key in elsewhere or tier.has(key)

        return hit_tokens(self._groups, keys, has, local_tokens, most) - local_tokens

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        """Blocks were allocated, of which ``tokens`` are to be loaded."""
        if self._tier is None:
            return
        tracked = self._track(request)
        if not tracked.counted:  # vLLM asks again when the load has ended, or after a preemption
            tracked.counted = True
            self._counts["tokens_missed"] += max(
                request.num_tokens - 1 - tracked.local_tokens - tokens, 0
            )
        if not tokens:
            return
        chunks = self._chunks_to_load(tracked, blocks, tracked.local_tokens + tokens)
        self._counts.update(self._sources(chunks))
        result = self._tier.load(request.request_id, chunks)
        fills = tuple(job.number for job in result.jobs if isinstance(job, Fill))
        without_room = len(chunks) - len(fills)
        problem = f"memory has no room for {without_room} chunks on disk" if without_room else ""
        self._work.loads[request.request_id] = Loading(fills, problem)
        self._absorb(result)

    def spares(self, request: Any, chunks: Sequence[WantedChunk]) -> list[tuple[Fill | None, str]]:
        """A fill for each chunk, to be carried out or declined by every rank, and from where.

        None where it is not here. For a chain: this scheduler's own workers hear nothing of it.
        """
        found: list[tuple[Fill | None, str]] = [(None, "")] * len(chunks)
        if self._tier is None or (tracked := self._track(request)).no_loads:
            return found
        keys = tracked.keys()
        here = {
            at: KeyedChunk(keys[one.group][one.number], one.group, one.blocks)
            for at, one in enumerate(chunks)
            if one.number < len(keys[one.group]) and self._tier.has(keys[one.group][one.number])
        }
        sources = {at: self._tier.source_of(chunk.key) for at, chunk in here.items()}
        result = self._tier.load(request.request_id, list(here.values()))
        fills = {job.key: job for job in result.jobs if isinstance(job, Fill)}
        result.jobs = [job for job in result.jobs if not isinstance(job, Fill)]
        self._absorb(result)
        for at, chunk in here.items():
            found[at] = fills.get(chunk.key), sources[at]
        return found

    def stores_from(self, request_id: str, starts: Sequence[int]) -> None:
        """Store no chunk with a token before these, by group: it is not loaded whole elsewhere."""
        if tracked := self._requests.get(request_id):
            for at, (group, start) in enumerate(zip(self._groups, starts, strict=True)):
                tracked.offered[at] = max(tracked.offered[at], -(-start // group.chunk_tokens))

    def take_work(self, output: Any) -> StepJobs:
        """The step's jobs; ``output`` is vLLM's SchedulerOutput."""
        if self._tier is not None:
            state = output.kv_connector_block_state
            for request_id, scheduled in output.num_scheduled_tokens.items():
                if tracked := self._requests.get(request_id):
                    self._store(tracked, state, scheduled)
        work, self._work = self._work, StepJobs()
        work.step = self._adapters.next_step()
        return work

    def update_connector_output(self, done: WorkerResults) -> None:
        """Ranks have answered, lost something, or seen what other engines hold."""
        self._adapters.received(done.adapters)
        if self.waits_for_workers:
            self._found |= done.found
            if len(self._found) == self._vllm_config.parallel_config.world_size:
                self.set_xfer_handshake_metadata(
                    {(0, rank): found for rank, found in self._found.items()}
                )
                self._found.clear()
        if self._tier is None:
            return
        self._declined += done.declined
        for number, (ranks, failures) in done.answers.items():
            before = self._answers.pop(number, (0, 0))
            ranks, failures = before[0] + ranks, before[1] + failures
            if ranks < self._ranks:
                self._answers[number] = ranks, failures
            elif self._declined.pop(number, 0) and not failures:
                self._absorb(self._tier.declined(number))
            else:
                self._absorb(self._tier.answered(number, not failures))
        for loss in done.lost:
            self._absorb(self._tier.lost(*loss))
        self._tier.other_engines(done.gained.elements(), done.gone.elements())

    def request_finished(self, request_id: str) -> None:
        """The request ended; what is under way for it goes on."""
        tracked = self._requests.pop(request_id, None)
        self._adapters.ended(request_id)
        if tracked is not None and self._tier is not None:
            self._tier.ended(tracked.in_order())

    @property
    def busy(self) -> bool:
        """Whether an idle engine must go on stepping."""
        waiting = not self._work.empty
        return waiting or (self._tier is not None and self._tier.busy)

    def clear(self) -> None:
        """Forget everything; what is under way, when it has ended."""
        if self._tier is not None:
            self._absorb(self._tier.clear())

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        tiers = (self._tier.host, self._tier.disk) if self._tier else ()
        changes = {tier.name: tier.take_changes() for tier in tiers if tier}
        return [] if self._events is None else self._events.take(changes)

    def keys_of(self, request_id: str) -> list[list[Key]]:
        """Per group, keys of the chunks of a request that is followed."""
        return self._requests[request_id].keys()

    def held(self) -> dict[str, int]:
        """How much of everything is in use, by name; all 0 when nothing is under way."""
        return {
            "requests": len(self._requests),
            "saves": len(self._held),
            "answers": len(self._answers),
            "declined": len(self._declined),
            "events": 0 if self._events is None else len(self._events),
        }

    def take_stats(self) -> dict[str, int] | None:
        """What was counted here since the last call; None if nothing."""
        now = Counter(self._counts)
        if self._tier is not None:
            now.update(self._tier.counts)
            for cache in (self._tier.host, self._tier.disk):
                if cache is not None:
                    now.update({f"{cache.name}_{k}": n for k, n in cache.counts.items()})
        found, self._reported = now - self._reported, now
        return dict(found) or None

    # -- inside --------------------------------------------------------------------------

    def _track(self, request: Any) -> RequestChunks:
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.request is not request:
            if self._chunk_keys is None:  # late: vLLM draws its hash seed after we are made
                told = self._config.model_id, hash_seed(), secrets.token_hex(16)
                self._chunk_keys = ChunkKeys(identity(self._vllm_config, self.group_configs, *told))
            adapter = self._adapters.begin(request)
            tracked = RequestChunks(
                request, self._chunk_keys, self.group_configs, self._hash_tokens, adapter
            )
            self._requests[request.request_id] = tracked
        return tracked

    def _chunks_to_load(self, tracked: RequestChunks, blocks: Any, tokens: int) -> list[KeyedChunk]:
        found = []
        for at, (config, keys) in enumerate(zip(self.group_configs, tracked.keys(), strict=True)):
            table = blocks.blocks[config.group_id]
            need = needed(config.group, tracked.local_tokens, tokens)
            for number in range(need.first, need.end):
                first = number * config.chunk_blocks
                places = range(first, first + config.chunk_blocks)
                wanted = tuple(
                    table[place].block_id
                    if place * config.block_tokens < tokens and _is_empty(table[place])
                    else NO_BLOCK
                    for place in places
                )
                if any(block != NO_BLOCK for block in wanted):
                    found.append(KeyedChunk(keys[number], at, wanted))
        return found

    def _sources(self, chunks: list[KeyedChunk]) -> Counter[str]:
        """Tokens that are loaded from each tier; of the first group, which stands for all."""
        assert self._tier is not None
        counts: Counter[str] = Counter()
        for chunk in chunks:
            if chunk.group == 0:
                wanted = sum(block != NO_BLOCK for block in chunk.blocks)
                source = self._tier.source_of(chunk.key) or "beside"
                counts[TOKENS_FROM[source]] += wanted * self.group_configs[0].block_tokens
        return counts

    def _store(self, tracked: RequestChunks, state: Any, scheduled: int) -> None:
        """Offer chunks that this step completes; most steps of a decode complete none."""
        assert self._tier is not None
        request = tracked.request
        computed = request.num_computed_tokens - request.num_output_placeholders + scheduled
        most = min(computed - self._volatile, tracked.most_tokens)
        if self._config.offload_prompt_only:
            most = min(most, request.num_prompt_tokens)
        if most < tracked.next_end or not (tables := state.get_block_ids(request.request_id)):
            return
        if self._adapters.digest(request) == "" or self._adapters.mixed(request):
            return
        chunks: list[tuple[int, KeyedChunk]] = []
        ends: list[int] = []
        for at, (config, keys) in enumerate(zip(self.group_configs, tracked.keys(), strict=True)):
            table = tables[config.group_id]
            size, tokens = config.chunk_blocks, config.group.chunk_tokens
            end = min(most // tokens, len(keys), len(table) // size)
            for number in range(tracked.offered[at], end):
                blocks = tuple(table[number * size : (number + 1) * size])
                if not any(self._pool.blocks[block].is_null for block in blocks):
                    chunks.append(((number + 1) * tokens, KeyedChunk(keys[number], at, blocks)))
            tracked.offered[at] = max(end, tracked.offered[at])
            ends.append((tracked.offered[at] + 1) * tokens)
        tracked.next_end = min(ends, default=0)
        if chunks:
            chunks.sort(key=lambda one: (one[0], one[1].group))
            result = self._tier.store([chunk for _, chunk in chunks])
            saved = {job.key for job in result.jobs if isinstance(job, Save)}
            for end_token, chunk in chunks:
                if self._events is not None and chunk.key in saved:
                    self._events.saving(request, chunk.key, chunk.group, end_token)
            self._absorb(result)

    def _absorb(self, result: Effects) -> None:
        for job in result.jobs:
            if isinstance(job, Save):
                blocks = [self._pool.blocks[block] for block in job.blocks]
                self._held[job.number] = job.key, blocks
                self._pool.touch(blocks)
                self._work.saves.append(job)
            else:
                self._work.jobs.append(job)
        for number in result.saved:
            key, blocks = self._held.pop(number)
            self._pool.free_blocks(reversed(blocks))
            if self._events is not None and self._tier and not self._tier.host.holds(key):
                self._events.not_saved(key)
        for request_id, failed in result.loaded.items():
            if failed and (tracked := self._requests.get(request_id)):
                tracked.no_loads = True


def _events(
    vllm_config: Any,
    kv_cache_config: Any,
    group_configs: list[GroupOffloadConfig],
    hash_tokens: int,
) -> "Events | None":
    """KV events, where they are asked for."""
    config = vllm_config.kv_events_config
    if config is None or not config.enable_kv_cache_events:
        return None
    from kvconnect.vllm.offload.events import Events

    return Events(group_configs, kv_cache_config, hash_tokens)


def _is_empty(block: Any) -> bool:
    """Whether a block is the request's own, to be filled."""
    return block.block_hash is None and not block.is_null
