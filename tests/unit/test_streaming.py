"""Streaming hand-over between whole movers: blocks cross while the rest is computed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from kit.engines import Engine, World
from kit.prefill import Prefill, fetch_early, scribble
from late import LateKernels
from msgspec import structs

from kvconnect.consumer import follow
from kvconnect.consumer.stage import StagedPath
from kvconnect.control import wire
from kvconnect.ops import load
from kvconnect.orders import Cancel
from kvconnect.producer import waiting
from kvconnect.testing import FakeClock, Fault
from kvconnect_bench.caches import Model

MODEL = Model(layers=3, heads=4, block_tokens=4, content=8, itemsize=2)
STAGING = (8, 1)


def make(world, model=MODEL, **options):
    return Engine(world, model, **({"num_blocks": 20, "staging": STAGING} | options))


def holds(engine, table, seed, tokens):
    return all(c.holds_fill(tuple(enumerate(table)), seed, tokens) for c in engine.caches)


def nothing_is_held(*engines):
    for engine in engines:
        for mover, transport in zip(engine.movers, engine.transports, strict=True):
            held = mover.held()
            held.pop("staged_readers", None)
            assert not any(held.values()), held
            assert transport.running == 0
            assert mover.wait_s() > 0.5, "an idle mover spins"


def early_pair(computed=0):
    """A prompt of 30 tokens that one engine computes, and another was asked for at once."""
    world = World()
    p, d = make(world), make(world)
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8))
    if computed:
        prefill.compute(computed)
        world.go_on(30)
    return world, p, d, prefill


@pytest.mark.parametrize("mode", ["auto", "staged", "direct"])
@pytest.mark.parametrize("tp", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_blocks_cross_while_the_rest_is_computed(mode, tp):
    world = World()
    p, d = make(world, tp_size=tp[0], mode=mode), make(world, tp_size=tp[1], mode=mode)
    prefill, table = Prefill(p, 30, seed=1), (5, 4, 9, 8, 1, 0, 2, 3)
    fetch_early(d, "d", prefill, table)
    for tokens in (0, 8, 13, 24):
        prefill.compute(tokens)
        world.go_on(30)
        assert holds(d, table[: tokens // 4], 1, tokens // 4 * 4), f"at {tokens} tokens"
        assert d.ended == {}, "nothing is received before the lease is granted"
        assert all(m.held().get("receive_slots", 0) == 0 for m in d.movers), "no slot waits"
        assert all(m.wait_s() > 0.01 for m in p.movers), "prefill polls only while it is read"
    prefill.finish()
    world.go_on(30)
    assert d.ended == {"d": [None] * tp[1]}
    assert holds(d, table, 1, 30)
    assert p.sent == [prefill.request_id] * tp[0]
    assert [m.take_stats().get("num_streamed_transfers") for m in d.movers] == [1] * tp[1]
    nothing_is_held(p, d)


@pytest.mark.parametrize(("mode", "size"), [("direct", 4), ("staged", 4), ("staged", 16)])
def test_what_has_crossed_does_not_cross_again(mode, size):
    world = World()
    p, d = make(world, mode=mode), make(world, replace(MODEL, block_tokens=size), mode=mode)
    prefill = Prefill(p, 32, seed=1)
    fetch_early(d, "d", prefill, range(32 // size))
    for tokens in (8, 16, 24):
        prefill.compute(tokens)
        world.go_on(30)
    prefill.finish()
    world.go_on(30)
    assert d.ended == {"d": [None]}
    moved = (d if mode == "direct" else p).transports[0].submitted
    block_bytes = MODEL.layers * MODEL.heads * MODEL.block_tokens * MODEL.content * MODEL.itemsize
    assert [work.nbytes for work in moved] == [2 * block_bytes] * 4


@pytest.mark.parametrize("sizes", [(4, 16), (16, 4), (6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("tp", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_any_block_size_and_tp(sizes, tp):
    world = World()
    p, d = (
        make(world, replace(MODEL, block_tokens=size), tp_size=ranks, mode="staged", layout=layout)
        for size, ranks, layout in zip(sizes, tp, ("LBHNC", "BLNHC"), strict=True)
    )
    prefill, table = Prefill(p, 45, seed=3), tuple(reversed(range(-(-45 // sizes[1]))))
    fetch_early(d, "d", prefill, table)
    for tokens in (5, 12, 31, 33, 44):
        prefill.compute(tokens)
        world.go_on(40)
        complete = tokens // sizes[0] * sizes[0]
        assert holds(d, table[: -(-complete // sizes[1])], 3, complete)
    prefill.finish()
    world.go_on(40)
    assert d.ended == {"d": [None] * tp[1]}
    assert holds(d, table, 3, 45)
    nothing_is_held(p, d)


def test_dtypes_are_converted():
    world = World()
    p = make(world, replace(MODEL, dtype="bfloat16"), tp_size=2)
    fp8 = replace(MODEL, dtype="fp8_e4m3", scales=(0.5, 2.0), block_tokens=16)
    d = make(world, fp8)
    prefill = Prefill(p, 30, seed=3)
    fetch_early(d, "d", prefill, (4, 7))
    prefill.compute(20)
    world.go_on(40)
    assert holds(d, (4, 7), 3, 20)
    prefill.finish()
    world.go_on(40)
    assert d.ended == {"d": [None]}
    assert holds(d, (4, 7), 3, 30)


def test_cells_without_tokens_are_filled_as_in_a_pull():
    world = World()
    p = make(world, mode="staged")
    sixteens = replace(MODEL, block_tokens=16)
    streaming, pulling = (make(world, sixteens, mode="staged") for _ in range(2))
    prefill = Prefill(p, 21, seed=3)
    fetch_early(streaming, "d", prefill, (4, 7))
    for tokens in (4, 18, 20):
        prefill.compute(tokens)
        world.go_on(40)
    prefill.finish()
    fetch_early(pulling, "d", prefill, (4, 7))
    world.go_on(40)
    assert streaming.ended == pulling.ended == {"d": [None]}
    for layer in MODEL.names:
        for part in range(2):
            blocks = [e.caches[0].cells(layer, part)[[4, 7]] for e in (streaming, pulling)]
            assert np.array_equal(*blocks)


def test_blocks_of_our_own_prefix_are_left_alone():
    world = World()
    p, d = make(world), make(world)
    prefill = Prefill(p, 30, seed=1)
    d.caches[0].fill((5, 4, 9), 1)
    before = d.caches[0].memory.copy()
    fetch_early(d, "d", prefill, ((3, 8), (4, 1), (5, 0), (6, 2), (7, 3)))
    prefill.compute(12)
    world.go_on(30)
    assert np.array_equal(d.caches[0].memory, before), "it has all of that"
    prefill.compute(20)
    world.go_on(30)
    assert holds(d, (5, 4, 9, 8, 1), 1, 20)
    prefill.finish()
    world.go_on(30)
    assert d.ended == {"d": [None]}
    assert holds(d, (5, 4, 9, 8, 1, 0, 2, 3), 1, 30)


@pytest.mark.parametrize("mode", ["auto", "staged"])
@pytest.mark.parametrize("at", range(12))
def test_a_preempted_request_is_read_anew(mode, at):
    world = World()
    p, d = make(world, tp_size=2, mode=mode), make(world, mode=mode)
    prefill, table = Prefill(p, 30, seed=1), (5, 4, 9, 8, 1, 0, 2, 3)
    fetch_early(d, "d", prefill, table)
    prefill.compute(8)
    world.go_on(6)
    prefill.compute(24)
    world.go_on(at)
    prefill.preempt()
    world.go_on(at)
    prefill.compute(12)
    world.go_on(30)
    assert d.ended == {}
    prefill.finish()
    world.go_on(40)
    assert d.ended == {"d": [None]}
    assert holds(d, table, 1, 30)
    nothing_is_held(p, d)


@pytest.mark.parametrize("mode", ["auto", "staged"])
def test_a_request_that_ends_without_kv_fails_at_once(mode):
    world = World()
    p, d = make(world, mode=mode), make(world, mode=mode)
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8))
    prefill.compute(16)
    world.go_on(30)
    prefill.abort()
    world.go_on(30)
    ((reason,),) = d.ended.values()
    assert "over" in reason or "without KV" in reason
    nothing_is_held(p, d)


@pytest.mark.parametrize("at", range(14))
def test_an_aborted_reader_keeps_no_blocks(at):
    """Used to: a Close before the grant was lost, and the lease stood until it expired."""
    world = World()
    p, d = make(world), make(world, tp_size=2)
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8))
    prefill.compute(16)
    world.go_on(10)
    prefill.compute(24)
    world.go_on(at)
    d.put(Cancel("d"))
    world.go_on(20)
    assert d.ended == {"d": [None, None]}, "an abort is not reported as failed"
    prefill.finish()
    world.go_on(5)
    assert p.sent == [prefill.request_id]
    nothing_is_held(p, d)


def test_who_gives_up_does_not_end_the_lease_of_who_reads_on():
    world = World()
    p, gone, stays = make(world), make(world), make(world)
    prefill = Prefill(p, 30, seed=1)
    for engine in (gone, stays):
        fetch_early(engine, "d", prefill, range(8))
    prefill.compute(16)
    world.go_on(20)
    gone.put(Cancel("d"))
    world.go_on(20)
    prefill.finish()
    world.go_on(30)
    assert stays.ended == {"d": [None]} and holds(stays, range(8), 1, 30)
    assert p.sent == [prefill.request_id]


@pytest.mark.parametrize("tokens", [28, 32])
def test_another_end_than_was_said_is_another_lease(tokens):
    """What crossed under the old one may be right, but nobody has checked that."""
    world, p, d, prefill = early_pair(computed=16)
    prefill.finish(tokens)
    world.go_on(30)
    ((reason,),) = d.ended.values()
    assert "another prompt" in reason
    world.go_on(10, seconds=1.0)
    assert p.sent == [prefill.request_id]
    nothing_is_held(p, d)


def test_blocks_that_changed_without_a_word_are_another_lease():
    world, p, d, prefill = early_pair(computed=16)
    moved, prefill.blocks[1] = prefill.blocks[1], prefill.free.pop()
    scribble(p.caches[0], [moved])
    d.caches[0].fill(range(8), 99)  # so that it shows what is read anew
    prefill.finish()
    world.go_on(40)
    assert d.ended == {"d": [None]}
    assert holds(d, range(8), 1, 30)


@pytest.mark.parametrize("side", ["p", "d"])
def test_without_streaming_at_one_side_it_is_the_pull_of_before(side, monkeypatch):
    """As with a 3.0 engine: prefill that knows no Progress, decode that asks for no stream."""
    world = World()
    p, d = make(world), make(world)
    prefill = Prefill(p, 30, seed=1)
    encode = wire.encode
    if side == "d":  # what a 3.0 engine sends is what ours does without the new fields
        plain = {wire.Open: {"stream": False}}
        monkeypatch.setattr(
            wire,
            "encode",
            lambda m: encode(structs.replace(m, **plain.get(type(m), {}))),
        )
    fetch_early(d, "d", prefill, range(8))
    if side == "d":
        prefill.compute(16)
    world.go_on(30)
    assert not d.transports[0].submitted
    prefill.finish()
    world.go_on(30)
    assert d.ended == {"d": [None]} and holds(d, range(8), 1, 30)
    assert "num_streamed_transfers" not in (d.movers[0].take_stats() or {})


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.UNREPORTED])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_direct_read_that_fails_is_staged_from_then_on(fault, at):
    world, p, d, prefill = early_pair()
    for step, tokens in enumerate((8, 16, 30)):
        if step == at:
            d.transports[0].plan(fault, 0, 0)
        prefill.finish() if tokens == 30 else prefill.compute(tokens)
        world.go_on(30)
    assert d.ended == {"d": [None]} and holds(d, range(8), 1, 30)
    assert len(d.transports[0].submitted) == at + 1, "then it is staged"
    nothing_is_held(p, d)


def test_a_path_that_failed_is_left_alone_however_many_steps_there_are():
    world = World()
    p, d = make(world, num_blocks=80), make(world, num_blocks=80)
    prefill = Prefill(p, 320, seed=1)
    fetch_early(d, "d", prefill, range(80))
    for _ in range(80):
        d.transports[0].plan(Fault.LOST, 0, 0)
    for tokens in range(4, 320, 4):
        prefill.compute(tokens)
        world.go_on(12)
    prefill.finish()
    world.go_on(30)
    assert d.ended == {"d": [None]} and holds(d, range(80), 1, 320)
    assert len(d.transports[0].submitted) == 1


def test_a_slow_source_is_asked_whether_the_promise_stands_and_not_read_anew():
    world = World()
    late = LateKernels(load("cpu"))
    late.asked = 30
    p, d = make(world, mode="staged", kernels=late), make(world, mode="staged")
    prefill = Prefill(p, 32, seed=1)
    fetch_early(d, "d", prefill, range(8))
    for tokens in (16, 32):
        prefill.finish() if tokens == 32 else prefill.compute(tokens)
        world.go_on(50, seconds=0.1)
    assert d.ended == {"d": [None]} and holds(d, range(8), 1, 32)
    assert len(p.transports[0].submitted) == 2, "nothing was gathered twice"


def test_late_kernels_of_a_step_that_was_withdrawn_do_not_count():
    """A gather that began before the preemption ends after it, of blocks that are another's."""
    world = World()
    late = LateKernels(load("cpu"))
    late.asked = 6
    p, d = make(world, mode="staged", kernels=late), make(world, mode="staged")
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8))
    prefill.compute(16)
    for _ in range(8):
        world.go_on(1)
    prefill.preempt()
    world.go_on(30)
    assert d.ended == {}
    prefill.finish()
    world.go_on(80)
    assert d.ended == {"d": [None]} and holds(d, range(8), 1, 30)


def test_prefill_that_dies_fails_the_fetch():
    world, p, d, _ = early_pair(computed=16)
    p.stop()
    world.engines.remove(p)
    world.go_on(10, seconds=1.0)
    ((reason,),) = d.ended.values()
    assert "closed the connection" in reason
    nothing_is_held(d)


def test_decode_that_dies_holds_the_lease_no_longer_than_its_time():
    world, p, d, prefill = early_pair(computed=16)
    d.stop()
    world.engines.remove(d)
    prefill.finish()
    world.go_on(8, seconds=1.0)
    assert p.sent == [prefill.request_id]
    nothing_is_held(p)


def test_a_peer_that_tells_of_ever_more_blocks_costs_no_memory(monkeypatch):
    monkeypatch.setattr(follow, "MAX_BLOCKS_TOLD", 6)
    told = follow.RankTables.opened(
        wire.Opened(seq=1, lease_id="g", tables=((1, 2), ()), more=True)
    )
    for _ in range(3):
        told.extend(wire.Computed(seq=2, tables=((3, 4), (5,), (6,)), more=True))
    assert told.tables == [[1, 2, 3, 4, 3], [5]]


def test_a_reader_for_which_there_is_no_room_fails_and_does_not_read_all_anew(monkeypatch):
    world = World()
    p, d = make(world), make(world)
    prefill = Prefill(p, 30, seed=1)
    prefill.compute(16)
    world.go_on(5)
    monkeypatch.setattr(waiting, "MAX_PARKED", 0)
    fetch_early(d, "d", prefill, range(8))
    world.go_on(60)
    ((reason,),) = d.ended.values()
    assert "too many of your readers" in reason
    assert len(d.transports[0].submitted) == 1


def test_a_read_that_hangs_fails_though_prefill_may_take_longer():
    """Prefill may take minutes; a read of what it has computed may not."""
    world = World()
    p, d = make(world), make(world, load_timeout_s=3.0)
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8), wait_s=600.0)
    prefill.compute(8)
    world.go_on(20)
    world.go_on(10, seconds=1.0)
    assert d.ended == {}, "nothing is read now"
    d.transports[0].plan(Fault.HANGS)
    prefill.compute(16)
    world.go_on(20)
    assert d.ended == {} and d.transports[0].running
    world.go_on(10, seconds=1.0)
    ((reason,),) = d.ended.values()
    assert "not loaded within 3 s" in reason
    nothing_is_held(d)


def test_what_the_source_says_of_another_lease_is_no_word_on_ours():
    """Pulls from one source share the question whether it is there."""
    asked = []

    def send(peer, make, accepts, deadline, asker=""):
        asked.append(SimpleNamespace(message=make(1), reply=None, error=""))
        return asked[-1]

    dialer = SimpleNamespace(calls=SimpleNamespace(send=send))
    path = StagedPath(dialer, None, None, None, None, FakeClock())
    assert path.probe("withdrawn", 0)
    asked[-1].reply = wire.Closed(seq=1, stood=False)
    assert path.probe("ours", 0)
    assert path.probe("ours", 0)
    assert asked[-1].message.lease_id == "ours"
    asked[-1].reply = wire.Closed(seq=1, stood=False)
    assert not path.probe("ours", 0)


def test_a_fetch_waits_for_prefill_no_longer_than_it_said():
    world = World()
    p, d = make(world), make(world, load_timeout_s=3.0)
    prefill = Prefill(p, 30, seed=1)
    fetch_early(d, "d", prefill, range(8), wait_s=10.0)
    prefill.compute(16)
    world.go_on(20, seconds=0.1)
    for _ in range(8):
        world.go_on(1, seconds=1.0)
    assert d.ended == {}, "it has waited for its load timeout, and may for longer"
    world.go_on(10, seconds=1.0)
    ((reason,),) = d.ended.values()
    assert "13 s" in reason
    prefill.finish()
    world.go_on(5)
    assert p.sent == [prefill.request_id]
