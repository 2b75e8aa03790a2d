"""The real store and the fake one are held to one contract."""

import sys
import tempfile
from pathlib import Path

import pytest

from kvconnect.geometry.intersect import NO_BLOCK

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fake_store import FakeStore, StoreFault
from store_bench import Bench
from store_contract import check_store


class FakeRig:
    def __init__(self, late=1):
        self.cells = [0] * 24
        self.store = FakeStore(self.cells, 4, 8)
        self.store.late = late

    def fill(self, blocks, seed):
        for place, block in enumerate(blocks):
            self.cells[block] = 1000 * seed + place

    def holds(self, blocks, seed):
        pairs = [(p, b) for p, b in enumerate(blocks) if b != NO_BLOCK]
        return all(self.cells[b] == 1000 * seed + p for p, b in pairs)

    def settle(self):
        found = {}
        while self.store.busy:
            for ended in self.store.poll():
                assert ended.id not in found
                found[ended.id] = ended.error
        return found


class RealRig:
    def __init__(self, folder):
        self.bench = Bench(folder)
        self.store = self.bench.store
        self.settle = self.bench.settle

    def fill(self, blocks, seed):
        self.bench.cache.fill(blocks, seed)

    def holds(self, blocks, seed):
        return self.bench.holds(seed, blocks)


@pytest.mark.parametrize("late", [1, 3])
def test_the_fake(late):
    check_store(lambda: FakeRig(late))


@pytest.mark.slow
def test_the_real_one(tmp_path):
    rigs = []

    def make():
        rigs.append(RealRig(Path(tempfile.mkdtemp(dir=tmp_path))))
        return rigs[-1]

    check_store(make)
    for rig in rigs:
        rig.bench.close()


@pytest.mark.parametrize("fault", [StoreFault.FAILS, StoreFault.DAMAGED])
def test_the_fakes_faults(fault):
    rig = FakeRig()
    rig.fill((0, 1), 5)
    rig.store.plan(StoreFault.REFUSED, StoreFault.NONE, fault)
    assert not rig.store.save(1, b"k", 0, (0, 1))
    assert rig.store.save(2, b"k", 0, (0, 1))
    assert rig.settle() == {2: ""}
    assert rig.store.load(3, b"k", 0, (4, 5))
    assert rig.settle() == {3: f"planned fault: {fault.value}"}
    assert not rig.holds((4, 5), 5)
    damaged = fault is StoreFault.DAMAGED
    assert [tuple(loss) for loss in rig.store.take_lost()] == [(b"k", False)] * damaged
    assert rig.store.load(4, b"k", 0, (4, 5)) != damaged
    assert rig.store.free() == 4 - (not damaged)
