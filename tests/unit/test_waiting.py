"""What waits costs a mover's step nothing, and is looked at when there is something to do."""

import pytest
from kit.engines import Engine, World

from kvconnect.orders import Cancel, Fetch, Grant, Promise, Release, RenewLease
from kvconnect.testing import FakeClock, Fault

MANY = 400
BLOCKS = ((0, 5), (1, 2))


class CountingClock(FakeClock):
    """How often it was looked at says how much a step does: every look at a request asks it."""

    looks = 0

    def __call__(self):
        self.looks += 1
        return super().__call__()


@pytest.fixture
def rig():
    world = World()
    world.clock = CountingClock()
    return world, Engine(world, staging=(8, 1)), Engine(world, staging=(8, 1))


def greeting(world, p, d, names):
    """Fetches of an engine that says nothing."""
    world.network.held = True
    for name in names:
        terms = p.lend(name, [3, 1], seed=1, ttl_s=100.0)
        d.put(Fetch(name, p.source(terms), (BLOCKS,), 2, terms.digest))
    d.step()


def opening(world, p, d, names):
    """Fetches of what is still being computed."""
    for name in names:
        terms = p.terms(name, [3, 1], seed=1, ttl_s=100.0)
        p.put(Promise(name, terms.lease_id))
        d.put(Fetch(name, p.source(terms), (BLOCKS,), 2, terms.digest))
    world.go_on(8)


def renewing(world, p, d, names):
    """Requests that are yet to be scheduled."""
    for name in names:
        d.put(RenewLease(name, p.source(p.lend(name, [3, 1], seed=1, ttl_s=100.0))))
    world.go_on(8)


def releasing(world, p, d, names):
    """Releases of leases of an engine that says nothing."""
    world.network.held = True
    for name in names:
        d.put(Release(name, p.source(p.terms(name, [3, 1], seed=1))))
    d.step()


def reading(world, p, d, names):
    """Direct reads that hang."""
    for name in names:
        d.transports[0].plan(Fault.HANGS)
        terms = p.lend(name, [3, 1], seed=1, ttl_s=100.0)
        d.put(Fetch(name, p.source(terms), (BLOCKS,), 2, terms.digest))
    world.go_on(8)


@pytest.mark.parametrize("waiting", [greeting, opening, renewing, releasing, reading])
def test_a_step_looks_at_no_more_for_many_that_wait_than_for_one(rig, waiting):
    world, p, d = rig
    if waiting is reading:
        d = Engine(world, mode="direct")

    def looks():
        d.movers[0].step()
        before = world.clock.looks
        d.movers[0].step()
        d.movers[0].wait_s()
        return world.clock.looks - before

    waiting(world, p, d, ["first"])
    one = looks()
    waiting(world, p, d, [f"r{n}" for n in range(MANY)])
    assert sum(d.movers[0].held().values()) >= MANY
    assert looks() <= one + 4


def test_what_waits_is_looked_at_when_its_peer_its_call_or_the_time_says_so(rig):
    world, p, d = rig
    opening(world, p, d, ["computed", "aborted", "late"])
    d.put(Cancel("aborted"))
    p.put(Grant(p.lend("computed", [3, 1], seed=1)))
    world.go_on(6)
    assert d.ended == {"aborted": [None], "computed": [None]}
    assert d.caches[0].holds_fill(BLOCKS, seed=1)
    world.clock.advance(13.0)
    d.step()
    assert "not loaded within" in d.ended["late"][0]


def test_pulls_without_a_slot_go_on_when_there_is_one(rig):
    world, p, _ = rig
    d = Engine(world, mode="staged", staging=(4, 1))  # of which it receives in two
    seeds = {f"r{n}": n for n in range(6)}
    for name, seed in seeds.items():
        blocks = [seed]
        terms = p.lend(name, blocks, seed)
        d.put(Fetch(name, p.source(terms), (((0, seed),),), 1, terms.digest))
    world.go_on(60)
    assert d.ended == {name: [None] for name in seeds}
    assert all(d.caches[0].holds_fill([(0, seed)], seed) for seed in seeds.values())
