"""HostStore over paged KV, on a device that takes its time: a load gives what was stored, or fails.

Blocks that a store reads or a load fills belong to it until its ticket has ended, and not longer:
the machine writes to blocks as soon as they are free, as an engine does.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from late import LateKernels

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.store.arena import attach
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.ops import load
from kvconnect_bench.caches import Cache, Model

picks = st.integers(0, 1 << 16)
GROUPS, CHUNK, BLOCKS = 2, 2, 14
MODEL = Model(layers=3, heads=2, block_tokens=4, content=32, groups=GROUPS)  # pieces of 256 bytes
ENGINES = ("LBHNC", "vec")  # the second reads what the first stored


def key_of(seed, group):
    return bytes([seed, group]) * 16


class HostMachine(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 5))
    def start(self, slots):
        self.folder = tempfile.TemporaryDirectory()
        self.caches = [Cache(MODEL, BLOCKS, layout) for layout in ENGINES]
        self.kernels = LateKernels(load("cpu"))
        self.slot_layouts = [
            [SlotLayout(cache.shard, g, CHUNK, self.kernels) for g in range(GROUPS)]
            for cache in self.caches
        ]
        self.spec = ArenaSpec(slots, slot_bytes(self.slot_layouts[0]), b"\x02" * 32)
        self.tickets = 0
        self.engine = 0
        self.held = {}  # key → whether it is damaged
        self.restart()

    def restart(self):
        self.busy = {}  # ticket → (verb, seed, group, blocks, damaged)
        self.launched = {}  # ticket → whether the launch it is part of will fail
        index = SlotIndex(attach(self.spec, Path(self.folder.name) / "arena"))
        self.store = HostStore(index, self.slot_layouts[self.engine])
        self.free = set(range(BLOCKS))

    def teardown(self):
        if hasattr(self, "store"):
            self.store.index.arena.close()
            self.folder.cleanup()

    @property
    def cache(self):
        return self.caches[self.engine]

    def take(self, number, count):
        free = sorted(self.free)
        blocks = [free[(number + i) % len(free)] for i in range(count)]
        self.free -= set(blocks)
        return blocks

    def begin(self, verb, seed, group, blocks):
        self.tickets += 1
        key = key_of(seed, group)
        damaged = verb == "load" and self.held.get(key, False)
        started = getattr(self.store, verb)(self.tickets, key, group, blocks)
        if started:
            self.busy[self.tickets] = verb, seed, group, blocks, damaged
        else:
            self.free |= set(blocks) - {NO_BLOCK}
        self.forget_lost()
        return started

    def forget_lost(self):
        for key in self.store.take_lost():
            assert self.held.pop(key), "it was given up although nothing was wrong"

    @precondition(lambda self: len(self.free) >= CHUNK)
    @rule(
        seed=st.integers(0, 2),
        group=st.integers(0, GROUPS - 1),
        number=picks,
    )
    def store_chunk(self, seed, group, number):
        blocks = self.take(number, CHUNK)
        self.cache.fill(blocks, seed)
        room = self.store.index.free
        assert self.begin("store", seed, group, blocks) == (room > 0)

    @precondition(lambda self: len(self.free) >= CHUNK and self.held)
    @rule(number=picks)
    def load_what_is_held(self, number):
        seed, group = list(self.held)[number % len(self.held)][:2]
        damaged = self.held[key_of(seed, group)]
        assert self.begin("load", seed, group, self.take(number, CHUNK)) or damaged

    @precondition(lambda self: len(self.free) >= CHUNK)
    @rule(
        seed=st.integers(0, 2),
        group=st.integers(0, GROUPS - 1),
        number=picks,
        skip=st.sampled_from([(), (0,), (1,)]),
    )
    def load_chunk(self, seed, group, number, skip):
        blocks = self.take(number, CHUNK)
        self.free |= {blocks[i] for i in skip}
        blocks = [NO_BLOCK if i in skip else block for i, block in enumerate(blocks)]
        known = key_of(seed, group) in self.held
        started = self.begin("load", seed, group, blocks)
        assert known or not started

    @rule(seed=st.integers(0, 2), group=st.integers(0, GROUPS - 1))
    def drop(self, seed, group):
        self.store.drop(key_of(seed, group))
        self.held.pop(key_of(seed, group), None)

    @rule(seed=st.integers(0, 255), number=picks)
    def an_engine_writes_to_its_free_blocks(self, seed, number):
        if self.free:
            free = sorted(self.free)
            self.cache.fill(free[number % len(free) :], seed + 10)

    @precondition(lambda self: self.held)
    @rule(number=picks, at=picks, bit=st.integers(0, 7))
    def a_bit_flips(self, number, at, bit):
        key = list(self.held)[number % len(self.held)]
        if self.held[key] or any(key_of(s, g) == key for _, s, g, *_ in self.busy.values()):
            return
        entry = self.store.index.use(key)
        self.store.index.arena.payload(entry.slot)[at % entry.nbytes] ^= 1 << bit
        self.store.index.done(entry)
        self.held[key] = True

    @rule(engine=st.integers(0, 1))
    def crash_and_start_again(self, engine):
        """Perhaps as an engine of another layout."""
        self.store.index.arena.close()
        self.engine = engine
        self.restart()
        assert set(self.store.index.keys()) == self.held.keys()

    @rule()
    def settle(self):
        for _ in range(20):
            self.poll()
        assert not self.busy

    @rule(
        asked=st.sampled_from([1, 1, 2, 4]),
        fails=st.integers(0, 9).map(lambda n: n == 9),
    )
    def poll(self, asked=1, fails=False):
        """What has been started is launched: it takes ``asked`` polls, or fails."""
        self.kernels.asked, self.kernels.fails = asked, fails
        self.launched = dict.fromkeys(self.busy, fails) | self.launched
        for ended in self.store.poll():
            verb, seed, group, blocks, damaged = self.busy.pop(ended.id)
            fails = self.launched.pop(ended.id)
            if verb == "store" and not ended.error:
                key = key_of(seed, group)
                self.held.pop(key, None)
                self.held[key] = False
            elif not ended.error:
                self.check_loaded(seed, group, blocks)
            assert bool(ended.error) <= (fails or damaged)
            assert fails <= bool(ended.error)
            self.free |= set(blocks) - {NO_BLOCK}
        self.forget_lost()
        assert self.store.index.keys() == list(self.held)

    def check_loaded(self, seed, group, blocks):
        at = [(place, block) for place, block in enumerate(blocks) if block != NO_BLOCK]
        wanted = Cache(MODEL, CHUNK)
        wanted.fill(range(CHUNK), seed)
        tokens = np.arange(MODEL.block_tokens)
        for layer in MODEL.names[group::GROUPS]:
            for part in range(wanted.parts):
                for place, block in at:
                    right = wanted.read(layer, part, np.full(len(tokens), place), tokens)
                    found = self.cache.read(layer, part, np.full(len(tokens), block), tokens)
                    assert np.array_equal(found, right)

    @invariant()
    def what_is_held_is_known(self):
        if hasattr(self, "store"):
            assert set(self.store.index.keys()) <= self.held.keys()
            assert self.store.busy == bool(self.busy)
            if not self.busy:
                assert self.store.index.free == self.spec.slots - len(self.store.index)


TestHost = pytest.mark.slow(HostMachine.TestCase)
TestHost.settings = settings(
    max_examples=max(20, settings.default.max_examples // 4), stateful_step_count=50
)
