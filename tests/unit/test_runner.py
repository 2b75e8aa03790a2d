"""A rank's offloading thread, stepped by hand over a fake store."""

import threading
import time

import pytest
from fake_store import FakeStore

from kvconnect.offload.jobs import Fill, Forget, Save
from kvconnect.offload.store.runner import LOOK_AROUND_S, THREAD_NAME, Runner
from kvconnect.testing.clock import FakeClock

A, B = (bytes([n]) * 32 for n in range(2))


def runner(store=None, **options):
    store = store or FakeStore(list(range(16)), slots=2)
    return Runner(store, clock=FakeClock(), **options)


def answers(one):
    """All jobs that ended, in their order, until nothing happens any more: number, and error."""
    found = []
    for _ in range(20):
        one.step()
        found += [(done.id, done.error) for done in one.take().done]
    return found


def test_a_request_does_not_wait_behind_what_is_saved():
    one = runner()
    one.put([Save(1, A, 0, (0, 1))])
    assert answers(one) == [(1, "")]
    one.put([Save(2, B, 0, (2, 3)), Fill(3, A, 0, (4, 5))])
    assert [number for number, _ in answers(one)] == [3, 2]


def test_room_is_made_before_it_is_taken():
    one = runner(FakeStore(list(range(16)), slots=1))
    one.put([Save(1, A, 0, (0, 1))])
    answers(one)
    one.put([Save(2, B, 0, (2, 3)), Forget(A, False)])
    assert answers(one) == [(2, "")]


def test_nothing_is_read_before_the_device_has_computed_it():
    computed = []
    one = runner()
    one.put([Save(1, A, 0, (0, 1))], fence=lambda: bool(computed))
    one.put([Fill(2, A, 0, (4, 5))])
    assert [number for number, _ in answers(one)] == [2]  # a miss: it is not there yet
    computed.append(True)
    assert answers(one) == [(1, "")]


def test_before_the_engine_sleeps_everything_is_carried_out():
    """Its memory is given back then: who read or wrote it would end the process."""
    store = FakeStore(list(range(16)), slots=2)
    one = runner(store, pause=lambda: one.step())
    assert one.rest()
    store.late = 5
    one.put([Save(1, A, 0, (0, 1)), Forget(B, False), Fill(2, B, 0, (4, 5))])
    assert one.rest()
    assert not store.busy
    assert {answer.id for answer in one.take().done} == {1, 2}


def test_an_engine_whose_kv_is_still_read_does_not_sleep():
    clock = FakeClock()
    store = FakeStore(list(range(16)), slots=2)
    one = Runner(store, clock=clock, pause=lambda: clock.advance(1.0))
    one.put([Save(1, A, 0, (0, 1))], fence=lambda: False)
    one.step()
    assert not one.rest(within_s=3.0)


def test_bytes_are_counted_of_what_went_well():
    one = runner(block_bytes=[1000])
    one.put([Save(1, A, 0, (0, 1)), Fill(2, B, 0, (4, 5))])
    counts = {}
    for _ in range(10):
        one.step()
        counts |= one.take().counts
    assert counts["store_bytes"] == 2000
    assert "load_bytes" not in counts


class Beside(FakeStore):
    """Sees engines beside: what each look finds."""

    def __init__(self, *looks):
        super().__init__([0], slots=1)
        self.looks = list(looks)

    def look_around(self):
        return self.looks.pop(0) if self.looks else (set(), set())


@pytest.mark.parametrize("taken", [True, False], ids=["reported between", "not asked between"])
def test_what_came_and_went_is_reported_as_both_or_as_neither(taken):
    clock = FakeClock()
    one = Runner(Beside(({A, B}, set()), (set(), {A})), clock=clock)
    one.step()
    if taken:
        assert one.take().gained == {A, B}
    clock.advance(LOOK_AROUND_S)
    one.step()
    report = one.take()
    assert (report.gained, report.gone) == ((set(), {A}) if taken else ({B}, set()))


def test_its_thread_begins_with_what_it_is_told():
    """As to make its device the current one, before any call makes a context on another."""
    did, stepped = [], threading.Event()

    class Noting(FakeStore):
        def save(self, *args, **more):
            did.append("save")
            stepped.set()
            return super().save(*args, **more)

    one = runner(Noting([0, 1], slots=1))
    one.put([Save(1, A, 0, (0, 1))])
    one.start(lambda: did.append(threading.current_thread().name))
    assert stepped.wait(10) and one.close()
    assert did == [THREAD_NAME, "save"]


class Broken(FakeStore):
    """Saves fail in a way that nobody foresaw."""

    def __init__(self, error):
        super().__init__([0, 1, 2, 3], slots=2)
        self.error = error

    def save(self, job, key, *args):
        if key == A:
            raise self.error
        return super().save(job, key, *args)


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), OSError(5, "odd")])
def test_an_unexpected_exception_of_one_job_ends_that_job_alone(error, caplog):
    one = runner(Broken(error))
    one.put([Save(1, A, 0, (0, 1)), Save(2, B, 0, (2, 3))])
    ended = dict(answers(one))
    assert "odd" in ended[1] and ended[2] == ""
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)


def test_a_broken_invariant_ends_the_thread_and_is_raised_where_answers_are_taken():
    one = runner(Broken(AssertionError("a slot twice")))
    one.start()
    one.put([Save(1, A, 0, (0, 1))])

    def take_for_ever():
        while True:
            one.take()
            time.sleep(0.001)

    with pytest.raises(AssertionError, match="a slot twice"):
        take_for_ever()
    assert one.close()
    assert one.close()
