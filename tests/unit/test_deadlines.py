"""The heap of deadlines beside a dictionary of them."""

from hypothesis import given
from hypothesis import strategies as st

from kvconnect.deadlines import Deadlines

KEYS = st.sampled_from("abc")
TIMES = st.integers(0, 9)
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, TIMES),
    st.tuples(st.just("drop"), KEYS, st.just(0)),
    st.tuples(st.just("take"), st.just(""), TIMES),
)


@given(st.lists(STEPS, max_size=40))
def test_each_key_is_due_at_the_time_that_was_set_last(steps):
    deadlines, expected = Deadlines(), {}
    for what, key, time in steps:
        if what == "set":
            deadlines.set(key, time)
            expected[key] = time
        elif what == "drop":
            deadlines.drop(key)
            expected.pop(key, None)
        else:
            due = {key: when for key, when in expected.items() if when <= time}
            taken = list(deadlines.take(time))
            assert sorted(taken) == sorted(due)
            assert [due[key] for key in taken] == sorted(due.values())
            expected = {key: when for key, when in expected.items() if when > time}
        assert deadlines.next() == min(expected.values(), default=None)


def test_what_is_dropped_while_the_due_are_taken_is_not_taken():
    deadlines = Deadlines()
    for key in "abc":
        deadlines.set(key, 1)
    taken = []
    for key in deadlines.take(1):
        taken.append(key)
        deadlines.drop("b")
        deadlines.set("later", 2)
    assert taken == ["a", "c"] and deadlines.next() == 2


def test_a_deadline_that_is_put_off_keeps_its_one_entry():
    deadlines = Deadlines()
    deadlines.set("first", 0)
    for when in range(1, 1000):
        deadlines.set("renewed", when)
        assert deadlines.next() == 0
    assert len(deadlines) == 2


def test_a_deadline_that_moves_both_ways_leaves_nothing_once_its_times_have_passed():
    deadlines = Deadlines()
    for now in range(1000):
        deadlines.set("key", now)
        assert list(deadlines.take(now)) == ["key"]
        deadlines.set("key", now + 5)
    assert len(deadlines) < 10
