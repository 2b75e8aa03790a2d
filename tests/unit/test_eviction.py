"""Hit rates beside the best possible, and what a policy refuses."""

import pytest

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.eviction import POLICIES, make
from kvconnect_bench.traces import belady_hits, hits, scans, zipf

KEYS, ACCESSES = 2000, 20_000


@pytest.fixture(scope="module")
def trace():
    return zipf(KEYS, ACCESSES)


@pytest.fixture(scope="module")
def scanned(trace):
    return scans(trace, length=300, every=1000)


def plain_belady(capacity, trace):
    """By looking ahead at each eviction."""
    resident, found = set(), 0
    for at, key in enumerate(trace):
        found += key in resident
        resident.add(key)
        if len(resident) > capacity:
            ahead = trace[at + 1 :]
            resident.remove(max(resident, key=lambda k: ahead.index(k) if k in ahead else 1 << 30))
    return found


@pytest.mark.parametrize("capacity", [1, 3, 10, 40])
def test_the_reference_is_what_looking_ahead_gives(capacity):
    for seed in range(5):
        trace = zipf(50, 300, seed=seed)
        assert belady_hits(capacity, trace) == plain_belady(capacity, trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("part", [50, 10, 4])
def test_a_policy_comes_near_the_best_possible_on_zipf(name, part, trace):
    best = belady_hits(KEYS // part, trace)
    assert 0.6 * best < hits(make(name, KEYS // part), trace) <= best


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc"])
def test_scans_cost_it_less_than_they_cost_lru(name, scanned):
    capacity = KEYS // 10
    best = belady_hits(capacity, scanned)
    assert hits(make("lru", capacity), scanned) < hits(make(name, capacity), scanned) <= best


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_evicted_where_everything_is_pinned(name):
    policy = make(name, 3)
    for key in (b"a", b"b", b"c"):
        policy.insert(key)
        policy.pin(key)
    assert policy.insert(b"d") == (False, None)
    assert b"d" not in policy
    policy.unpin(b"b")
    assert policy.insert(b"d") == (True, b"b")


@pytest.mark.parametrize("name", POLICIES)
def test_it_holds_at_least_one_key(name):
    with pytest.raises(ValueError, match="at least one"):
        make(name, 0)


def test_an_unknown_policy_is_an_error_that_names_the_known():
    with pytest.raises(ConfigError, match="'fifo', expected one of lru, arc"):
        make("fifo", 10)


def test_who_asks_for_the_policy_that_was_cut_is_told_what_to_use():
    with pytest.raises(ConfigError, match="'s3fifo', which was cut; use 'arc'"):
        parse({"cpu_bytes_to_use": 1 << 20, "eviction_policy": "s3fifo"}, OffloadConfig, "test")
