"""OffloadTier and its ranks: whatever fails, a load brings what was stored; no slot is lost.

Ranks carry out jobs when they get to it, fail one by one, lose what they held, and are killed all
together. At rest, every rank holds exactly what the scheduler thinks: no slot is lost for good.
"""

import sys
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.cache import CacheTier
from kvconnect.offload.eviction import POLICIES, make
from kvconnect.offload.jobs import Forget
from kvconnect.offload.store.runner import Runner
from kvconnect.offload.tiers import KeyedChunk, OffloadTier, Writes, common
from kvconnect.testing.clock import FakeClock

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fake_store import FakeStore, StoreFault

picks = st.integers(0, 1 << 16)
KEYS = [bytes([n]) * 4 for n in range(7)]
BLOCKS = 24
FREE = -7


def content(key, rank, place, weights=0):
    return 1000 * weights + 100 * key[0] + 10 * rank + place


class OffloadMachine(RuleBasedStateMachine):
    @initialize(
        ranks=st.integers(1, 2),
        capacity=st.integers(1, 4),
        reserve=st.integers(0, 2),
        disk=st.integers(0, 4),
        policy=st.sampled_from(sorted(POLICIES)),
        writes=st.sampled_from(Writes),
        threshold=st.integers(1, 2),
    )
    def start(self, ranks, capacity, reserve, disk, policy, writes, threshold):
        self.sizes = capacity, disk
        self.made = policy, writes, threshold
        self.cells = [[FREE] * BLOCKS for _ in range(ranks)]
        self.stores = [FakeStore(cells, capacity + reserve, disk) for cells in self.cells]
        self.requests = self.weights = 0
        self.begin()

    def begin(self):
        capacity, disk = self.sizes
        policy, writes, threshold = self.made
        host = CacheTier("host", make(policy, capacity), threshold)
        under = CacheTier("disk", make(policy, disk)) if disk else None
        self.tier = OffloadTier(host, under, writes, len(self.stores))
        self.runners = [Runner(store, clock=FakeClock()) for store in self.stores]
        self.queues = [[] for _ in self.stores]
        self.answers = {}  # number → {rank: well}
        self.saving = {}  # number → blocks
        self.loading = {}  # request → chunks, and the oldest weights they may be of
        self.oldest = 0
        self.unnoticed = False
        self.free = set(range(BLOCKS))
        for cells in self.cells:
            cells[:] = [FREE] * BLOCKS

    def follow(self, result):
        for queue in self.queues:
            queue.extend(result.jobs)
        for number in result.saved:
            self.give(self.saving.pop(number))
        for request, failed in result.loaded.items():
            chunks, oldest = self.loading.pop(request)
            for chunk in chunks:
                if chunk.key not in failed:
                    self.check(chunk, oldest)
                self.give(chunk.blocks)

    def check(self, chunk, oldest):
        for rank, cells in enumerate(self.cells):
            for place, block in enumerate(chunk.blocks):
                if block != NO_BLOCK:
                    assert cells[block] % 1000 == content(chunk.key, rank, place), "wrong KV"
                    assert cells[block] // 1000 >= oldest, "KV of older weights"

    def take(self):
        blocks = tuple(sorted(self.free)[:2])
        self.free -= set(blocks)
        return blocks

    def give(self, blocks):
        for block in set(blocks) - {NO_BLOCK}:
            self.free.add(block)
            for cells in self.cells:
                cells[block] = FREE

    @rule(first=st.integers(0, 6), count=st.integers(1, 4))
    def store(self, first, count):
        chunks = []
        for key in KEYS[first : first + count]:
            if len(self.free) < 2:
                break
            blocks = self.take()
            for rank, cells in enumerate(self.cells):
                for place, block in enumerate(blocks):
                    cells[block] = content(key, rank, place, self.weights)
            chunks.append(KeyedChunk(key, 0, blocks))
        result = self.tier.store(chunks)
        saved = [
            job for job in result.jobs if not isinstance(job, Forget) and hasattr(job, "blocks")
        ]
        self.saving |= {job.number: job.blocks for job in saved}
        for chunk in chunks:
            if chunk.blocks not in self.saving.values():
                self.give(chunk.blocks)
        self.follow(result)

    @precondition(lambda self: any(map(self.tier.has, KEYS)))
    @rule(number=picks, skip=st.booleans())
    def load(self, number, skip):
        there = [n for n, key in enumerate(KEYS) if self.tier.has(key)]
        first = there[number % len(there)]
        chunks = []
        for key in takewhile(self.tier.has, KEYS[first:]):
            if len(self.free) < 2:
                break
            blocks = self.take()
            if skip and not chunks:
                self.give(blocks[:1])
                blocks = (NO_BLOCK, blocks[1])
            chunks.append(KeyedChunk(key, 0, blocks))
        self.requests += 1
        self.loading[f"r{self.requests}"] = chunks, self.oldest
        self.follow(self.tier.load(f"r{self.requests}", chunks))

    @rule(first=st.integers(0, 6), count=st.integers(1, 4))
    def store_and_rest(self, first, count):
        self.store(first, count)
        self.rest()

    @rule()
    def answers(self):
        for rank in range(len(self.stores)):
            self.answer(rank)

    @rule(
        rank=picks,
        late=st.sampled_from([1, 1, 2, 4]),
        faults=st.lists(st.sampled_from(StoreFault), max_size=3),
    )
    def deliver(self, rank, late, faults):
        rank %= len(self.stores)
        self.stores[rank].late = late
        self.stores[rank].plan(*faults)
        jobs, self.queues[rank] = self.queues[rank], []
        self.runners[rank].put(jobs)

    @rule(rank=picks)
    def answer(self, rank):
        rank %= len(self.stores)
        self.runners[rank].step()
        report = self.runners[rank].take()
        for number, error, *_ in report.done:
            given = self.answers.setdefault(number, {})
            assert rank not in given, "a job was answered twice"
            given[rank] = not error
            if len(given) == len(self.stores):
                del self.answers[number]
                self.follow(self.tier.answered(number, all(given.values())))
        for key, on_disk in report.lost:
            self.follow(self.tier.lost(key, on_disk))

    @rule(kind=st.integers(0, 12), rank=picks, number=picks, on_disk=st.booleans())
    def something_rare(self, kind, rank, number, on_disk):
        if kind == 8:
            self.tier.ended(KEYS[number % len(KEYS) :])
        elif kind == 9:
            self.follow(self.tier.clear())
            assert not any(map(self.tier.has, KEYS))
            self.weights = self.oldest = self.weights + 1
        elif kind == 10:
            self.rest()
            self.follow(self.tier.clear())
            assert not self.tier.host.waiting, "something is waited for that nobody holds"
            assert self.tier.host.size == 0, "something is pinned by nobody"
            assert self.tier.disk is None or self.tier.disk.size == 0
        elif kind == 11:
            self.kill_and_start_again()
        elif kind == 12:
            self.lose_unnoticed(rank, number, on_disk)

    def lose_unnoticed(self, rank, number, on_disk):
        store = self.stores[rank % len(self.stores)]
        if keys := store.keys(on_disk):
            (store.forget_on_disk if on_disk else store.forget)(keys[number % len(keys)])
            self.unnoticed = True

    def kill_and_start_again(self):
        for store in self.stores:
            store.restart()
        self.begin()
        media = []
        for on_disk in (False, True):
            kept, extra = common([store.keys(on_disk) for store in self.stores])
            media.append(kept)
            for queue, keys in zip(self.queues, extra, strict=True):
                queue.extend(Forget(key, on_disk) for key in sorted(keys))
        self.follow(self.tier.recovered(*media))

    @rule()
    def rest(self):
        for _ in range(200):
            for rank in range(len(self.stores)):
                jobs, self.queues[rank] = self.queues[rank], []
                self.stores[rank].late = 1
                self.runners[rank].put(jobs)
                self.answer(rank)
            if not any(self.queues) and all(one.rest(0) for one in self.runners):
                break
        else:
            raise AssertionError("it never comes to rest")
        assert not self.tier.busy
        assert not self.loading
        assert not self.saving
        assert not self.answers
        assert len(self.free) == BLOCKS
        for store in self.stores:
            for on_disk, cache in ((False, self.tier.host), (True, self.tier.disk)):
                held = {key for key in KEYS if cache and cache.holds(key)}
                assert set(store.keys(on_disk)) <= held, "a slot is lost for good"
                assert self.unnoticed or set(store.keys(on_disk)) == held
                assert store.free(on_disk) + len(store.keys(on_disk)) == store.capacity(on_disk)

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def only_so_much_is_known(self):
        capacity, disk = self.sizes
        assert self.tier.host.size <= capacity
        assert self.tier.disk is None or self.tier.disk.size <= disk


TestOffload = pytest.mark.slow(OffloadMachine.TestCase)
TestOffload.settings = settings(
    max_examples=max(40, settings.default.max_examples // 2), stateful_step_count=50
)
