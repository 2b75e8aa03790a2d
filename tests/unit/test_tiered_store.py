"""Memory, disk, and faults of both: a load gives what was saved, or is a miss that is counted."""

import os
import time

import numpy as np
import pytest
from faulty_file import DiskFault
from late import LateKernels
from msgspec.structs import replace
from store_bench import BLOCKS, CHUNK, FINGERPRINT, MODEL, Bench, key_of

from kvconnect.errors import GeometryError, TransportError
from kvconnect.geometry.blocks import BlockView, Heads
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.store.arena import make as make_arena
from kvconnect.offload.store.disk import MOST_FAILURES
from kvconnect.offload.store.header import ArenaSpec
from kvconnect.offload.store.host import HostStore
from kvconnect.offload.store.slot_index import SlotIndex
from kvconnect.offload.store.slot_layout import SlotLayout, slot_bytes
from kvconnect.offload.store.tiered_store import DISK_S, HANGS, PATIENCE_S
from kvconnect.ops import load
from kvconnect_bench.caches import LAYOUTS, Cache, Model


@pytest.fixture
def make(tmp_path):
    made = []

    def bench(**options):
        made.append(Bench(tmp_path, **options))
        return made[-1]

    yield bench
    for one in made:
        one.close()


@pytest.fixture
def bench(make):
    return make()


# -- slot_layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_layout_stored_another_loads(make, layout):
    bench = make(disk_slots=0)
    assert bench.save(1)
    bench.host.index.arena.close()
    other = make(disk_slots=0, layout=layout)
    assert other.slot_layout.format == bench.slot_layout.format
    assert other.load(1)


def changed(**fields):
    return Model(**({"layers": 2, "heads": 2, "block_tokens": 4, "content": 32} | fields))


@pytest.mark.parametrize(
    "model",
    [
        changed(layers=3),
        changed(heads=4),
        changed(block_tokens=8),
        changed(content=64),
        changed(values=8),
        changed(itemsize=4),
        changed(dtype="float16"),
        changed(scales=(1.0, 2.0)),
    ],
    ids=str,
)
def test_what_makes_other_bytes_is_another_format(bench, model):
    slot_layout = SlotLayout(Cache(model, BLOCKS).shard, 0, CHUNK, load("cpu"))
    assert slot_layout.format != bench.slot_layout.format


def test_another_shard_or_chunk_is_another_format(bench):
    shards = [Cache(changed(), BLOCKS, tp_rank=rank, tp_size=2).shard for rank in (0, 1)]
    slot_layouts = [SlotLayout(shard, 0, CHUNK, load("cpu")) for shard in shards]
    slot_layouts.append(SlotLayout(bench.cache.shard, 0, CHUNK + 1, load("cpu")))
    assert len({p.format for p in slot_layouts} | {bench.slot_layout.format}) == 4


def altered(view, part=None, **fields):
    """A view with fields of its own, or of its first part, changed."""
    parts = (replace(view.parts[0], **part), *view.parts[1:]) if part else view.parts
    return replace(view, parts=parts, **fields)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "model.layers.7"},
        {"block_tokens": 8},
        {"dtype": "float16"},
        {"layout": "packed by X"},
        {"heads": Heads(2, 2, 4)},
        {"part": {"name": "v"}},
        {"part": {"itemsize": 1}},
        {"part": {"scale": 2.0}},
        {"part": {"shape": (2, 4, 8)}},
    ],
    ids=str,
)
def test_whatever_tells_bytes_apart_is_in_the_format(bench, change):
    shard = bench.cache.shard
    other = replace(shard, views=(altered(shard.views[0], **change), *shard.views[1:]))
    assert SlotLayout(other, 0, CHUNK, load("cpu")).format != bench.slot_layout.format


def test_parts_that_changed_places_are_not_taken_for_one_another(bench):
    """Two pieces of 64 bytes that the kernels move apart, since their blocks have other tokens."""
    raw = np.random.default_rng(0).integers(0, 256, (2, BLOCKS, 64), np.uint8)
    part = type(bench.cache.shard.views[0].parts[0])
    parts = [
        part(base=int(raw[0].ctypes.data), strides=(64, 32, 32, 1), shape=(2, 1, 32), itemsize=1),
        part(base=int(raw[1].ctypes.data), strides=(64, 32, 16, 1), shape=(2, 2, 16), itemsize=1),
    ]
    views = tuple(
        replace(bench.cache.shard.views[0], layer=f"packed {n}", layout="X", parts=(one,))
        for n, one in enumerate(parts)
    )
    slot_layout = SlotLayout(replace(bench.cache.shard, views=views), 0, CHUNK, load("cpu"))
    payload = np.zeros(slot_layout.nbytes, np.uint8)
    packed = slot_layout.move("gather", [((3, 4), payload.ctypes.data)])
    swapped = payload.copy()
    swapped[:64], swapped[256:320] = payload[256:320], payload[:64]
    read = slot_layout.move("scatter", [((8, 9), swapped.ctypes.data)])
    assert (read.sums() == packed.sums()).tolist() == [False, True]


def test_a_slot_of_another_group_is_not_loaded():
    """Of as many bytes and tokens."""
    cache = Cache(Model(layers=2, heads=2, block_tokens=4, content=32, groups=2), BLOCKS)
    slot_layouts = [SlotLayout(cache.shard, group, CHUNK, load("cpu")) for group in (0, 1)]
    arena = make_arena(ArenaSpec(2, slot_bytes(slot_layouts), FINGERPRINT))
    store = HostStore(SlotIndex(arena), slot_layouts)
    assert store.store(1, key_of(1), 0, (0, 1))
    store.poll()
    assert not store.load(2, key_of(1), 1, (2, 3))
    arena.close()


def test_a_stage_without_layers_of_a_group_has_nothing_to_move_and_moves_it():
    """It used to end the engine at its start."""
    cache = Cache(MODEL, BLOCKS)
    slot_layouts = [SlotLayout(cache.shard, group, CHUNK, load("cpu")) for group in (0, 1)]
    assert slot_layouts[1].block_bytes == 0
    assert slot_layouts[0].format != slot_layouts[1].format
    arena = make_arena(ArenaSpec(2, slot_bytes(slot_layouts), FINGERPRINT))
    store = HostStore(SlotIndex(arena), slot_layouts)
    assert store.store(1, key_of(1), 1, (0, 1))
    assert not store.poll()[0].error
    assert store.load(2, key_of(1), 1, (NO_BLOCK, 1))
    assert not store.poll()[0].error
    assert not store.load(3, key_of(1), 0, (0, 1)), "it is another group's"
    arena.close()


def test_a_packed_layout_moves_whole_and_is_a_format_of_its_own(bench):
    """As `kvconnect.vllm.layout` describes what no spec explains: bytes of heads."""
    cache = bench.cache
    cells = cache.cells(cache.layers[0]).shape[0]
    raw = np.arange(cells * 64, dtype=np.uint8)
    part = cache.shard.views[0].parts[0]
    one = BlockView(
        layer="packed",
        group=0,
        num_blocks=cells,
        block_tokens=4,
        heads=cache.heads,
        dtype="bfloat16",
        layout="packed by X",
        parts=(
            type(part)(
                base=int(raw.ctypes.data), strides=(64, 32, 32, 1), shape=(2, 1, 32), itemsize=1
            ),
        ),
    )
    shard = type(cache.shard)((*cache.shard.views, one), cache.shard.regions, (cache.memory, raw))
    slot_layout = SlotLayout(shard, 0, CHUNK, load("cpu"))
    assert slot_layout.format != bench.slot_layout.format
    payload = np.zeros(slot_layout.nbytes, np.uint8)
    before = raw.copy()
    packed = slot_layout.move("gather", [((3, 4), payload.ctypes.data)])
    assert packed.done()
    for byte in (0, slot_layout.block_bytes - 300):  # of the packed layer, of dense ones
        damaged = payload.copy()
        damaged[byte] ^= 1
        read = slot_layout.move("scatter", [((8, 9), damaged.ctypes.data)])
        assert read.done()
        assert read.sums()[0] != packed.sums()[0]
    digest = slot_layout.put_sums(payload, packed.sums())
    raw[:] = 0
    found = slot_layout.move("scatter", [((3, NO_BLOCK), payload.ctypes.data)])
    assert found.sums().tolist() == slot_layout.sums(payload, digest)[:1].tolist()
    assert np.array_equal(raw[3 * 64 : 4 * 64], before[3 * 64 : 4 * 64])
    assert not raw[4 * 64 :].any()


def test_blocks_that_are_moved_together_are_as_those_that_are_moved_alone(bench):
    """What was stored block by block is read, and the reverse."""
    bench.cache.fill(range(BLOCKS), 1)
    alone = SlotLayout(bench.cache.shard, 0, 1, load("cpu"))
    chunks = [(5, 3), (0, 7), (9, 8)]
    payloads = np.zeros((3, bench.slot_layout.nbytes), np.uint8)
    at = [payload.ctypes.data for payload in payloads]
    sums = bench.slot_layout.move("gather", [(chunks[n], at[n]) for n in (2, 0, 1)]).sums().tolist()
    expected = np.zeros_like(payloads)
    for n in (2, 0, 1):
        for place, block in enumerate(chunks[n]):
            one = expected[n, place * alone.block_bytes :]
            assert alone.move("gather", [((block,), one.ctypes.data)]).sums()[0] == sums.pop(0)
    assert np.array_equal(payloads, expected)


@pytest.mark.parametrize("blocks", [(0,), (0, 1, 2), (0, BLOCKS), (-1, 0)])
def test_blocks_that_are_none_are_refused(bench, blocks):
    with pytest.raises(GeometryError):
        bench.slot_layout.move("gather", [(blocks, 0)])


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(10, 11), (11, 10), (NO_BLOCK, 10), (10, NO_BLOCK)])
def test_any_blocks_of_a_chunk_can_be_loaded_alone(bench, blocks):
    assert bench.save(1)
    spared = [b for b in range(BLOCKS) if b not in blocks]
    parts = [(layer, p) for layer in bench.cache.layers for p in range(bench.cache.parts)]
    before = [bench.cache.cells(*part)[spared].copy() for part in parts]
    assert bench.load(1, blocks)
    assert bench.host.counts["host_loaded"] == 1
    for part, cells in zip(parts, before, strict=True):
        assert np.array_equal(bench.cache.cells(*part)[spared], cells)


def test_no_free_slot_is_a_store_that_is_skipped(make):
    bench = make(slots=2, disk_slots=0)
    assert [bench.save(seed) for seed in (1, 2, 3)] == [True, True, False]
    assert bench.host.counts["host_stores_without_slot"] == 1
    bench.store.forget(key_of(1))
    assert bench.save(3)
    assert [bench.load(seed) for seed in (1, 2, 3)] == [False, True, True]
    assert bench.host.counts["host_loads_missed"] == 1


@pytest.mark.parametrize("where", ["first block", "second block", "sums"])
def test_a_flipped_bit_in_memory_is_a_miss_once(make, where):
    bench = make(disk_slots=0)
    assert bench.save(1)
    at = {"first block": 0, "second block": bench.slot_layout.block_bytes, "sums": -8}[where]
    bench.flip(bench.host.index.arena, 1, at % bench.slot_layout.nbytes)
    assert not bench.load(1)
    assert bench.host.counts["host_digest_mismatches"] == 1
    assert bench.host.take_lost() == [key_of(1)]
    assert bench.host.take_lost() == []
    assert not bench.load(1)
    assert bench.host.counts["host_digest_mismatches"] == 1
    assert bench.host.index.free == 4


def test_damage_in_a_block_that_is_not_wanted_does_not_matter(make):
    bench = make(disk_slots=0)
    assert bench.save(1)
    bench.flip(bench.host.index.arena, 1, bench.slot_layout.block_bytes)
    assert bench.load(1, (10, NO_BLOCK))


def test_a_whole_payload_of_another_slot_is_not_taken_for_this_one(make):
    """Its blocks fit its own sums; only the header knows better."""
    bench = make(disk_slots=0)
    assert bench.save(1)
    assert bench.save(2)
    arena = bench.host.index.arena
    one, two = (arena.payload(bench.host.index.slot_of(key_of(seed))) for seed in (1, 2))
    one[:] = two
    assert not bench.load(1)
    assert bench.load(2)


def test_a_device_that_fails_is_a_skipped_store_and_a_failed_load(make):
    kernels = LateKernels(load("cpu"))
    bench = make(disk_slots=0, kernels=kernels)
    kernels.fails = True
    assert not bench.save(1)
    kernels.fails = False
    assert bench.save(2)
    kernels.fails = True
    assert not bench.load(2)
    kernels.fails = False
    assert bench.load(2), "nothing is wrong with what is stored"
    assert bench.host.counts["host_stores_failed"] == bench.host.counts["host_loads_failed"] == 1
    assert bench.host.index.free == 3


class Unstartable:
    """Kernels whose device takes no launch."""

    name = "broken"

    def prepare(self, copies):
        return self

    def move(self, *arguments):
        raise TransportError("no memory for a launch")


def test_a_launch_that_does_not_start_is_a_store_or_load_that_fails(make):
    """It used to end the thread, and so the engine."""
    bench = make(disk_slots=0)
    assert bench.save(1)
    slot_layout = SlotLayout(bench.cache.shard, 0, CHUNK, Unstartable())
    store = HostStore(bench.host.index, [slot_layout])
    assert store.store(1, key_of(2), 0, (0, 1))
    assert store.load(2, key_of(1), 0, (2, 3))
    assert [bool(ended.error) for ended in store.poll()] == [True, True]
    assert not store.busy
    assert store.counts["host_stores_failed"] == store.counts["host_loads_failed"] == 1
    assert bench.host.index.free == 3
    assert bench.load(1)


# -- disk --------------------------------------------------------------------------------------


def on_disk_only(bench, seed):
    assert bench.save(seed)
    assert bench.spill(seed)
    bench.store.forget(key_of(seed))


def test_what_is_on_disk_is_promoted_and_then_in_memory(bench):
    on_disk_only(bench, 1)
    assert bench.load(1)
    assert bench.load(1)
    assert bench.host.counts["host_promoted"] == 1
    assert bench.disk.counts["disk_read"] == bench.disk.counts["disk_written"] == 1
    assert bench.host.index.free == 3


def test_both_tiers_are_found_again_by_another_process(make):
    bench = make()
    on_disk_only(bench, 1)
    assert bench.save(2)
    bench.close()
    again = make()
    assert again.host.index.keys() == [key_of(2)]
    assert again.disk.index.keys() == [key_of(1)]
    assert again.load(1)
    assert again.load(2)


def test_loads_that_want_the_same_at_once_read_it_once(bench):
    on_disk_only(bench, 1)
    tickets = [bench.ticket() for _ in range(3)]
    for number, ticket in enumerate(tickets):
        assert bench.store.load(ticket, key_of(1), 0, (10 + 2 * number, 11 + 2 * number))
    assert set(bench.settle().values()) == {""}
    assert bench.disk.counts["disk_read"] == 1
    assert all(bench.holds(1, (10 + 2 * n, 11 + 2 * n)) for n in range(3))


def test_nothing_is_written_to_disk_twice(bench):
    on_disk_only(bench, 1)
    assert bench.load(1)
    assert not bench.spill(1)
    assert not bench.spill(2)
    assert bench.disk.counts["disk_written"] == 1


def test_memory_may_forget_while_the_disk_still_writes(make):
    bench = make(slots=1)
    assert bench.save(1)
    bench.file.hold()
    ticket = bench.ticket()
    assert bench.store.spill(ticket, key_of(1))
    bench.store.forget(key_of(1))
    assert not bench.save(2), "its slot is still read from"
    bench.file.let_go()
    assert bench.settle()[ticket] == ""
    assert bench.save(2)
    bench.store.forget(key_of(2))
    assert bench.load(1)


def test_a_slow_disk_drops_writes_and_lets_reads_wait(make):
    bench = make(slots=6, most_jobs=2)
    on_disk_only(bench, 9)
    for seed in range(4):
        assert bench.save(seed)
    bench.file.hold()
    started = [bench.store.spill(bench.ticket(), key_of(seed)) for seed in range(4)]
    assert started == [True, True, False, False]
    ticket = bench.ticket()
    assert bench.store.load(ticket, key_of(9), 0, (10, 11))
    assert bench.disk.counts["disk_writes_dropped_queue_full"] == 2
    bench.file.let_go()
    assert bench.settle()[ticket] == ""
    assert bench.holds(9, (10, 11))


def test_a_full_disk_tier_drops_writes(make):
    bench = make(slots=4, disk_slots=2)
    for seed in range(3):
        assert bench.save(seed)
    assert [bench.spill(seed) for seed in range(3)] == [True, True, False]
    assert bench.disk.counts["disk_writes_without_slot"] == 1
    bench.store.forget_on_disk(key_of(0))
    assert bench.spill(2)


def test_a_load_from_disk_waits_for_the_slot_that_is_being_written_to_disk(make):
    """As write-back has it: what makes room is spilled, forgotten, and its slot wanted at once."""
    bench = make(slots=1)
    on_disk_only(bench, 1)
    assert bench.save(2)
    bench.file.hold()
    spill, load = bench.ticket(), bench.ticket()
    assert bench.store.spill(spill, key_of(2))
    bench.store.forget(key_of(2))
    assert bench.store.load(load, key_of(1), 0, (10, 11))
    assert not bench.store.poll()
    bench.file.let_go()
    ended = bench.settle()
    assert ended == {spill: "", load: ""}
    assert bench.holds(1, (10, 11))


def test_a_load_from_disk_does_not_wait_for_a_slot_for_ever(make):
    bench = make(slots=2)
    on_disk_only(bench, 1)
    assert bench.save(2) and bench.save(3)
    bench.file.hold()
    assert bench.store.spill(bench.ticket(), key_of(2))  # under way, and frees nothing
    ticket = bench.ticket()
    assert bench.store.load(ticket, key_of(1), 0, (10, 11))
    assert not bench.store.poll()
    bench.now += PATIENCE_S
    (ended,) = bench.store.poll()
    assert ended.id == ticket and ended.error
    bench.file.let_go()
    bench.settle()


def test_a_disk_that_hangs_fails_its_loads_in_time_and_no_others(make):
    """Used to be: a load waited for ever for a server of files that was down."""
    bench = make(slots=4, most_jobs=1)
    for seed in (1, 2, 3):
        on_disk_only(bench, seed)
    assert bench.save(4)
    bench.file.hold()
    tickets = [bench.ticket() for _ in range(3)]
    for ticket, seed in zip(tickets, (1, 1, 2), strict=True):
        assert bench.store.load(ticket, key_of(seed), 0, (10, 11))
    assert not bench.store.poll()
    bench.until_held(1, bench.file.operations)
    bench.now += DISK_S
    assert {one.id: one.error for one in bench.store.poll()} == dict.fromkeys(tickets, HANGS)
    assert not bench.load(3) and not bench.spill(4), "nothing more is asked of it"
    ticket = bench.ticket()
    assert bench.store.load(ticket, key_of(4), 0, (10, 11))
    assert [(one.id, one.error) for one in bench.store.poll()] == [(ticket, "")], "from memory"
    free = bench.host.index.free
    bench.file.let_go()
    bench.settle()
    assert bench.host.index.free == free + 1 and key_of(1) not in bench.host.index
    assert bench.load(1) and bench.load(2) and bench.load(3), "it answers again"


def test_a_disk_that_is_slow_and_steady_fails_nothing(make):
    """Used to be: what had waited for 30 s in the queue, behind others, failed all loads."""
    bench = make(slots=8)
    for seed in range(1, 7):
        on_disk_only(bench, seed)
    bench.file.hold()
    tickets = {seed: bench.ticket() for seed in range(1, 7)}
    for seed, ticket in tickets.items():
        assert bench.store.load(ticket, key_of(seed), 0, (10, 11))
    ended, before = {}, bench.file.operations
    for after in (0, 2, 4):  # two threads: two reads at a time
        bench.until_held(2, before + after)
        bench.now += DISK_S - 1
        ended |= {one.id: one.error for one in bench.store.poll()}
        bench.file.let_go(2)
    assert {**ended, **bench.settle()} == dict.fromkeys(tickets.values(), "")


def test_a_store_that_stood_still_itself_is_no_disk_that_hangs(make):
    bench = make()
    on_disk_only(bench, 1)
    on_disk_only(bench, 2)
    ticket = bench.ticket()
    assert bench.store.load(ticket, key_of(1), 0, (12, 13))
    bench.now += DISK_S
    deadline = time.monotonic() + 60
    while bench.disk.longest_s:
        assert time.monotonic() < deadline
    assert bench.load(2) and bench.holds(1, (12, 13))


def test_no_slot_to_promote_to_is_a_miss(make):
    bench = make(slots=1)
    on_disk_only(bench, 1)
    assert bench.save(2)
    assert not bench.load(1)
    assert bench.host.counts["host_promotions_without_slot"] == 1
    bench.store.forget(key_of(2))
    assert bench.load(1)


@pytest.mark.parametrize("fault", [DiskFault.IO_ERROR, DiskFault.FULL, DiskFault.SHORT])
def test_a_write_that_fails_is_dropped(bench, fault):
    assert bench.save(1)
    bench.file.plan(fault)
    assert not bench.spill(1)
    assert bench.disk.counts["disk_writes_failed"] == 1
    assert key_of(1) not in bench.disk.index
    assert bench.disk.index.free == 8
    assert bench.spill(1)
    bench.store.forget(key_of(1))
    assert bench.load(1)


@pytest.mark.parametrize("fault", [DiskFault.IO_ERROR, DiskFault.SHORT])
def test_a_read_that_fails_is_a_miss_and_is_given_up(bench, fault):
    on_disk_only(bench, 1)
    bench.file.plan(fault)
    assert not bench.load(1)
    assert bench.disk.counts["disk_reads_failed"] == 1
    assert bench.disk.take_lost() == [key_of(1)]
    assert bench.host.index.free == 4
    assert bench.disk.index.free == 8


@pytest.mark.parametrize("fault", [DiskFault.LOST, DiskFault.FLIPPED])
@pytest.mark.parametrize("verb", ["write", "read"])
def test_a_disk_that_lies_is_found_out(bench, fault, verb):
    assert bench.save(1)
    if verb == "write":
        bench.file.plan(fault)
    assert bench.spill(1)
    bench.store.forget(key_of(1))
    # the slot that it is read to must not happen to hold the right bytes
    for seed in range(2, 6):
        bench.save(seed)
    for seed in range(2, 6):
        bench.store.forget(key_of(seed))
    if verb == "read":
        bench.file.plan(fault)
    assert not bench.load(1)
    assert (
        bench.host.counts["host_digest_mismatches"]
        == bench.disk.counts["disk_digest_mismatches"]
        == 1
    )
    assert bench.disk.take_lost() == [key_of(1)]
    assert (bench.host.index.free, bench.disk.index.free) == (4, 8)
    assert not bench.store.busy


def test_what_is_damaged_in_memory_is_loaded_from_disk_within_the_load(bench):
    assert bench.save(1)
    assert bench.spill(1)
    bench.flip(bench.host.index.arena, 1)
    assert bench.load(1)
    assert bench.host.counts["host_digest_mismatches"] == 1
    assert bench.host.counts["host_promoted"] == 1


def test_a_disk_that_only_fails_is_left_alone(bench):
    assert bench.save(1)
    bench.file.usual = DiskFault.FULL
    for _ in range(MOST_FAILURES):
        assert not bench.spill(1)
    seen = bench.file.operations
    assert not bench.spill(1)
    assert bench.file.operations == seen
    assert bench.disk.counts["disk_writes_dropped_disk_off"] == 1


def test_only_failures_in_a_row_turn_a_disk_off(bench):
    assert bench.save(1)
    for _ in range(2):
        bench.file.usual = DiskFault.FULL
        for _ in range(MOST_FAILURES - 1):
            assert not bench.spill(1)
        bench.file.usual = DiskFault.NONE
        assert bench.spill(1)
        bench.store.forget_on_disk(key_of(1))


@pytest.mark.parametrize("at", ["payload", "sums"])
def test_a_bit_flipped_in_the_file_is_a_miss(bench, at):
    on_disk_only(bench, 1)
    bench.flip(bench.disk.index.arena, 1, 0 if at == "payload" else bench.slot_layout.nbytes - 8)
    assert not bench.load(1)
    assert bench.disk.counts["disk_digest_mismatches"] == 1
    assert not bench.load(1)


def test_a_file_cut_short_under_a_running_engine_is_misses_and_failed_writes(bench, tmp_path):
    for seed in range(3):
        on_disk_only(bench, seed)
    (path,) = (tmp_path / "disk").iterdir()
    first = bench.disk.index.slot_of(key_of(0))
    os.truncate(path, bench.disk.index.arena.offset(first) + 100)
    assert [bench.load(seed) for seed in range(3)].count(True) <= 1
    assert bench.disk.counts["disk_reads_failed"] >= 2
    assert bench.save(7)
    bench.close()


@pytest.mark.parametrize("kind", ["header", "every header", "cut"])
def test_damage_done_while_no_engine_ran_is_misses(make, tmp_path, kind):
    bench = make()
    for seed in range(3):
        on_disk_only(bench, seed)
    bench.close()
    (path,) = (tmp_path / "disk").iterdir()
    with path.open("r+b") as file:
        if kind == "header":
            file.seek(4096 + 50)
            file.write(b"\xff\xff\xff\xff")
        elif kind == "every header":
            file.seek(4096)
            file.write(os.urandom(128 * 8))
        else:
            file.truncate(9000)
    again = make()
    found = [again.load(seed) for seed in range(3)]
    assert found.count(True) == {"header": 2, "every header": 0, "cut": 0}[kind]
    assert again.save(5)
    assert again.spill(5)
