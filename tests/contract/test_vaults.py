"""The real vault and the fake one are held to one contract."""

import sys
import tempfile
from pathlib import Path

import pytest

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.testing.vault import FakeVault, VaultFault
from kvconnect.testing.vault_contract import check_vault

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from vaults import Bench


class FakeRig:
    def __init__(self, late=1):
        self.cells = [0] * 24
        self.vault = FakeVault(self.cells, 4, 8)
        self.vault.late = late

    def fill(self, blocks, seed):
        for place, block in enumerate(blocks):
            self.cells[block] = 1000 * seed + place

    def holds(self, blocks, seed):
        pairs = [(p, b) for p, b in enumerate(blocks) if b != NO_BLOCK]
        return all(self.cells[b] == 1000 * seed + p for p, b in pairs)

    def settle(self):
        found = {}
        while self.vault.busy:
            for ended in self.vault.poll():
                assert ended.ticket not in found
                found[ended.ticket] = ended.error
        return found


class RealRig:
    def __init__(self, folder):
        self.bench = Bench(folder)
        self.vault = self.bench.vault
        self.settle = self.bench.settle

    def fill(self, blocks, seed):
        self.bench.cache.fill(blocks, seed)

    def holds(self, blocks, seed):
        return self.bench.holds(seed, blocks)


@pytest.mark.parametrize("late", [1, 3])
def test_the_fake(late):
    check_vault(lambda: FakeRig(late))


@pytest.mark.slow
def test_the_real_one(tmp_path):
    rigs = []

    def make():
        rigs.append(RealRig(Path(tempfile.mkdtemp(dir=tmp_path))))
        return rigs[-1]

    check_vault(make)
    for rig in rigs:
        rig.bench.close()


@pytest.mark.parametrize("fault", [VaultFault.FAILS, VaultFault.DAMAGED])
def test_the_fakes_faults(fault):
    rig = FakeRig()
    rig.fill((0, 1), 5)
    rig.vault.plan(VaultFault.REFUSED, VaultFault.NONE, fault)
    assert not rig.vault.save(1, b"k", 0, (0, 1))
    assert rig.vault.save(2, b"k", 0, (0, 1))
    assert rig.settle() == {2: ""}
    assert rig.vault.load(3, b"k", 0, (4, 5))
    assert rig.settle() == {3: f"planned fault: {fault.value}"}
    assert not rig.holds((4, 5), 5)
    damaged = fault is VaultFault.DAMAGED
    assert [tuple(loss) for loss in rig.vault.take_lost()] == [(b"k", False)] * damaged
    assert rig.vault.load(4, b"k", 0, (4, 5)) != damaged
    assert rig.vault.free() == 4 - (not damaged)
