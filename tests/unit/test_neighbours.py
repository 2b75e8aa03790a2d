"""Engines that share: each writes its own arena, reads the others', and never believes too much."""

import errno
import os
from pathlib import Path

import pytest
from store_bench import FINGERPRINT, Bench, key_of

from kvconnect.errors import Reason, StoreError
from kvconnect.offload.store import neighbours as module
from kvconnect.offload.store.arena import Arena, Written
from kvconnect.offload.store.backing import FileBacking, mapped
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.neighbours import OFF_S, Neighbours, claim, other_paths
from kvconnect.testing.clock import FakeClock

SPEC = ArenaSpec(8, 64, FINGERPRINT)


@pytest.fixture(params=[mapped, FileBacking], ids=["mapped", "filed"])
def wrap(request):
    return request.param


@pytest.fixture
def pair(tmp_path):
    benches = [Bench(tmp_path, share=True, disk_slots=4) for _ in range(2)]
    yield benches
    for bench in benches:
        bench.close()


def hold(arena, slot, number):
    arena.begin(slot)
    return arena.commit([Written(slot, key_of(number), 0, 1, 8, number)])[0]


def refresh(bench):
    for neighbours in bench.neighbours:
        neighbours.refresh()


def test_each_engine_gets_an_arena_of_its_own_and_a_later_one_takes_over(tmp_path, wrap):
    first, one = claim(tmp_path / "new" / "folder", SPEC, wrap)
    second, two = claim(tmp_path / "new" / "folder", SPEC, wrap)
    assert one != two
    hold(first, 3, 30)
    first.close()
    third, path = claim(tmp_path / "new" / "folder", SPEC, wrap)
    assert path == one
    assert [e.key for e in third.scan().entries] == [key_of(30)]
    second.close()
    third.close()


def test_there_is_an_end_to_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    arenas = [claim(tmp_path, SPEC)[0] for _ in range(2)]
    with pytest.raises(StoreError, match="2 engines") as refused:
        claim(tmp_path, SPEC)
    assert refused.value.reason is Reason.TAKEN
    assert len(arenas) == 2


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as refused:
        claim(tmp_path / "file" / "folder", SPEC)
    assert refused.value.reason is Reason.FAILED


def test_it_tells_what_came_and_what_went(tmp_path, wrap):
    own, path = claim(tmp_path, SPEC, wrap)
    others = [claim(tmp_path, SPEC, wrap)[0] for _ in range(2)]
    seen = Neighbours(other_paths(tmp_path, FINGERPRINT, path), FINGERPRINT, wrap)
    hold(own, 0, 9)
    assert seen.refresh() == ([], []), "our own is no news"
    for slot in range(5):
        hold(others[0], slot, slot)
    hold(others[1], 7, 4)
    assert seen.refresh() == ([key_of(n) for n in range(5)], [])
    assert seen.refresh() == ([], [])
    others[0].drop(4)
    assert seen.refresh() == ([], []), "the other has it still"
    assert seen.find(key_of(4)).entry.slot == 7
    others[0].begin(3)
    hold(others[0], 2, 22)
    assert seen.refresh() == ([key_of(22)], [key_of(2), key_of(3)])
    others[1].drop(7)
    assert seen.find(key_of(4)) is None, "it is looked at again before it is used"
    assert sorted(seen.found()) == [key_of(n) for n in (0, 1, 4, 22)]
    seen.close()
    assert seen.found() == []


def test_an_arena_that_was_replaced_is_looked_at_anew(tmp_path, wrap):
    other, path = claim(tmp_path, SPEC, wrap)
    seen = Neighbours(other_paths(tmp_path, FINGERPRINT, None), FINGERPRINT, wrap)
    hold(other, 0, 1)
    assert seen.refresh() == ([key_of(1)], [])
    other.close()
    again, same = claim(tmp_path, SPEC._replace(slots=4), wrap)
    assert same == path
    hold(again, 0, 2)
    assert seen.refresh() == ([key_of(2)], [key_of(1)])
    path.unlink()
    assert seen.refresh() == ([], [key_of(2)])
    seen.close()


def test_what_one_stored_the_other_loads_from_memory_and_from_disk(pair):
    mine, other = pair
    assert other.save(1)
    assert other.save(2)
    assert other.spill(2)
    other.store.forget(key_of(2))
    refresh(mine)
    assert mine.load(1)
    assert mine.host.counts["host_promoted"] == 0
    assert mine.load(2)
    assert mine.host.counts["host_promoted"] == 1
    assert mine.load(2)
    assert mine.host.counts["host_promoted"] == 2, "it only passes through our memory"
    assert not mine.host.index.keys()
    assert mine.host.index.free == 4


def test_what_is_on_a_neighbours_disk_passes_through_the_one_slot_that_is_free(pair):
    mine, other = pair
    for seed in range(4):
        assert other.save(seed)
        assert other.spill(seed)
        other.store.forget(key_of(seed))
    for seed in (5, 6, 7):
        assert mine.save(seed)
    refresh(mine)
    tickets = {seed: mine.ticket() for seed in range(4)}
    for seed, ticket in tickets.items():
        assert mine.store.load(ticket, key_of(seed), 0, (10 + 2 * seed, 11 + 2 * seed))
    assert mine.settle() == dict.fromkeys(tickets.values(), "")
    assert all(mine.holds(seed, (10 + 2 * seed, 11 + 2 * seed)) for seed in tickets)
    assert mine.host.index.free == 1
    assert mine.host.index.keys() == [key_of(5), key_of(6), key_of(7)]


def test_what_was_saved_while_it_was_read_from_a_neighbours_disk_stays(pair):
    mine, other = pair
    assert other.save(1)
    assert other.spill(1)
    other.store.forget(key_of(1))
    refresh(mine)
    save, load = mine.ticket(), mine.ticket()
    assert mine.store.load(load, key_of(1), 0, (10, 11))
    mine.cache.fill((0, 1), 1)
    assert mine.store.save(save, key_of(1), 0, (0, 1))
    assert mine.settle() == {save: "", load: ""}
    assert mine.holds(1, (10, 11))
    assert mine.host.index.keys() == [key_of(1)]
    assert mine.host.index.free == 3


def test_a_vault_tells_what_came_and_what_went_of_either_kind(pair):
    mine, other = pair
    assert mine.store.look_around() == (set(), set())
    for seed in (1, 2):
        assert other.save(seed)
        assert other.spill(seed)
    other.store.forget(key_of(2))
    assert mine.store.look_around() == ({key_of(1), key_of(2)}, set())
    other.store.forget(key_of(1))
    assert mine.store.look_around() == (set(), set()), "the disk has both"
    other.store.forget_on_disk(key_of(2))
    assert mine.store.look_around() == (set(), {key_of(2)})


def test_a_slot_that_changes_while_it_is_read_is_a_miss(pair, monkeypatch):
    mine, other = pair
    assert other.save(1)
    refresh(mine)
    payload = other.host.index.arena.payload
    slot = other.host.index.slot_of(key_of(1))
    started = mine.slot_layout.move

    def overwritten(*arguments):
        payload(slot)[:100] ^= 1
        return started(*arguments)

    monkeypatch.setattr(mine.slot_layout, "move", overwritten)
    assert not mine.load(1)
    assert mine.host.counts["host_neighbour_reads_spoilt"] == 1
    assert mine.host.counts["host_digest_mismatches"] == 0, "nothing of ours is damaged"
    assert mine.host.take_lost() == []


def test_a_slot_on_disk_that_changes_while_it_is_read_is_a_miss(pair):
    mine, other = pair
    for seed in (1, 2):
        assert other.save(seed)
    assert other.spill(1)
    other.store.forget(key_of(1))
    refresh(mine)
    assert mine.load(1)
    mine.store.forget(key_of(1))
    mine.files[1].hold()
    ticket = mine.ticket()
    assert mine.store.load(ticket, key_of(1), 0, (10, 11))
    other.store.forget_on_disk(key_of(1))
    assert other.spill(2), "it is written where the other was"
    mine.files[1].let_go()
    assert mine.settle()[ticket] == "its writer overwrote it"
    assert mine.disk.counts["disk_neighbour_reads_spoilt"] == 1


def reading_from_disk(mine, other):
    """A load under way of what only the other's disk has: its number, and the file, held."""
    assert other.save(1) and other.spill(1)
    other.store.forget(key_of(1))
    refresh(mine)
    assert mine.load(1), "its file is open from now on"
    mine.files[1].hold()
    ticket = mine.ticket()
    assert mine.store.load(ticket, key_of(1), 0, (10, 11))
    mine.store.poll()
    return ticket, mine.files[1]


@pytest.mark.parametrize("comes_back", [True, False], ids=["replaced", "removed"])
def test_a_neighbours_file_that_goes_while_it_is_read_is_a_miss(pair, tmp_path, comes_back):
    """It used to end the runner, and with it the engine."""
    mine, other = pair
    ticket, file = reading_from_disk(mine, other)
    path = next((tmp_path / "disk").glob("*-1.kvarena"))
    other.close()
    if comes_back:
        spec = other.disk.index.arena.spec._replace(slots=2)
        assert claim(tmp_path / "disk", spec, FileBacking)[1] == path
    else:
        path.unlink()
    mine.store.look_around()
    file.let_go()
    assert mine.settle()[ticket] in ("", "its writer overwrote it")
    mine.store.look_around()
    assert file.closed, "the file of a neighbour that is gone is closed"
    assert mine.save(5) and mine.load(5)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_folder_that_cannot_be_looked_at_switches_neighbours_off_for_a_while(
    tmp_path, monkeypatch, caplog, code
):
    """It used to end the engine."""
    other, path = claim(tmp_path, SPEC)
    hold(other, 0, 1)
    clock = FakeClock()
    seen = Neighbours(other_paths(tmp_path, FINGERPRINT, None)[:1], FINGERPRINT, clock=clock)
    assert seen.refresh() == ([key_of(1)], [])
    stat, fails = Path.stat, [True]

    def failing(self, *args, **more):
        if fails and self == path:
            raise OSError(code, os.strerror(code))
        return stat(self, *args, **more)

    monkeypatch.setattr(Path, "stat", failing)
    assert seen.refresh() == ([], [key_of(1)])
    assert seen.find(key_of(1)) is None
    assert seen.counts["neighbours_switched_off"] == 1
    assert os.strerror(code) in caplog.text
    fails.clear()
    assert seen.refresh() == ([], []), "it is off still"
    clock.advance(OFF_S)
    assert seen.refresh() == ([key_of(1)], [])
    seen.close()


def test_a_neighbours_file_that_cannot_be_opened_or_read_is_a_miss(pair):
    mine, other = pair
    for seed in (1, 2):
        assert other.save(seed) and other.spill(seed)
        other.store.forget(key_of(seed))
    mine.open_error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    refresh(mine)
    assert not mine.load(1)
    assert mine.disk.counts["disk_reads_failed"] == 1
    assert mine.disk.neighbours.counts["neighbours_switched_off"] == 1
    assert not mine.load(2), "it is off"
    assert mine.disk.counts["disk_reads_failed"] == 1
    assert mine.save(5) and mine.spill(5)


def test_what_nobody_foresaw_at_the_end_of_a_read_costs_that_load_alone(pair, monkeypatch):
    mine, other = pair
    ticket, file = reading_from_disk(mine, other)

    def odd(_arena, _entry):
        raise ZeroDivisionError("odd")

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "still", odd)
        file.let_go()
        assert mine.settle()[ticket] == "ZeroDivisionError: odd"
    assert mine.disk.counts["disk_job_faults"] == 1
    assert mine.load(1)


def test_neighbours_do_not_stand_in_the_way_of_stores(pair):
    mine, other = pair
    for seed in range(4):
        assert other.save(seed)
        assert mine.save(seed + 10)
    assert not mine.save(20)
    refresh(mine)
    assert all(mine.load(seed) for seed in range(4))
