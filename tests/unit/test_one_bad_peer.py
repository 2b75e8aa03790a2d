"""One peer that hangs, dies or fails costs its own requests, and no slot or second of others'."""

from dataclasses import replace

import pytest
from kit.engines import Engine, World
from late import LateKernels

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.lease import Terms
from kvconnect.ops import load
from kvconnect.orders import Fetch, Grant
from kvconnect.producer.stage import STALLED_S
from kvconnect.staging import GRANULE_BYTES, SCARCE_S, Slots, Staging
from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Fault, Plan
from kvconnect_bench.caches import Model

# a token of a layer takes 16 KiB, and a slot 64: a fetch of 32 tokens takes 24 chunks
MODEL = Model(layers=3, heads=4, block_tokens=4, content=2048, itemsize=2)
OPTIONS = {"num_blocks": 40, "mode": "staged", "staging": (16, 1), "lease_max_s": 3600.0}


def make(world, **options):
    return Engine(world, MODEL, **(OPTIONS | {"load_timeout_s": 60.0} | options))


class Load:
    """One load of a decode engine from a prefill engine, begun when it is made."""

    def __init__(self, p, d, name, first=8, ttl_s=600.0, tokens=32, block_tokens=4):
        self.world, self.d, self.name = p.world, d, name
        table = tuple(range(1, 1 + tokens // 4))
        self.seed = sum(name.encode())
        for cache in p.caches:
            cache.fill(table, self.seed)
        terms = Terms(name, f"lease {name}", (table,), tokens, b"d", ttl_s)
        p.put(Grant(terms))
        self.blocks = tuple(enumerate(range(first, first + tokens // block_tokens)))
        d.put(Fetch(name, p.source(terms), (self.blocks,), tokens, b"d"))
        self.began = self.world.clock()

    def seconds(self, most=130.0):
        """Lets all go on until it has ended, well; returns the seconds it took."""
        while self.name not in self.d.ended:
            assert self.world.clock() - self.began < most, f"{self.name} has not ended"
            self.world.go_on(5, seconds=0.02)
        assert self.d.ended[self.name] == [None]
        assert all(cache.holds_fill(self.blocks, self.seed) for cache in self.d.caches)
        return self.world.clock() - self.began


def hang(engine):
    """It does not take a step any more, as under SIGSTOP; its connections stay up."""
    engine.world.engines.remove(engine)


def resume(engine):
    engine.world.engines.append(engine)


def reader_of(p):
    """How prefill's transport calls who it wrote to last."""
    return p.transports[0].submitted[-1].peer


# -- a reader that hangs, and the engine that it reads from -------------------------------------


def hung_reader(readers=1):
    """A prefill engine amid writes that never end, to so many readers; and one that is well."""
    world = World()
    p, good = make(world), make(world)
    hung = [make(world) for _ in range(readers)]
    for i, d in enumerate((good, *hung)):
        Load(p, d, f"warm {i}").seconds()
    p.transports[0].usual = Plan(Fault.HANGS)
    for i, d in enumerate(hung):
        Load(p, d, f"hung {i}", ttl_s=30.0)
    world.go_on(40)
    for d in hung:
        hang(d)
    p.transports[0].usual = Plan()
    assert p.transports[0].running
    return world, p, hung, good


def test_a_reader_that_hangs_takes_no_second_from_the_others():
    """It used to hold every gather slot, without end: no other reader was served any more."""
    world, p, _, good = hung_reader()
    for i in range(3):
        assert Load(p, good, f"load {i}").seconds() < 1.0
        world.go_on(10, seconds=1.0)


def test_a_reader_that_hangs_gives_its_slots_back():
    """A write to a stopped process never ends by itself."""
    world, p, _, _ = hung_reader()
    world.go_on(8, seconds=STALLED_S / 4 + 0.1)
    assert not p.transports[0].running


def test_readers_that_hang_all_at_once_give_their_slots_back():
    world, p, hung, good = hung_reader(readers=6)
    world.go_on(10, seconds=2.0)
    assert not p.transports[0].running
    assert Load(p, good, "afterwards").seconds() < 1.0
    for d in hung:
        resume(d)
    world.go_on(30, seconds=3.0)
    for i, d in enumerate(hung):
        assert Load(p, d, f"again {i}").seconds() < 1.0


def test_a_reader_that_asks_for_much_does_not_make_another_wait_for_all_of_it():
    """Wants used to be served in the order in which they came, whoever asked."""
    world = World()
    p, few = make(world, staging=(4, 1)), make(world)
    many = make(world, staging=(64, 1), num_blocks=200)
    for i, d in enumerate((few, many)):
        Load(p, d, f"warm {i}").seconds()
    large = [Load(p, many, f"large {i}", first=8 + 20 * i) for i in range(4)]
    world.go_on(8)
    Load(p, few, "small", tokens=4).seconds()
    assert not any(load.name in many.ended for load in large)


class FailingKernels:
    """Kernels of which so many launches fail, as libkvc_cuda's do: with a TransportError."""

    def __init__(self, error):
        self.name = "cuda, failing"
        self.fail, self.error = 0, error
        self._kernels = load("cpu")

    def prepare(self, copies):
        prepared = self._kernels.prepare(copies)
        return _FailingPrepared(self, prepared)


class _FailingPrepared:
    def __init__(self, kernels, prepared):
        self._kernels, self._prepared = kernels, prepared

    def move(self, *a, **k):
        if self._kernels.fail:
            self._kernels.fail -= 1
            raise self._kernels.error
        return self._prepared.move(*a, **k)


@pytest.mark.parametrize("side", ["gathering", "scattering"])
def test_a_launch_that_fails_keeps_no_slot(side):
    """After as many as there are slots nobody was served any more."""
    kernels = FailingKernels(TransportError("out of memory"))
    world = World()
    p = make(world, staging=(4, 1), kernels=kernels if side == "gathering" else None)
    d = make(world, staging=(4, 1), kernels=kernels if side == "scattering" else None)
    Load(p, d, "warm", tokens=4).seconds()
    for i in range(6):
        kernels.fail = 2
        Load(p, d, f"fails {i}", tokens=4)
        world.go_on(40)
        kernels.fail = 0
    assert Load(p, d, "well", tokens=8).seconds() < 1.0


def test_a_device_that_does_not_finish_a_chunk_keeps_only_that_chunks_slot():
    world = World()
    kernels = LateKernels(load("cpu"))
    p, d, other = make(world, kernels=kernels), make(world), make(world)
    for i, one in enumerate((d, other)):
        Load(p, one, f"warm {i}").seconds()
    kernels.asked = 1500
    Load(p, d, "late")
    world.go_on(20)
    kernels.asked = 1
    assert Load(p, other, "meanwhile").seconds() < 1.0
    world.go_on(10, seconds=2.0)
    assert "the device did not gather it" in d.ended["late"][0]
    world.go_on(3000)
    assert Load(p, d, "again").seconds() < 1.0


def test_readers_whose_process_ended_are_forgotten():
    """Nobody is told of a link that arrived and broke: they and their peers were kept."""
    world = World()
    p = make(world)
    dropped = []
    drop_peer = p.transports[0].drop_peer
    p.transports[0].drop_peer = lambda name: dropped.append(name) or drop_peer(name)
    for i in range(3):
        d = make(world)
        Load(p, d, f"load {i}").seconds()
        d.stop()
        world.engines.remove(d)
    world.go_on(10, seconds=60.0)
    assert len(dropped) == 3


def test_a_reader_that_a_write_failed_to_reach_is_forgotten_at_once():
    world = World()
    p, d = make(world), make(world)
    Load(p, d, "warm").seconds()
    p.transports[0].usual = Plan(Fault.LOST)
    Load(p, d, "fails")
    while not p.transports[0].running:
        world.go_on(1)
    hang(d)
    world.go_on(6)
    assert p.movers[0].held()["staged_readers"] == 0


# -- a source that hangs, and the engine that reads it ------------------------------------------


def hung_source(sources=1):
    """A decode engine amid staged loads from sources that hang; and one that is well."""
    world = World()
    d, good = make(world), make(world)
    hung = [make(world) for _ in range(sources)]
    for i, p in enumerate((good, *hung)):
        Load(p, d, f"warm {i}").seconds()
    for i, p in enumerate(hung):
        Load(p, d, f"hung {i}")
        p.transports[0].usual = Plan(Fault.HANGS)
        world.go_on(20)
        hang(p)
    world.go_on(4)
    return world, hung, good, d


def test_a_source_that_hangs_takes_no_second_from_the_others():
    """It used to hold all slots until the load timed out, and then in quarantine: 127 s."""
    world, _, good, d = hung_source()
    slowest = 0.0
    for i in range(30):
        slowest = max(slowest, Load(good, d, f"load {i}").seconds())
        world.go_on(10, seconds=0.3)
    assert slowest < 1.0


def test_a_source_that_hangs_is_given_up_in_seconds():
    """Not at load_timeout, which is a minute."""
    world, _, _, d = hung_source()
    world.go_on(60, seconds=0.1)
    assert "has answered nothing for 5 s" in d.ended["hung 0"][0]


def test_a_source_that_hung_is_used_again_when_it_goes_on():
    world, (p,), _, d = hung_source()
    world.go_on(100, seconds=0.1)
    p.transports[0].forget_plans()
    resume(p)
    world.go_on(60, seconds=0.5)
    assert Load(p, d, "again").seconds() < 1.0


def test_a_source_that_hung_is_used_again_though_its_link_broke():
    """What it was asked over that one it never answers: its share was out of use for a minute."""
    world, (p,), _, d = hung_source()
    world.go_on(100, seconds=0.1)
    dialer = d.movers[0].dialer
    dialer.fail(dialer.greet(p.addresses[0]), "was silent for seconds")
    p.transports[0].forget_plans()
    resume(p)
    world.go_on(30, seconds=0.3)
    assert Load(p, d, "again").seconds() < 1.0


def test_a_sources_own_slots_stay_in_quarantine_for_a_while():
    """What it was asked a moment ago it may still be writing."""
    clock = FakeClock()
    slots = Slots(Staging(Region(GRANULE_BYTES, 8 * GRANULE_BYTES), GRANULE_BYTES), clock)
    for _ in range(4):
        slots.quarantine(slots.take("hung"), 60.0, lambda: False)
    assert slots.take("hung") is None
    clock.advance(SCARCE_S)
    assert slots.take("hung") is not None


def test_slots_of_a_source_that_goes_on_are_free_when_it_has_answered():
    """All are: of half of them each, a load of another source gets all it may."""
    world, (p,), good, d = hung_source()
    world.go_on(60, seconds=0.1)
    p.transports[0].forget_plans()
    resume(p)
    p.transports[0].lose_peer(reader_of(p))  # its writes end
    world.go_on(30, seconds=0.1)
    good.transports[0].usual = Plan(Fault.HANGS)
    Load(good, d, "load")
    world.go_on(20)
    assert good.transports[0].running == 4


def test_where_many_sources_hang_others_are_loaded_from_within_seconds():
    """No share can leave a slot to everybody; a quarantine is then cut short."""
    world, _, good, d = hung_source(sources=6)
    world.go_on(80, seconds=0.2)
    for i in range(4):
        assert Load(good, d, f"load {i}").seconds() < 2.0, "one slot at a time"
        world.go_on(5, seconds=1.0)


def test_a_source_that_is_slow_and_answers_is_waited_for():
    """Nothing filled for some seconds is no hang: it may have much to gather for others."""
    world = World()
    kernels = LateKernels(load("cpu"))
    p, d = make(world, kernels=kernels), make(world)
    Load(p, d, "warm").seconds()
    kernels.asked = 80  # times 0.1 s, and each chunk's write comes after it
    Load(p, d, "slow")
    world.go_on(1000, seconds=0.1)
    assert d.ended["slow"] == [None]


def test_a_source_that_answers_and_never_writes_is_given_up():
    """As one whose wire stalls, of a version that does not give up by itself."""
    world = World()
    p, d = make(world), make(world)
    Load(p, d, "warm").seconds()
    p.transports[0].usual = Plan(Fault.HANGS)
    p.transports[0].drop_peer = lambda name: None
    Load(p, d, "never")
    world.go_on(250, seconds=0.1)
    assert "has filled no chunk for 20 s" in d.ended["never"][0]


def test_a_chunk_of_a_lease_that_ended_is_not_waited_for():
    world = World()
    p, d = make(world), make(world)
    Load(p, d, "warm").seconds()
    p.transports[0].usual = Plan(Fault.HANGS)
    Load(p, d, "ends", ttl_s=2.0)
    world.go_on(60, seconds=0.1)
    assert d.ended["ends"] == ["the lease is over"]


# -- what one side knows of the other, and has lost ---------------------------------------------


@pytest.mark.parametrize("mode", ["staged", "auto"])
def test_a_reader_that_the_sources_transport_lost_is_staged_for_anew_within_the_load(mode):
    """Every later load used to fail until a restart: Stage was believed for ever."""
    world = World()
    p = make(world, mode=mode)
    d = Engine(world, replace(MODEL, block_tokens=8), **(OPTIONS | {"mode": mode}))
    for i in range(3):
        assert Load(p, d, f"load {i}", tokens=32, block_tokens=8).seconds() < 1.0
        p.transports[0].lose_peer(reader_of(p))


def test_a_reader_that_was_forgotten_for_others_is_staged_for_anew(monkeypatch):
    monkeypatch.setattr("kvconnect.producer.stage.MAX_READERS", 2)
    world = World()
    p, readers = make(world), [make(world) for _ in range(4)]
    for turn in range(2):
        for i, d in enumerate(readers):
            assert Load(p, d, f"load {turn} {i}").seconds() < 1.0


def test_a_reader_that_was_idle_for_long_is_staged_for_anew():
    world = World()
    p, d = make(world), make(world)
    Load(p, d, "warm").seconds()
    world.go_on(10, seconds=100.0)
    assert Load(p, d, "later").seconds() < 1.0


def test_a_reader_that_no_write_reaches_is_not_staged_for_without_end():
    world = World()
    p, d = make(world), make(world)
    Load(p, d, "warm").seconds()
    p.transports[0].usual = Plan(Fault.LOST)
    Load(p, d, "fails")
    world.go_on(60, seconds=0.1)
    assert "refused a chunk" in d.ended["fails"][0]
    assert len(p.transports[0].submitted) < 60
    p.transports[0].forget_plans()
    assert Load(p, d, "well").seconds() < 1.0


# -- what nobody expected -----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["p", "d"])
def test_an_unexpected_error_of_one_load_fails_that_load_alone(side):
    """It used to end the mover, and the engine with it."""
    kernels = FailingKernels(ZeroDivisionError("of nobody expected"))
    world = World()
    p = make(world, kernels=kernels if side == "p" else None)
    d, other = make(world, kernels=kernels if side == "d" else None), make(world)
    Load(p, d, "warm").seconds()
    kernels.fail = 2
    Load(p, d, "fails")
    world.go_on(30, seconds=0.1)
    assert "unexpected ZeroDivisionError: of nobody expected" in d.ended["fails"][0]
    kernels.fail = 0
    for one in (d, other):
        assert Load(p, one, "well").seconds() < 1.0
    told = (p if side == "p" else d).movers[0].take_stats()
    assert told["num_unexpected_errors"] >= 1
    world.go_on(10, seconds=1.0)
    assert p.movers[0].held()["gather_slots"] == d.movers[0].held()["receive_slots"] == 0


@pytest.mark.parametrize("mode", ["direct", "staged"])
def test_an_unexpected_error_of_one_peer_fails_that_peer_alone(mode):
    """As a transport's, of a library that raises what it never did before."""
    world = World()
    p, q, d, other = (make(world, mode=mode) for _ in range(4))
    add_peer = (d if mode == "direct" else p).transports[0].add_peer

    def odd(name, hello):
        if first:
            first.pop()
            raise RuntimeError("what is that")
        add_peer(name, hello)

    first = [1]
    (d if mode == "direct" else p).transports[0].add_peer = odd
    Load(p, d, "fails")
    world.go_on(30, seconds=0.1)
    assert "unexpected RuntimeError: what is that" in d.ended["fails"][0]
    assert Load(q, d, "of another").seconds() < 1.0
    assert Load(p, other, "for another").seconds() < 1.0
    assert Load(p, d, "again").seconds() < 1.0


def test_a_broken_invariant_of_ours_stops_the_mover():
    """Whoever goes on after that may serve what is wrong."""
    kernels = FailingKernels(AssertionError("so it cannot be"))
    world = World()
    p, d = make(world, kernels=kernels), make(world)
    kernels.fail = 1
    Load(p, d, "stops")
    with pytest.raises(AssertionError, match="so it cannot be"):
        world.go_on(30)


def test_a_write_that_fails_late_does_not_forget_who_has_staged_anew_since():
    """Chunks that were gathered for the new stage were refused as if their lease were over."""
    world = World()
    kernels = LateKernels(load("cpu"))
    p, d = make(world, kernels=kernels), make(world)
    Load(p, d, "warm").seconds()
    kernels.asked = 4
    staged = p.transports[0].submitted[-1].peer
    p.transports[0].plan(Fault.LOST)
    p.transports[0].plan(Fault.LOST, done_polls=12)
    p.transports[0].plan(Fault.LOST, done_polls=20)
    assert Load(p, d, "load").seconds() < 2.0
    # one of the three went to the new stage, and failed it
    assert len({work.peer for work in p.transports[0].submitted} - {staged}) == 2
