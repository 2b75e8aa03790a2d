"""What every store of a rank does: `RankStore`'s contract, run on a `Rig`."""

from collections.abc import Callable, Sequence
from typing import Protocol

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.store.runner import RankStore


class Rig(Protocol):
    """A store over a cache, made by whoever runs the contract: chunks of 2 blocks, 4 slots, 8 on
    disk, and at least 12 blocks."""

    store: RankStore

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """Write what ``seed`` stands for into a chunk's blocks."""

    def holds(self, blocks: Sequence[int], seed: int) -> bool:
        """Whether they hold it, as far as they are not NO_BLOCK."""

    def settle(self) -> dict[int, str]:
        """Poll until the store is not busy: ticket → error."""


def check_store(make_rig: Callable[[], Rig]) -> None:
    """Raise AssertionError for what the store that ``make_rig`` makes does otherwise."""
    for check in (_moves, _misses, _is_full, _promotes, _spills_once, _forgets_in_use, _parts):
        check(make_rig())


def _key(seed: int) -> bytes:
    return seed.to_bytes(32, "big")


def _save(rig: Rig, seed: int) -> bool:
    rig.fill((0, 1), seed)
    return rig.store.save(seed, _key(seed), 0, (0, 1)) and not rig.settle()[seed]


def _loads(rig: Rig, seed: int, blocks: tuple[int, int] = (6, 7)) -> bool:
    rig.fill([block for block in blocks if block != NO_BLOCK], 99)
    if not rig.store.load(1000 + seed, _key(seed), 0, blocks):
        return False
    error = rig.settle()[1000 + seed]
    assert error or rig.holds(blocks, seed), "a load went well and brought something else"
    return not error


def _moves(rig: Rig) -> None:
    assert not rig.store.busy
    assert _save(rig, 1)
    assert _save(rig, 2)
    rig.fill((0, 1), 98)
    assert _loads(rig, 1)
    assert _loads(rig, 2)
    assert _loads(rig, 1, (7, 6))
    assert rig.store.keys(on_disk=False) == [_key(1), _key(2)]
    assert rig.store.keys(on_disk=True) == []
    assert rig.store.poll() == [], "a ticket ended twice"
    assert rig.store.take_lost() == []


def _misses(rig: Rig) -> None:
    assert not _loads(rig, 1)
    assert not rig.store.spill(7, _key(1))
    rig.store.forget(_key(1))
    rig.store.forget_on_disk(_key(1))
    assert not rig.store.busy


def _is_full(rig: Rig) -> None:
    assert [_save(rig, seed) for seed in range(5)] == [True] * 4 + [False]
    rig.store.forget(_key(2))
    assert not rig.store.holds(_key(2), on_disk=False)
    assert _save(rig, 4)
    assert [_loads(rig, seed) for seed in range(5)] == [True, True, False, True, True]


def _promotes(rig: Rig) -> None:
    assert _save(rig, 1)
    assert rig.store.spill(7, _key(1))
    assert rig.settle() == {7: ""}
    rig.store.forget(_key(1))
    assert _loads(rig, 1)
    assert rig.store.holds(_key(1), on_disk=False)
    assert rig.store.holds(_key(1), on_disk=True)
    rig.store.forget(_key(1))
    assert [_save(rig, seed) for seed in range(2, 6)] == [True] * 4
    assert not _loads(rig, 1), "it was promoted to a slot that is not there"
    rig.store.forget(_key(2))
    assert _loads(rig, 1)
    rig.store.forget(_key(1))
    rig.store.forget_on_disk(_key(1))
    assert not _loads(rig, 1)


def _spills_once(rig: Rig) -> None:
    assert _save(rig, 1)
    assert rig.store.spill(7, _key(1))
    rig.settle()
    assert not rig.store.spill(8, _key(1))
    for seed in range(2, 12):
        rig.store.forget(_key(seed - 1))
        assert _save(rig, seed)
        assert rig.store.spill(20 + seed, _key(seed)) == (seed <= 8)
        rig.settle()
    assert rig.store.keys(on_disk=True) == [_key(seed) for seed in range(1, 9)]


def _forgets_in_use(rig: Rig) -> None:
    assert [_save(rig, seed) for seed in range(4)] == [True] * 4
    for seed in range(4):
        assert rig.store.load(30 + seed, _key(seed), 0, (4 + 2 * seed, 5 + 2 * seed))
        assert rig.store.spill(40 + seed, _key(seed))
        rig.store.forget(_key(seed))
    rig.fill((0, 1), 50)
    for seed in range(50, 54):  # in their slots, unless somebody still reads them
        if rig.store.save(seed, _key(seed), 0, (0, 1)):
            rig.store.forget(_key(seed))
    ended = rig.settle()
    assert (
        {ended[30 + seed] for seed in range(4)} == {ended[40 + seed] for seed in range(4)} == {""}
    )
    assert all(rig.holds((4 + 2 * seed, 5 + 2 * seed), seed) for seed in range(4))
    for key in rig.store.keys(on_disk=False):
        rig.store.forget(key)
    assert [_loads(rig, seed) for seed in range(4)] == [True] * 4, "from disk"


def _parts(rig: Rig) -> None:
    assert _save(rig, 1)
    rig.fill((6, 7), 99)
    assert rig.store.load(5, _key(1), 0, (NO_BLOCK, 7))
    assert rig.settle() == {5: ""}
    assert rig.holds((NO_BLOCK, 7), 1)
    assert rig.holds((6, NO_BLOCK), 99)
