"""Ranks whose KV is the same: one stores it, all load it."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from store_bench import BLOCKS, CHUNK, MODEL, key_of

from kvconnect.config import parse
from kvconnect.errors import Reason, StoreError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.jobs import Fill, Forget, Save, Spill
from kvconnect.offload.store import numa
from kvconnect.offload.store import replica as replica_module
from kvconnect.offload.store import runner as runner_module
from kvconnect.offload.store.slot_layout import SlotLayout
from kvconnect.ops import load
from kvconnect.vllm.offload.copies import open_copy
from kvconnect.vllm.offload.opening import OpenStore, no_device
from kvconnect_bench.caches import Cache


class Rank(NamedTuple):
    """As `kvconnect.vllm.engine.Rank`, without vLLM."""

    index: int
    count: int
    pp_size: int


class Ranks:
    """A tensor-parallel group of threads; ``models``: of each rank's cache."""

    def __init__(self, models, pin=no_device, pp_size=1, **options):
        self.models, self.pin, self.pp_size = models, pin, pp_size
        self.config = parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")
        self.caches = [Cache(model, BLOCKS) for model in models]
        self.given = [None] * len(models)
        self.barrier = threading.Barrier(len(models), timeout=60)
        with ThreadPoolExecutor(len(models)) as pool:
            self.places = list(pool.map(self.open, range(len(models))))
        self.numbers = 0
        self.counts = [Counter() for _ in models]

    def open(self, index):
        def gather(value):
            self.given[index] = value
            self.barrier.wait()
            found = list(self.given)
            self.barrier.wait()
            return found

        rank = Rank(index, len(self.models) * self.pp_size, self.pp_size)
        slot_layout = SlotLayout(self.caches[index].shard, 0, CHUNK, load("cpu"))

        def fingerprint_of(of):
            return bytes([of]) * 32

        try:
            return open_copy(
                self.config, rank, fingerprint_of, [slot_layout], self.pin, gather, (index,)
            )
        except StoreError as e:
            return e

    @property
    def stores(self):
        return [place.stores for place in self.places]

    def put(self, job):
        for place in self.places:
            place.runner.put([job])

    def errors(self, number, ranks=None):
        """What ranks answer to a job."""
        found = []
        for index in ranks or range(len(self.places)):
            runner = self.places[index].runner
            for _ in range(10_000):
                if not runner.step():
                    time.sleep(100e-6)  # threads of the disk
                report = runner.take()
                self.counts[index] += report.counts
                if answers := report.done:
                    assert [answer.id for answer in answers] == [number]
                    found.append(answers[0].error)
                    break
            else:
                raise AssertionError("it does not end")
        return found

    def run(self, kind, seed, *rest):
        self.numbers += 1
        self.put(kind(self.numbers, key_of(seed), *rest))
        return self.errors(self.numbers)

    def store(self, seed):
        for cache in self.caches:
            cache.fill((0, 1), seed)
        assert not any(self.run(Save, seed, 0, (0, 1)))

    def load(self, seed):
        """On which ranks it was loaded."""
        for cache in self.caches:
            cache.fill((4, 5), 999)
        errors = self.run(Fill, seed, 0, (4, 5))
        held = [cache.holds_fill([(0, 4), (1, 5)], seed) for cache in self.caches]
        assert held == [not error for error in errors]
        return held

    def close(self):
        for place in self.places:
            if isinstance(place, OpenStore):
                place.close()


@pytest.fixture
def group():
    """Makes groups of ranks, and closes them."""
    made = []

    def make(models, **options):
        made.append(Ranks(models, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


OTHER = replace(MODEL, heads=4)


@pytest.mark.parametrize("kind", ["memory", "persists", "shares"])
def test_the_same_kv_is_stored_once_and_loaded_by_all(group, tmp_path, kind):
    folder = {"memory_path": str(tmp_path)}
    options = {"memory": {}, "persists": {"persist": True}, "shares": {"share": True}}[kind]
    ranks = group([MODEL] * 3, **options | (folder if options else {}))
    assert ranks.stores == [True, False, False]
    ranks.store(3)
    ranks.store(4)
    assert ranks.load(3) == ranks.load(4) == [True] * 3
    stored = [counts["store_bytes"] for counts in ranks.counts]
    assert stored[0] > 0
    assert stored[1:] == [0, 0], "who only reads has stored nothing"
    assert len({counts["load_bytes"] for counts in ranks.counts}) == 1
    ranks.put(Forget(key_of(3), False))
    ranks.store(5)
    assert ranks.load(5) == [True] * 3


def test_all_of_the_memory_is_the_leader_s(group):
    """MLA at TP 8 used to hold an eighth of the chunks, eight times."""
    alone, together = group([MODEL]), group([MODEL] * 4)
    slots = {place.lead.slots for place in (*alone.places, *together.places)}
    assert slots == {alone.places[0].lead.slots}
    assert group([MODEL, OTHER]).places[0].lead.slots <= max(slots) // 2


def test_ranks_of_different_heads_store_their_own(group):
    assert group([MODEL, OTHER]).stores == [True, True]


def test_neighbours_that_hold_the_same_heads_have_a_leader_each(group):
    """As with 4 ranks and 2 KV heads."""
    ranks = group([MODEL, MODEL, OTHER, OTHER])
    assert ranks.stores == [True, False, True, False]
    ranks.store(3)
    assert ranks.load(3) == [True] * 4
    assert ranks.places[1].memory.identity == ranks.places[0].memory.identity
    assert ranks.places[3].memory.identity == ranks.places[2].memory.identity


def test_memory_is_wished_near_to_the_rank_that_stores(group, monkeypatch):
    wished = []
    monkeypatch.setattr(numa, "prefer", lambda _, nodes: nodes and wished.append(nodes))
    group([MODEL] * 2)
    assert wished == [(0,)], "the leader's"
    group([MODEL, OTHER])
    assert sorted(wished[1:]) == [(0,), (1,)]


def test_every_stage_has_its_share(group):
    one, two = (group([MODEL] * 2, pp_size=stages).places[0].lead.slots for stages in (1, 2))
    assert one // 2 - 2 <= two <= one // 2


@pytest.mark.parametrize("whose", [True, False], ids=["the leader's", "a follower's"])
def test_if_one_cannot_all_store_their_own(group, caplog, whose):
    """Memory of another host, another container, or that cannot be pinned."""
    refused, opened = [], []

    def pin(memory, to_write):
        opened.append(memory)
        if to_write == whose and not refused:
            refused.append(memory)
            raise StoreError(Reason.FAILED, "it is not to be had")

    ranks = group([MODEL] * 2, pin=pin)
    assert ranks.stores == [True, True]
    assert "stores its own copy: it is not to be had" in caplog.text
    used = [place.memory for place in ranks.places]
    assert not any(memory.backing.bytes.size for memory in opened if memory not in used)
    ranks.store(3)
    assert ranks.load(3) == [True, True]


def test_if_there_is_no_memory_every_rank_says_so(group):
    ranks = group([MODEL] * 2, cpu_bytes_to_use=1 << 20, block_size=1 << 10, pin=lambda *_: fail())
    assert all(isinstance(one, StoreError) for one in ranks.places)


def fail():
    raise StoreError(Reason.FULL, "no")


def test_a_follower_waits_for_what_comes_from_disk(group, tmp_path):
    ranks = group([MODEL] * 2, disk_path=str(tmp_path), disk_bytes=1 << 20)
    ranks.store(3)
    assert not any(ranks.run(Spill, 3))
    ranks.put(Forget(key_of(3), False))
    ranks.places[0].runner.step()
    for cache in ranks.caches:
        cache.fill((4, 5), 999)
    ranks.put(Fill(50, key_of(3), 0, (4, 5)))
    for _ in range(5):
        ranks.places[1].runner.step()
    assert not ranks.places[1].runner.take().done, "nobody has read it yet"
    assert ranks.errors(50, [0]) == [""]
    assert ranks.errors(50, [1]) == [""]
    assert all(cache.holds_fill([(0, 4), (1, 5)], 3) for cache in ranks.caches)


def test_what_was_just_stored_is_found_at_once(group, monkeypatch):
    """Not only when the follower looks around again, up to a second later."""
    monkeypatch.setattr(runner_module, "LOOK_AROUND_S", 1e9)
    monkeypatch.setattr(replica_module, "PATIENCE_S", 0.0)
    ranks = group([MODEL] * 2)
    ranks.store(3)
    ranks.store(4)
    assert ranks.load(4) == [True, True]


def test_a_follower_does_not_wait_for_ever(group, monkeypatch):
    ranks = group([MODEL] * 2)
    ranks.store(3)
    monkeypatch.setattr(replica_module, "PATIENCE_S", 0.0)
    runner = ranks.places[1].runner
    runner.put([Fill(50, key_of(9), 0, (4, 5))])
    while not (report := runner.take()).done:
        runner.step()
    assert report.done[0].error
    assert [loss.key for loss in report.lost] == [key_of(9)], "nobody is to be told it is there"
    assert ranks.load(3) == [True, True]


def test_what_the_device_cannot_read_yet_is_not_lost(group, monkeypatch):
    monkeypatch.setattr(replica_module, "PATIENCE_S", 0.0)
    pinning = SimpleNamespace(ready=0, close=lambda: None)
    ranks = group([MODEL] * 2, pin=lambda _, to_write: None if to_write else pinning)
    ranks.store(3)
    ranks.put(Fill(50, key_of(3), 0, (4, 5)))
    assert ranks.errors(50, [0]) == [""]
    runner = ranks.places[1].runner
    while not (report := runner.take()).done:
        runner.step()
    assert report.done[0].error
    assert report.lost == []
    pinning.ready = ranks.places[0].memory.spec.nbytes
    assert ranks.load(3) == [True, True]


def test_damage_in_the_leader_s_memory_is_seen_by_all(group, monkeypatch):
    monkeypatch.setattr(replica_module, "PATIENCE_S", 0.0)  # the leader drops it
    ranks = group([MODEL] * 2)
    ranks.store(3)
    memory = ranks.places[0].memory
    entry = memory.scan().entries[0]
    memory.payload(entry.slot)[100] ^= 1
    assert ranks.load(3) == [False, False]


def test_a_follower_cannot_write(group):
    ranks = group([MODEL] * 2)
    with pytest.raises(ValueError, match="read-only"):
        ranks.places[1].memory.payload(0)[:] = 0


def test_nothing_is_left_open(group):
    ranks = group([MODEL] * 3)
    path = Path(ranks.places[0].lead.path)
    assert "kvconnect" in str(path.readlink())
    ranks.close()
    ranks.close()
    assert not path.exists() or "kvconnect" not in str(path.readlink())
