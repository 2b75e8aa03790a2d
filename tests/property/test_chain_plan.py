"""Chains: the plan is the cheapest there is, and a load ends with all that anybody could give."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.chain.plan import Hop, LoadPlan, Rates, SourceRate, plan

MOST = 6


@st.composite
def sources_of(draw, most_chunks=MOST):
    count = draw(st.integers(0, 3))
    costs = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    return [
        SourceRate(
            f"s{i}",
            draw(st.frozensets(st.integers(0, most_chunks - 1))),
            draw(costs),
            draw(costs),
        )
        for i in range(count)
    ]


def cost(chunks, chosen):
    """Of chunk ``i`` from source ``chosen[i]``."""
    total, last = 0.0, None
    for source in chosen:
        total += source.chunk_s + (source.start_s if source is not last else 0.0)
        last = source
    return total


@given(sources_of(), st.data())
def test_no_other_choice_is_cheaper(sources, data):
    everything = sorted(set().union(*(s.has for s in sources)))
    chunks = sorted(data.draw(st.sets(st.sampled_from(everything)))) if everything else []
    hops = plan(chunks, sources)
    assert sorted(c for hop in hops for c in hop.chunks) == chunks
    assert len({hop.source for hop in hops}) == len(hops)
    by_name = {source.name: source for source in sources}
    whose = {c: by_name[hop.source] for hop in hops for c in hop.chunks}
    assert all(c in source.has for c, source in whose.items())
    choices = itertools.product(*([s for s in sources if c in s.has] for c in chunks))
    least = min((cost(chunks, choice) for choice in choices), default=0.0)
    assert cost(chunks, [whose[c] for c in chunks]) == pytest.approx(least)


def test_a_source_that_begins_cheaper_need_not_be_the_cheapest():
    """The example in the docstring of `plan`."""
    peer, host = SourceRate("peer", range(3), 5.0, 1.0), SourceRate("host", range(2), 0.0, 4.0)
    assert plan([0], [peer, host]) == [Hop("host", (0,))]
    assert plan([0, 1, 2], [peer, host]) == [Hop("peer", (0, 1, 2))]


@given(sources_of(), st.data())
def test_a_load_ends_with_all_that_anybody_could_give(sources, data):
    chunks = sorted(data.draw(st.sets(st.integers(0, MOST - 1))))
    broken = {s.name: data.draw(st.sets(st.integers(0, MOST - 1))) for s in sources}
    load = LoadPlan(chunks, sources)
    running = load.start()
    assert load.start() == []
    tried, delivered = set(), set()
    while running:
        in_hops = [c for hop in running for c in hop.chunks]
        assert len(in_hops) == len(set(in_hops)), "a chunk is in two hops at a time"
        assert load.running
        hop = running.pop(data.draw(st.integers(0, len(running) - 1)))
        attempts = {(hop.source, chunk) for chunk in hop.chunks}
        assert not attempts & tried, "a chunk is asked of a source again"
        tried |= attempts
        failed = set(hop.chunks) & broken[hop.source]
        delivered |= set(hop.chunks) - failed
        more = load.ended(hop, failed)
        assert {c for h in more for c in h.chunks} <= failed
        running += more
    assert not load.running
    could = {c for s in sources for c in set(s.has) - broken[s.name]}
    assert delivered == set(chunks) & could
    assert load.failed == set(chunks) - could


def test_the_peers_prefix_and_the_hosts_tail_make_one_load():
    peer = SourceRate("peer", range(10), 0.01, 0.001)
    host = SourceRate("host", range(10, 16), 0.0, 0.0001)
    assert plan(range(16), [peer, host]) == [
        Hop("peer", tuple(range(10))),
        Hop("host", tuple(range(10, 16))),
    ]


def test_what_both_have_comes_from_the_cheaper_and_from_the_other_when_that_fails():
    peer = SourceRate("peer", range(10), 0.0, 0.1)
    host = SourceRate("host", range(4, 8), 0.0, 0.01)
    load = LoadPlan(range(10), [peer, host])
    one, two = load.start()
    assert (one, two) == (Hop("peer", (0, 1, 2, 3, 8, 9)), Hop("host", (4, 5, 6, 7)))
    assert load.ended(two, {5}) == [Hop("peer", (5,))]
    assert load.fell_back == [(two, Hop("peer", (5,)))]
    assert load.ended(one) == []
    assert load.ended(Hop("peer", (5,)), {5}) == []
    assert not load.running
    assert load.failed == {5}


def test_a_source_that_starts_slowly_is_not_asked_for_a_single_chunk():
    fast = SourceRate("fast", [0, 1, 3, 4], 0.0, 0.1)
    slow = SourceRate("slow", range(5), 1.0, 0.2)
    assert plan([0, 1, 3, 4], [fast, slow]) == [Hop("fast", (0, 1, 3, 4))]
    assert plan(range(5), [fast, slow]) == [Hop("fast", (0, 1, 3, 4)), Hop("slow", (2,))]


def test_thousands_of_chunks_are_planned():
    chunks = range(4000)
    sources = [SourceRate(str(i), chunks[i::2], 0.1, 1.0) for i in range(2)]
    assert [len(hop.chunks) for hop in plan(chunks, sources)] == [2000, 2000]


def test_rates_follow_what_is_measured():
    rates = Rates({"host": 1.0, "disk": 2.0})
    mb = 1 << 20
    assert (rates.start_s("disk"), rates.seconds("disk", 10)) == (0.0, 20.0)
    for _ in range(2):
        rates.measured("disk", 100, 1.0)
    rates.measured("disk", 10 * mb, 90 * mb)
    assert rates.seconds("disk", 10) == 20.0, "too small to say anything, or the first of all"
    rates.measured("disk", 10 * mb, 10 * mb)
    assert rates.seconds("disk", 10) == pytest.approx(10.0), "a guess is forgotten at once"
    rates.measured("disk", 10 * mb, 20 * mb)
    assert 14.0 < rates.seconds("disk", 10) < 17.0
    assert rates.seconds("host", 10) == 10.0


def test_what_a_source_takes_to_start_is_told_from_what_it_takes_per_byte():
    rates = Rates({"peer": 1.0})
    for mb in (1, 1, 64, 2, 32):
        rates.measured("peer", mb << 20, 0.005 + (mb << 20) * 1e-9)
    assert rates.start_s("peer") == pytest.approx(0.005)
    assert rates.seconds("peer", 10**9) == pytest.approx(1.0)
