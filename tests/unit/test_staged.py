"""The staged path between whole movers, over loopback: other geometries, faults, quarantine."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from kit.engines import Engine, World
from late import LateKernels

from kvconnect.control import wire
from kvconnect.lease import Terms
from kvconnect.ops import load
from kvconnect.orders import Cancel, Fetch, Grant
from kvconnect.staging import ENDED_S, GRANULE_BYTES, QUARANTINE_S
from kvconnect_bench.caches import Model

MODEL = Model(layers=3, heads=4, block_tokens=4, content=8, itemsize=2)
STAGING = (8, 1)


def blocks_for(tokens, size):
    return -(-tokens // size)


def holds(engine, table, seed, tokens):
    return all(c.holds_fill(tuple(enumerate(table)), seed, tokens) for c in engine.caches)


def make(world, model=MODEL, **options):
    return Engine(world, model, **({"num_blocks": 12, "staging": STAGING} | options))


def lend(engine, request_id, table, tokens, seed, ttl_s=5.0):
    for cache in engine.caches:
        cache.fill(table, seed)
    terms = Terms(request_id, f"lease_id {request_id}", (table,), tokens, b"d", ttl_s)
    engine.put(Grant(terms))
    return terms


def fetch(p, d, terms, table, request_id="d"):
    d.put(
        Fetch(request_id, p.source(terms), (tuple(enumerate(table)),), terms.tokens, terms.digest)
    )


@pytest.mark.parametrize("tp", [(1, 1), (1, 2), (2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 16), (16, 4), (6, 4)], ids=str)
@pytest.mark.parametrize("layouts", [("LBHNC", "LBNHC"), ("BHLNC", "LHBNC")], ids=str)
def test_any_block_size_layout_and_tp(sizes, tp, layouts):
    world = World()
    models = [replace(MODEL, block_tokens=size) for size in sizes]
    p = make(world, models[0], tp_size=tp[0], layout=layouts[0], mode="staged", num_blocks=20)
    d = make(world, models[1], tp_size=tp[1], layout=layouts[1], mode="staged", num_blocks=20)
    source = tuple(reversed(range(2, 2 + blocks_for(30, sizes[0]))))
    target = tuple(range(3, 3 + blocks_for(30, sizes[1])))
    terms = lend(p, "r", source, 30, seed=1)
    before = [c.memory.copy() for c in p.caches]
    fetch(p, d, terms, target)
    world.go_on(30)
    assert d.ended == {"d": [None] * tp[1]}
    assert holds(d, target, 1, 30)
    assert all(np.array_equal(c.memory, b) for c, b in zip(p.caches, before, strict=True))
    assert set(p.sent) == {"r"}


@pytest.mark.parametrize("granules", [(1, 4), (4, 1)], ids=str)
def test_slots_of_other_sizes(granules):
    """staging_bytes may differ: a chunk has to fit the smaller of both sides' slots."""
    world, model = World(), replace(MODEL, content=64)
    p = make(world, model, mode="staged", staging=(8, granules[0]))
    d = make(world, model, mode="staged", staging=(8, granules[1]))
    table = (3, 1, 9, 2, 7, 5, 4, 0, 8, 6, 11)
    terms = lend(p, "r", table, 43, seed=5)
    fetch(p, d, terms, table)
    world.go_on(60)
    assert d.ended == {"d": [None]}
    assert holds(d, table, 5, 43)


def test_more_chunks_than_slots():
    world = World()
    model = replace(MODEL, content=2048)  # a token of a layer: 16 KiB, a slot 64 KiB
    p, d = (make(world, model, mode="staged", staging=(4, 1)) for _ in range(2))
    terms = lend(p, "r", tuple(range(10)), 39, seed=2)
    fetch(p, d, terms, tuple(range(1, 11)))
    world.go_on(100)
    assert d.ended == {"d": [None]}
    assert holds(d, range(1, 11), 2, 39)
    assert d.movers[0].held()["receive_slots"] == 0, "all slots are free again"


def test_auto_stages_what_cannot_be_read_directly_and_reads_the_rest():
    world = World()
    p = make(world)
    same, other = make(world), make(world, replace(MODEL, block_tokens=8))
    for i, (d, table) in enumerate(((same, (1, 2, 3)), (other, (4, 5)))):
        terms = lend(p, f"r{i}", (7, 8, 9), 9, seed=3)
        fetch(p, d, terms, table)
        world.go_on(30)
        assert d.ended == {"d": [None]}
        assert holds(d, table, 3, 9)
    assert same.transports[0].submitted and not other.transports[0].submitted


def test_dtypes_are_converted():
    world = World()
    p = make(world, replace(MODEL, dtype="bfloat16"))
    d = make(world, replace(MODEL, dtype="fp8_e4m3", scales=(0.5, 2.0), block_tokens=16))
    terms = lend(p, "r", (7, 8, 9), 9, seed=3)
    fetch(p, d, terms, (4,))
    world.go_on(30)
    assert d.ended == {"d": [None]}
    assert holds(d, (4,), 3, 9)


def test_where_nobody_stages_the_difference_is_named():
    world = World()
    p, d = make(world, staging=None), make(world, replace(MODEL, block_tokens=8))
    terms = lend(p, "r", (7, 8, 9), 9, seed=3)
    fetch(p, d, terms, (4, 5))
    world.go_on(30)
    (reason,) = d.ended["d"]
    assert "blocks of 4 and 8 tokens" in reason
    assert "does not stage" in reason


@pytest.mark.parametrize("late", ["", "p", "d", "pd"])
def test_kernels_of_a_device_move_bytes_when_they_come_to_it(late):
    world, kernels = World(), {}
    for side in late:
        kernels[side] = LateKernels(load("cpu"))
        kernels[side].asked = 4
    p = make(world, mode="staged", staging=(4, 1), kernels=kernels.get("p"))
    d = make(world, mode="staged", staging=(4, 1), kernels=kernels.get("d"))
    terms = lend(p, "r", (7, 8, 9), 9, seed=6)
    fetch(p, d, terms, (4, 5, 1))
    world.go_on(60)
    assert d.ended == {"d": [None]}
    assert holds(d, (4, 5, 1), 6, 9)


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_device_that_fails_fails_the_fetch_and_nothing_else(side):
    world = World()
    broken = LateKernels(load("cpu"))
    broken.fails = True
    p = make(world, mode="staged", kernels=broken if side == "p" else None)
    d = make(world, mode="staged", kernels=broken if side == "d" else None)
    terms = lend(p, "r", (7, 8, 9), 9, seed=6)
    fetch(p, d, terms, (4, 5, 1))
    world.go_on(60)
    assert "the device failed" in d.ended["d"][0]
    assert p.movers[0].held()["gather_slots"] == d.movers[0].held()["receive_slots"] == 0


def test_what_can_be_read_directly_is_staged_where_the_other_side_allows_nothing_else():
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="auto")
    terms = lend(p, "r", (7, 8, 9), 9, seed=6)
    fetch(p, d, terms, (4, 5, 1))
    world.go_on(40)
    assert d.ended == {"d": [None]}
    ((path,),) = d.movers[0].paths().values()
    assert path.route is None and path.staged


def test_one_lease_after_another():
    """Each has tables of its own."""
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="staged")
    for number, (theirs, ours) in enumerate((((7, 8, 9), (1, 2, 3)), ((2, 0, 11), (4, 6, 5)))):
        terms = lend(p, f"r{number}", theirs, 9, seed=number)
        fetch(p, d, terms, ours, f"d{number}")
        world.go_on(30)
        assert d.ended[f"d{number}"] == [None]
        assert holds(d, ours, number, 9)


def test_a_refused_stage_is_asked_again():
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="staged")
    add = p.transports[0].add_peer
    p.transports[0].add_peer = lambda name, hello: add(name, b"not yet")
    fetch(p, d, lend(p, "r", (7, 8, 9), 9, seed=6), (4, 5, 1))
    world.go_on(30)
    assert "refused to stage" in d.ended["d"][0]
    p.transports[0].add_peer = add
    fetch(p, d, lend(p, "s", (7, 8, 9), 9, seed=7), (4, 5, 1), "e")
    world.go_on(30)
    assert d.ended["e"] == [None]
    assert holds(d, (4, 5, 1), 7, 9)


def test_blocks_that_a_device_still_writes_to_are_not_given_back():
    """Aborted or not: they get a new owner as soon as the fetch is reported."""
    world = World()
    kernels = LateKernels(load("cpu"))
    kernels.asked = 1000
    p, d = make(world, mode="staged"), make(world, mode="staged", kernels=kernels)
    fetch(p, d, lend(p, "r", (7, 8, 9), 9, seed=6), (4, 5, 1))
    world.go_on(30)
    d.put(Cancel("d"))
    world.go_on(30)
    assert d.ended == {}
    world.go_on(1000)
    assert d.ended == {"d": [None]}


def test_a_lease_that_ends_while_its_blocks_are_gathered():
    world = World()
    kernels = LateKernels(load("cpu"))
    kernels.asked = 40
    p, d = make(world, mode="staged", kernels=kernels), make(world, mode="staged")
    fetch(p, d, lend(p, "r", (7, 8, 9), 9, seed=6, ttl_s=2.0), (4, 5, 1))
    world.go_on(20)
    assert p.movers[0].held()["chunks_sending"]
    world.clock.advance(3.0)
    world.go_on(60)
    assert "the lease is over" in d.ended["d"][0]
    assert not d.arenas[0].any()


def test_a_repeated_want_is_gathered_once():
    world, gathered = World(), []
    kernels = LateKernels(load("cpu"))
    kernels.asked = 30
    prepare = kernels.prepare

    def counting(copies):
        prepared = prepare(copies)
        move = prepared.move
        prepared.move = lambda *a: gathered.append(a[0]) or move(*a)
        return prepared

    kernels.prepare = counting
    p, d = make(world, mode="staged", kernels=kernels), make(world, mode="staged")
    fetch(p, d, lend(p, "r", (7, 8, 9), 9, seed=6), (4, 5, 1))
    world.go_on(15)
    once = len(gathered)
    for _ in range(3):
        world.clock.advance(1.0)  # D repeats what is not answered
        world.go_on(3)
    world.go_on(60)
    assert d.ended == {"d": [None]}
    assert 0 < once == len(gathered)


def test_chunks_that_a_source_has_no_room_for_are_asked_for_again(monkeypatch):
    """They used to fail their load, as if the source could not do it."""
    monkeypatch.setattr("kvconnect.producer.stage.MAX_WAITING", 1)
    world, model = World(), replace(MODEL, content=64)
    p = make(world, model, mode="staged", staging=(2, 1))
    d = make(world, model, mode="staged", staging=(16, 1))
    table = (3, 1, 9, 2, 7, 5, 4, 0, 8, 6, 11, 10)
    fetch(p, d, lend(p, "r", table, 48, seed=5), table)
    world.go_on(60, seconds=0.05)
    assert d.ended == {"d": [None]}
    assert holds(d, table, 5, 48)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"arena": wire.Granules(1 << 40, 4096, 8)}, "granules of 4096 bytes"),
        ({"arena": wire.Granules((1 << 63) - 1, GRANULE_BYTES, 8)}, "beyond 63-bit"),
    ],
    ids=["granules", "addresses"],
)
def test_a_hostile_stage_is_refused(change, why):
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="staged")
    fetch(p, d, lend(p, "r", (7, 8, 9), 9, seed=6), (4, 5, 1))
    dialer = d.movers[0].dialer
    tell = dialer.calls.tell

    def altered(peer, message):
        stages = isinstance(message, wire.Stage)
        tell(peer, msgspec.structs.replace(message, **change) if stages else message)

    dialer.calls.tell = altered
    world.go_on(30)
    assert "refused to stage" in d.ended["d"][0] and why in d.ended["d"][0]


def test_pieces_of_two_groups_are_not_one_chunk():
    world = World()
    model = replace(MODEL, groups=2)
    p, d = make(world, model, mode="staged"), make(world, model, mode="staged")
    for cache in p.caches:
        cache.fill((7, 8), 6)
    p.put(Grant(Terms("r", "g", ((7, 8), (7, 8)), 8, b"d", 5.0)))
    blocks = (((0, 1), (1, 2)), ((0, 1), (1, 2)))
    source = p.source(Terms("r", "g", ((7, 8), (7, 8)), 8, b"d", 5.0))
    d.put(Fetch("d", source, blocks, 8, b"d"))
    tell = d.movers[0].dialer.calls.tell

    def altered(peer, message):
        if isinstance(message, wire.Want):
            message = msgspec.structs.replace(message, first=0, count=3)
        tell(peer, message)

    d.movers[0].dialer.calls.tell = altered
    world.go_on(30)
    assert "not all of one group" in d.ended["d"][0]


@pytest.fixture
def staged():
    """A prefill and a decode engine with a fetch under way, their frames held."""
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="staged")
    terms = lend(p, "r", (7, 8, 9), 9, seed=4)
    fetch(p, d, terms, (1, 2, 3))
    return world, p, d


def until_filled(world, p, d):
    """Go on until P has answered a Want whose answer D has not seen."""
    world.network.held = True
    for _ in range(60):
        for one in world.engines:
            one.step()
        if d.arenas[0].any():
            return
        world.network.flush()
    pytest.fail("nothing was written")


def test_a_flipped_bit_fails_the_fetch(staged):
    world, p, d = staged
    until_filled(world, p, d)
    at = np.flatnonzero(d.arenas[0])[0]
    d.arenas[0][at] ^= 4
    world.network.held = False
    world.network.flush()
    world.go_on(30)
    assert "checksum" in d.ended["d"][0]
    assert p.sent == ["r"]


def test_swapped_tokens_fail_the_fetch(staged):
    world, p, d = staged
    until_filled(world, p, d)
    row = MODEL.content // 2 * MODEL.itemsize
    start = np.flatnonzero(d.arenas[0])[0] // GRANULE_BYTES * GRANULE_BYTES
    rows = d.arenas[0][start : start + 2 * row]
    rows[:] = np.concatenate([rows[row:], rows[:row]])
    world.network.held = False
    world.network.flush()
    world.go_on(30)
    assert "checksum" in d.ended["d"][0]


def test_a_truncated_chunk_fails_the_fetch(staged):
    world, p, d = staged
    until_filled(world, p, d)
    last = np.flatnonzero(d.arenas[0])[-1]
    d.arenas[0][last - 40 : last + 1] = 0
    world.network.held = False
    world.network.flush()
    world.go_on(30)
    assert "checksum" in d.ended["d"][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sums": b""}, "checksum"),
        ({"sums": b"seven b"}, "checksum"),
        ({"sums": bytes(8 * 50)}, "checksum"),
        ({"nbytes": 1}, "wrote 1 bytes"),
    ],
    ids=["no sums", "half a sum", "more sums", "bytes"],
)
def test_a_hostile_answer_fails_the_fetch_and_nothing_else(staged, change, why):
    world, p, d = staged
    listener = p.movers[0].listener
    answer = listener.answer

    def altered(link, message):
        if isinstance(message, wire.Filled):
            message = msgspec.structs.replace(message, **change)
        answer(link, message)

    listener.answer = altered
    world.go_on(30)
    assert why in d.ended["d"][0]


def test_a_slot_that_may_still_be_written_is_quarantined(staged):
    world, p, d = staged
    until_filled(world, p, d)
    slots = d.movers[0].receive_slots
    d.put(Cancel("d"))
    world.network.pending.clear()  # P's answers are lost, and so will be whatever comes
    p.stop()
    for _ in range(3):
        d.step()
    assert d.ended == {"d": [None]}, "an aborted request is reported, without a reason"
    assert slots.free < 4
    world.clock.advance(QUARANTINE_S)
    d.step()
    assert slots.free == 4


def test_slots_of_a_source_that_ended_are_soon_there_for_others(staged):
    """They used to be out of use for a minute, and with them every staged load of the rank."""
    world, p, d = staged
    until_filled(world, p, d)
    slots = d.movers[0].receive_slots
    world.network.pending.clear()
    p.stop()
    world.network.flush()
    d.step()
    d.step()
    assert "closed the connection" in d.ended["d"][0]
    assert slots.free < 4, "what is on the wire may still arrive"
    world.clock.advance(ENDED_S)
    d.step()
    assert slots.free == 4


def test_an_answer_ends_the_quarantine(staged):
    world, p, d = staged
    until_filled(world, p, d)
    slots = d.movers[0].receive_slots
    d.put(Cancel("d"))
    d.step()
    assert slots.free < 4
    world.network.held = False
    world.network.flush()
    d.step()
    assert slots.free == 4


def test_an_answer_after_the_fetch_has_timed_out_ends_the_quarantine_too(staged):
    """Else one slow chunk would keep its slot from all others for a minute."""
    world, p, d = staged
    until_filled(world, p, d)
    slots = d.movers[0].receive_slots
    world.clock.advance(13.0)  # load_timeout_s is 12
    d.step()
    d.step()
    assert "not loaded within 12 s" in d.ended["d"][0]
    assert slots.free < 4
    world.network.held = False
    world.network.flush()
    world.go_on(3)
    assert slots.free == 4


def test_an_answer_after_the_quarantine_frees_nobody_elses_slot(staged):
    world, p, d = staged
    until_filled(world, p, d)
    slots = d.movers[0].receive_slots
    d.put(Cancel("d"))
    d.step()
    world.clock.advance(QUARANTINE_S)
    d.step()
    assert slots.free == 4
    taken = [slots.take(f"owner {i}") for i in range(4)]
    world.network.held = False
    world.network.flush()
    world.go_on(3)
    assert None not in taken and slots.free == 0


def test_a_lease_that_ended_is_not_gathered():
    world = World()
    p, d = make(world, mode="staged"), make(world, mode="staged")
    terms = lend(p, "r", (7, 8, 9), 9, seed=4, ttl_s=2.0)
    fetch(p, d, terms, (1, 2, 3))
    world.network.held = True
    for _ in range(60):
        world.network.flush()
        for one in world.engines:
            one.step()
        if p.movers[0].held()["staged_readers"]:
            break
    world.clock.advance(3.0)  # between Stage and Want
    world.network.held = False
    world.network.flush()
    world.go_on(30)
    assert "over" in d.ended["d"][0]
    assert not d.arenas[0].any()
    assert p.sent == ["r"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"granule": 1 << 20}, "granules"),
        ({"runs": ((0, 1000),)}, "leased"),
        ({"runs": ((0, 0),)}, "wanted"),
        ({"runs": ((0, 9), (0, 0))}, "wanted"),
        ({"group": 3}, "group"),
        ({"first": 5}, "slices"),
        ({"nbytes": 1 << 30}, "expected at most our slots'"),
        ({"lease_id": "another"}, "no such lease"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_hostile_want_is_refused(staged, change, why):
    world, _, d = staged
    dialer = d.movers[0].dialer
    call = dialer.calls.send

    def altered(peer, make, *others):
        def make_altered(seq):
            made = make(seq)
            wants = isinstance(made, wire.Want)
            return msgspec.structs.replace(made, **change) if wants else made

        return call(peer, make_altered, *others)

    dialer.calls.send = altered
    world.go_on(30)
    assert "refused a chunk" in d.ended["d"][0]
    assert why in d.ended["d"][0]
    assert not d.arenas[0].any()
