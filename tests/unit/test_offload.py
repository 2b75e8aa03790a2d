"""What OffloadTier asks of its ranks, one situation at a time."""

import pytest

from kvconnect.offload.cache import CacheTier
from kvconnect.offload.eviction import Lru
from kvconnect.offload.jobs import Fill, Forget, Loss, Save, Spill
from kvconnect.offload.store.runner import Runner
from kvconnect.offload.tiers import KeyedChunk, OffloadTier, Writes, common

A, B, C, D = (bytes([n]) * 32 for n in range(4))


def tier(capacity=2, disk=4, writes=Writes.THROUGH, ranks=1):
    under = CacheTier("disk", Lru(disk)) if disk else None
    return OffloadTier(CacheTier("host", Lru(capacity)), under, writes, ranks)


def chunks(*keys):
    return [KeyedChunk(key, 0, (2 * n, 2 * n + 1)) for n, key in enumerate(keys)]


def numbers(result, kind):
    return [job.number for job in result.jobs if isinstance(job, kind)]


def saved(one, *keys):
    """Store, and answer everything well."""
    todo = one.store(chunks(*keys)).jobs
    while todo:
        job = todo.pop(0)
        if not isinstance(job, Forget):
            todo += one.answered(job.number, True).jobs


def test_a_save_is_spilled_when_it_has_ended_well_and_its_blocks_are_free_then():
    one = tier()
    result = one.store(chunks(A))
    assert result.jobs == [Save(1, A, 0, (0, 1))]
    assert not one.has(A)
    result = one.answered(1, True)
    assert (result.saved, result.jobs) == ([1], [Spill(2, A)])
    assert one.has(A)
    assert one.busy
    assert one.answered(2, True).jobs == []
    assert not one.busy
    assert one.store(chunks(A)).jobs == []


def test_a_prefix_does_not_make_room_for_its_end_while_others_could():
    one = tier(capacity=3, disk=0)
    saved(one, A, B)
    saved(one, C)
    assert one.store(chunks(A, B, D)).jobs[0] == Forget(C, False)


def test_what_is_being_spilled_is_not_evicted_before_that():
    one = tier(capacity=1)
    one.store(chunks(A))
    (spill,) = one.answered(1, True).jobs
    assert one.store(chunks(B)).jobs == []
    assert one.host.counts["keys_skipped_all_pinned"] == 1
    one.answered(spill.number, True)
    assert one.store(chunks(B)).jobs == [Forget(A, False), Save(3, B, 0, (0, 1))]


def test_a_save_that_a_rank_skipped_is_forgotten_by_the_others():
    one = tier()
    one.store(chunks(A))
    result = one.answered(1, False)
    assert (result.saved, result.jobs) == ([1], [Forget(A, False)])
    assert not one.has(A)


def test_write_back_spills_who_is_evicted_before_it_is_forgotten():
    one = tier(capacity=1, writes=Writes.BACK)
    saved(one, A)
    assert not one.disk.holds(A)
    result = one.store(chunks(B))
    assert [type(job) for job in result.jobs] == [Spill, Forget, Save]
    assert [job.key for job in result.jobs] == [A, A, B]
    assert not one.has(A), "it is on its way"
    one.answered(numbers(result, Spill)[0], True)
    assert one.has(A)


def test_what_is_on_disk_takes_the_place_of_the_oldest():
    one = tier()
    saved(one, A)
    saved(one, B)
    saved(one, C)
    assert not one.host.holds(A)
    assert [one.has(key) for key in (A, B, C, D)] == [True, True, True, False]
    result = one.load("r", chunks(A, B))
    assert result.jobs == [
        Forget(C, False),  # B is pinned, though it is older
        Fill(7, A, 0, (0, 1)),
        Fill(8, B, 0, (2, 3)),
    ]
    assert result.loaded == {}
    assert one.answered(7, True).loaded == {}
    assert one.answered(8, True).loaded == {"r": []}
    assert one.host.holds(A)
    assert (one.counts["chunks_from_disk"], one.counts["chunks_from_host"]) == (1, 1)


def test_what_finds_no_room_is_failed_at_once_and_the_rest_is_loaded():
    one = tier(capacity=1)
    saved(one, A)
    saved(one, B)
    result = one.load("r", chunks(B, A))
    assert numbers(result, Fill) == [5]
    assert one.answered(5, True).loaded == {"r": [A]}
    assert one.counts["chunks_without_room"] == 1
    assert one.load("nothing", []).loaded == {"nothing": []}


def test_what_fails_on_one_rank_is_held_by_none():
    one = tier(capacity=1)
    saved(one, A)
    saved(one, B)
    result = one.load("r", chunks(A))
    result = one.answered(numbers(result, Fill)[0], False)
    assert (result.loaded, result.jobs) == ({"r": [A]}, [Forget(A, False)])
    assert one.has(A), "the disk was not found to be without it"
    assert one.lost(A, True).jobs == [Forget(A, True)]
    assert one.lost(A, True).jobs == []
    assert not one.has(A)


def test_of_two_loads_of_one_key_a_rank_may_keep_what_the_first_gave_up():
    one = tier(capacity=1)
    saved(one, A)
    saved(one, B)
    first = numbers(one.load("r1", chunks(A)), Fill)
    second = numbers(one.load("r2", chunks(A)), Fill)
    assert one.answered(first[0], False).jobs == [Forget(A, False)]
    result = one.answered(second[0], True)
    assert result.loaded == {"r2": []}
    assert result.jobs == [Forget(A, False)], "a slot would be lost for good"


def test_what_other_engines_hold_is_loaded_when_every_rank_sees_it():
    one = tier(ranks=2)
    one.other_engines([A, B], [])
    assert not one.has(A)
    one.other_engines([A], [])
    assert one.has(A) and not one.has(B)
    result = one.load("r", chunks(A))
    assert result.jobs == [Fill(1, A, 0, (0, 1))]
    result = one.answered(1, True)
    assert result.loaded == {"r": []}
    assert result.jobs == [Forget(A, False)], "a rank may have promoted it"
    one.other_engines([], [A])
    assert not one.has(A)


def test_what_is_said_to_have_left_before_it_was_said_to_have_come_does_not_count():
    """It used to be one less than nothing, for ever: it came, and was not seen."""
    one = tier()
    one.other_engines([], [A])
    one.other_engines([A], [])
    assert one.has(A)


def test_what_every_rank_found_is_known_and_the_rest_forgotten():
    kept, extra = common([[A, B, C], [C, A, D]])
    assert (kept, extra) == ([A, C], [{B}, {D}])
    assert common([]) == ([], [])
    one = tier(capacity=1)
    assert one.recovered(kept, [B]).jobs == [Forget(A, False)]
    assert one.has(C) and one.has(B)
    assert one.clear().jobs == [Forget(C, False), Forget(B, True)]


def test_what_is_being_saved_when_all_is_cleared_is_never_held():
    """It is of the weights that there were: it used to be found after they were updated."""
    one = tier()
    one.store(chunks(A))
    assert one.clear().jobs == []
    assert one.store(chunks(A)).jobs == [], "two saves of one key"
    result = one.answered(1, True)
    assert (result.saved, result.jobs) == ([1], [Forget(A, False)])
    assert not one.has(A) and not one.busy
    saved(one, A)
    assert one.has(A)


def test_what_is_being_written_to_disk_when_all_is_cleared_is_held_nowhere():
    one = tier()
    one.store(chunks(A))
    (spill,) = one.answered(1, True).jobs
    assert one.clear().jobs == [Forget(A, False)], "although it is pinned"
    assert not one.has(A)
    assert one.answered(spill.number, True).jobs == [Forget(A, True)]
    assert not one.has(A) and not one.busy
    assert one.host.size == one.disk.size == 0


def test_what_is_being_loaded_when_all_is_cleared_is_not_kept_for_others():
    one = tier(capacity=1)
    saved(one, A)
    saved(one, B)
    (number,) = numbers(one.load("r", chunks(A)), Fill)
    assert one.clear().jobs == [Forget(A, True), Forget(B, True)]
    result = one.answered(number, True)
    assert (result.loaded, result.jobs) == ({"r": []}, [Forget(A, False)])
    assert not one.has(A)


@pytest.mark.parametrize("disk", [0, 1])
def test_a_disk_that_is_full_of_what_is_needed_takes_nothing_more(disk):
    one = tier(disk=disk)
    saved(one, A)
    result = one.load("r", chunks(A))
    one.store(chunks(B))
    spilled = one.answered(numbers(result, Fill)[-1] + 1, True).jobs
    if disk:
        assert spilled == [Forget(A, True), Spill(5, B)]
    else:
        assert spilled == []


def test_a_rank_says_what_is_not_there(tmp_path):
    from store_bench import Bench

    bench = Bench(tmp_path)
    runner = Runner(bench.store)

    def carried_out(*jobs):
        """Of each job: why it failed; and what was lost."""
        runner.put(jobs)
        found, lost = {}, []
        while not found or bench.store.busy:
            runner.step()
            report = runner.take()
            found |= {done.id: done.error for done in report.done}
            lost += report.lost
        return found, lost

    gone = {1: "it is not where it was kept", 2: "memory does not hold it any more"}
    jobs = [Fill(1, A, 0, (0, 1)), Spill(2, B), Forget(C, True)]
    assert carried_out(*jobs) == (gone, [Loss(A, False), Loss(A, True), Loss(B, False)])
    assert carried_out(Save(3, D, 0, (0, 1))) == ({3: ""}, [])
    assert carried_out(Spill(4, D)) == ({4: ""}, [])
    assert carried_out(Spill(5, D)) == ({5: ""}, []), "it is there: so be it"
    assert (bench.store.keys(False), bench.store.keys(True)) == ([D], [D])
    bench.close()
