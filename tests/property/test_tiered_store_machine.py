"""The real store over real files, with a disk that fails and lies: right, or a miss with a cause.

One operation at a time, so that what the disk's threads do does not depend on luck; killed and
started again at any moment in between, damaged in memory and on disk.
"""

import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.geometry.intersect import NO_BLOCK

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from faulty_file import DiskFault
from store_bench import Bench, key_of

picks = st.integers(0, 1 << 16)
seeds = st.integers(1, 5)
WRITES_BADLY = {DiskFault.LOST, DiskFault.FLIPPED}
FAILS = {DiskFault.IO_ERROR, DiskFault.FULL, DiskFault.SHORT}
faults = st.sampled_from([DiskFault.NONE, DiskFault.NONE, *DiskFault])


class TieredStoreMachine(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 4), disk_slots=st.integers(1, 5))
    def start(self, slots, disk_slots):
        self.folder = tempfile.TemporaryDirectory()
        self.sizes = slots, disk_slots
        self.layouts = 0
        self.memory, self.disk = {}, {}  # seed → whether it is damaged, or may be
        self.open()

    def open(self):
        self.layouts += 1
        layout = ("LBHNC", "BLNHC")[self.layouts % 2]
        self.bench = Bench(Path(self.folder.name), *self.sizes, layout=layout)

    def teardown(self):
        if hasattr(self, "bench"):
            self.bench.close()
            self.folder.cleanup()

    @rule(seed=seeds)
    def save(self, seed):
        room = self.bench.host.index.free > 0
        assert self.bench.save(seed) == room
        if room:
            self.memory[seed] = False

    def pick(self, number):
        """Mostly what is somewhere."""
        return sorted([*self.memory, *self.disk] * 3 + [1, 2, 3])[number % (3 * self.known + 3)]

    @property
    def known(self):
        return len(self.memory) + len(self.disk)

    @rule(number=picks, fault=faults)
    def spill(self, number, fault):
        seed = self.pick(number)
        self.bench.file.plan(fault)
        wanted = seed in self.memory and seed not in self.disk
        able = wanted and self.bench.disk.index.free > 0 and not self.bench.disk.is_off
        assert self.bench.spill(seed) == (able and fault not in FAILS)
        if able and fault not in FAILS:
            self.disk[seed] = self.memory[seed] or fault in WRITES_BADLY
        self.bench.file.forget_plans()

    @rule(number=picks, fault=faults, skip=st.integers(0, 4))
    def load(self, number, fault, skip):
        """Whether it goes well is foretold; `Bench.load` compares the content."""
        seed = self.pick(number)
        blocks = [10, 11]
        if skip < 2:
            blocks[skip] = NO_BLOCK
        self.bench.file.plan(fault)
        known = [self.memory.get(seed), self.disk.get(seed)]
        room = self.bench.host.index.free > 0
        well = self.bench.load(seed, tuple(blocks))
        self.bench.file.forget_plans()
        read_well = fault not in {*FAILS, *WRITES_BADLY}
        if known == [None, None]:
            assert not well
        elif known[0] is False:
            assert well
        elif read_well and (room or known[0]):  # what is damaged makes room for what it was
            assert well or known[1] is not False
            assert well or key_of(seed) not in self.bench.disk.index, "it would be read again"
        held = set(self.bench.host.index.keys()), set(self.bench.disk.index.keys())
        for mine, keys in zip((self.memory, self.disk), held, strict=True):
            here = key_of(seed) in keys
            assert here or mine.get(seed) is not False or not read_well, (
                "it was given up for nothing"
            )
            if not here:
                mine.pop(seed, None)
        if key_of(seed) in held[0] and seed not in self.memory:
            self.memory[seed] = (
                not well or skip < 2
            )  # promoted; of two blocks one was not looked at
            assert known[1] is not None

    @rule(seed=seeds)
    def forget(self, seed):
        self.bench.store.forget(key_of(seed))
        self.memory.pop(seed, None)

    @rule(seed=seeds)
    def forget_on_disk(self, seed):
        self.bench.store.forget_on_disk(key_of(seed))
        self.disk.pop(seed, None)

    @precondition(lambda self: self.memory)
    @rule(number=picks, at=picks)
    def a_bit_flips_in_memory(self, number, at):
        seed = sorted(self.memory)[number % len(self.memory)]
        self.bench.flip(self.bench.host.index.arena, seed, at % self.bench.slot_layout.nbytes)
        self.memory[seed] = True

    @precondition(lambda self: self.disk)
    @rule(number=picks, at=picks)
    def a_bit_flips_on_disk(self, number, at):
        seed = sorted(self.disk)[number % len(self.disk)]
        self.bench.flip(self.bench.disk.index.arena, seed, at % self.bench.slot_layout.nbytes)
        self.disk[seed] = True

    @rule()
    def start_again(self):
        """As another layout of the same model."""
        self.bench.close()
        self.open()

    @invariant()
    def what_is_held_is_known_and_no_slot_is_lost(self):
        if not hasattr(self, "bench"):
            return
        indexes = (self.bench.host.index, self.memory), (self.bench.disk.index, self.disk)
        for (index, mine), slots in zip(indexes, self.sizes, strict=True):
            assert set(index.keys()) == {key_of(seed) for seed in mine}
            assert index.free == slots - len(mine)
        assert not self.bench.store.busy


TestVault = pytest.mark.slow(TieredStoreMachine.TestCase)
TestVault.settings = settings(
    max_examples=max(20, settings.default.max_examples // 4), stateful_step_count=30
)
