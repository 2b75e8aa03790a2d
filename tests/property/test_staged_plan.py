"""Any two geometries at all: every wanted cell equals its source, converted; nothing else changes.

What movers of one transfer do, without their messages: chunks are planned, each chunk gathered
at the source rank, its bytes copied, and scattered at the destination. Where the direct path is
legal too, it has to give the same.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect import ops
from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import BlockView, Heads, Part
from kvconnect.geometry.chunks import ChunkPlan, HeadSlice, segments, source_copy
from kvconnect.geometry.intersect import NO_BLOCK, assign, why_not_direct
from kvconnect.geometry.rows import Memory, Route
from kvconnect.ops import NUMBERS
from kvconnect.ops.plain import PlainKernels
from kvconnect.transport.base import Op, Work
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import LAYOUTS, Cache, Model

# HYPOTHESIS_PROFILE says how many: ci 2,100, dev 280
EXAMPLES = 7 * settings.default.max_examples
ENOUGH = 2000

TP_SIZES, PP_SIZES = (1, 2, 3, 4, 8), (1, 2, 3)
BLOCK_TOKENS = (16, 32, 48, 64, 128)
SMALL_BLOCKS = (1, 2, 3, 5, 8)
HEADS = {"MHA": (6, 8, 12, 24), "GQA": (2, 3, 4, 8), "one head": (1,), "MLA": (1,)}
# K and V of a token and head together; what is odd gives V one element less
CONTENTS = {"MHA": (2, 3, 8), "GQA": (2, 8, 32, 33), "one head": (2, 64, 128), "MLA": (3, 64, 576)}
SCALES = (1.0, 0.5, 4.0, 0.37, 3.3)
SLOTS = (1 << 13, 1 << 16, 1 << 20)
MOST_CELLS = 60_000  # of all heads and layers, so that examples stay quick
GUARD = 64

TORCH = {name: getattr(torch, row.torch_name) for name, row in NUMBERS.items()}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
NAN = {name: row.quiet_nan for name, row in NUMBERS.items()}
KERNELS = {"compiled": ops.load("cpu"), "plain": PlainKernels()}


@dataclass
class Side:
    """An engine of a transfer: all its ranks, or those that are looked at."""

    model: Model
    ranks: list[Cache]
    layout: str
    tp_size: int
    pp_size: int


@dataclass
class Transfer:
    """``tokens`` of a prompt; ``tables`` and ``blocks`` per KV cache group, as in an offer."""

    kind: str
    source: Side
    target: Side
    tokens: int
    tables: list[np.ndarray]
    blocks: list[list[tuple[int, int]]]
    slot_bytes: int
    seed: int
    needed_from: list[int] | None = None


@st.composite
def formats(draw, model):
    """The model in some engine's block size, dtype and scales."""
    dtype = draw(st.sampled_from(list(NUMBERS)))
    scale = st.sampled_from(SCALES) if NUMBERS[dtype].itemsize == 1 else st.just(1.0)
    blocks = BLOCK_TOKENS if draw(st.integers(0, 3)) else SMALL_BLOCKS
    return replace(
        model,
        dtype=dtype,
        block_tokens=draw(st.sampled_from(blocks)),
        scales=(draw(scale), draw(scale)),
        groups=draw(st.integers(1, model.layers)),
    )


@st.composite
def transfers(draw):
    kind = draw(st.sampled_from(list(HEADS)))
    heads, content = draw(st.sampled_from(HEADS[kind])), draw(st.sampled_from(CONTENTS[kind]))
    values = 0 if kind == "MLA" else draw(st.sampled_from([None, 1]))
    model = Model(draw(st.integers(1, 3)), heads, content=content, values=values)
    ours = draw(formats(model))
    theirs = ours if draw(st.integers(0, 3)) == 3 else draw(formats(model))
    most = max(1, min(300, MOST_CELLS // (model.layers * heads * content)))
    tokens = draw(st.integers(1, most))
    seed = draw(st.integers(0, 1 << 32))
    rng = np.random.default_rng(seed)
    wanted = [random_places(rng, ours, tokens) for _ in range(ours.groups)]
    windowed = draw(st.booleans())
    needed_from = [int(rng.integers(0, tokens)) if windowed else 0 for _ in range(ours.groups)]
    for places, start in zip(wanted, needed_from, strict=True):
        places[:] = [place for place in places if (place + 1) * ours.block_tokens > start]
    source = draw(sides(theirs, tokens))
    target = draw(sides(ours, tokens, most_ranks=2))
    tables = [
        random_table(rng, source, group, ours, wanted, tokens, needed_from)
        for group in range(theirs.groups)
    ]
    blocks = []
    for places in wanted:
        ids = rng.permutation(target.ranks[0].num_blocks)[: len(places)]
        blocks.append(list(zip(places, ids.tolist(), strict=True)))
    slot_bytes = draw(st.sampled_from(SLOTS))
    return Transfer(
        kind,
        source,
        target,
        tokens,
        tables,
        blocks,
        slot_bytes,
        seed,
        needed_from if windowed else None,
    )


@st.composite
def sides(draw, model, tokens, most_ranks=None):
    tp_size = draw(
        st.sampled_from([n for n in TP_SIZES if model.heads % n == 0 or n % model.heads == 0])
    )
    pp_size = draw(st.sampled_from([n for n in PP_SIZES if n <= model.layers]))
    layout = draw(st.sampled_from(LAYOUTS))
    num_blocks = -(-tokens // model.block_tokens) + draw(st.integers(0, 3))
    seed, padding = draw(st.integers(0, 1000)), draw(st.sampled_from([0, 0, 3]))
    places = list(itertools.product(model.stages(pp_size), range(tp_size)))
    if most_ranks is not None:
        places = draw(st.permutations(places))[:most_ranks]
    ranks = [
        Cache(model, num_blocks, layout, rank, tp_size, stage, seed + i, padding)
        for i, (stage, rank) in enumerate(places)
    ]
    return Side(model, ranks, layout, tp_size, pp_size)


def random_places(rng, model, tokens):
    """Blocks of the prompt that a decode engine misses: behind its own prefix, or some."""
    places = np.arange(-(-tokens // model.block_tokens))
    if rng.random() < 0.5:
        return places[rng.integers(0, len(places)) :].tolist()
    return places[rng.random(len(places)) < 0.7].tolist()


def random_table(rng, source, group, ours, wanted, tokens, needed_from):
    """Blocks of one group at the source; NO_BLOCK where nobody wants a token of it, sometimes."""
    size = source.model.block_tokens
    table = rng.permutation(source.ranks[0].num_blocks)[: -(-tokens // size)]
    needed = np.zeros(len(table) * size, dtype=bool)
    for layer in range(group, ours.layers, source.model.groups):
        start = needed_from[layer % ours.groups]
        for place in wanted[layer % ours.groups]:
            low = max(place * ours.block_tokens, start)
            needed[low : (place + 1) * ours.block_tokens] = True
    unwanted = ~needed.reshape(-1, size).any(axis=1)
    table[unwanted & (rng.random(len(table)) < 0.5)] = NO_BLOCK
    return table


# -- the oracle -------------------------------------------------------------------------------


def as_torch(bits, dtype):
    """Values of bit patterns."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}" if bits.itemsize > 1 else "u1")).view(
        TORCH[dtype]
    )


def as_bits(values):
    return values.view(BITS[values.element_size()]).numpy().view(f"u{values.element_size()}")


def random_numbers(rng, dtype, shape):
    """Bit patterns of numbers of many sizes, and some that may be anything: inf, NaN, subnormal."""
    numbers = rng.standard_normal(shape, dtype=np.float32) * np.exp2(rng.integers(-9, 9, shape[-1]))
    found = as_bits(torch.from_numpy(numbers.astype(np.float32)).to(TORCH[dtype]))
    if rng.random() < 0.5:
        anything = rng.integers(0, 256, found.nbytes, dtype=np.uint8).view(found.dtype)
        found = np.where(rng.random(shape) < 0.1, anything.reshape(shape), found)
    return found


def converted(bits, source, target, part):
    """By torch: through float32, times the ratio of the scales, saturating where fp8."""
    ratio = source.scales[part] / target.scales[part]
    if source.dtype == target.dtype and ratio == 1:
        return bits
    given = as_torch(bits, source.dtype).float()
    scaled = given * torch.tensor(ratio, dtype=torch.float32)
    kind = TORCH[target.dtype]
    if kind.itemsize == 1:
        scaled = scaled.clamp(torch.finfo(kind).min, torch.finfo(kind).max)
    found = as_bits(scaled.to(kind)).copy()
    # torch leaves open which NaN; ours is quiet and keeps the sign
    nan = given.isnan().numpy()
    sign = bits >> (8 * bits.itemsize - 1) != 0  # torch's half → float drops it now and then
    found[nan] = NAN[target.dtype]
    found[nan & sign] |= found.dtype.type(1 << 8 * found.itemsize - 1)
    return found


def held_by(source, tables, seed):
    """What all ranks of the source hold of the prompt, ``{(layer, part): [token, head, element]}``.

    Put there; a token that no block holds has numbers too, which must not arrive anywhere.
    """
    rng, model, truth = np.random.default_rng(seed), source.model, {}
    for layer, part in itertools.product(model.names, range(len(model.parts))):
        table = tables[model.names.index(layer) % model.groups]
        shape = (len(table) * model.block_tokens, model.heads, model.parts[part][1])
        truth[layer, part] = random_numbers(rng, model.dtype, shape)
        token = np.flatnonzero(np.repeat(table != NO_BLOCK, model.block_tokens))
        place, offset = np.divmod(token, model.block_tokens)
        for cache in source.ranks:
            if layer in cache.layers:
                first, count = cache.heads.first, cache.heads.count
                held = truth[layer, part][token, first : first + count]
                cache.write(layer, part, table[place], offset, held)
    return truth


def wanted_memory(transfer, cache, truth, tokens):
    """All of ``cache``'s memory as it should be when ``tokens`` have arrived.

    A cell of a block that no wanted token belongs to has the content of one that is in it.
    """
    before, model = cache.memory.copy(), cache.model
    size = model.block_tokens
    for layer, part in itertools.product(cache.layers, range(cache.parts)):
        group = model.names.index(layer) % model.groups
        start = transfer.needed_from[group] if transfer.needed_from else 0
        at, block, token = [], [], []
        for place, number in transfer.blocks[group]:
            low, high = max(place * size, start), min((place + 1) * size, tokens)
            for cell in range(size) if high > low else ():
                own, filler = place * size + cell, cell if place * size + cell < low else None
                if own >= high:
                    filler = own - high
                at.append(cell)
                block.append(number)
                token.append(own if filler is None else low + filler % (high - low))
        at, block, token = (np.array(x, dtype=np.int64) for x in (at, block, token))
        held = truth[layer, part][token, cache.heads.first :][:, : cache.heads.count]
        cells = converted(np.ascontiguousarray(held), transfer.source.model, model, part)
        cache.write(layer, part, block, at, cells)
    wanted = cache.memory.copy()
    cache.memory[:] = before
    return wanted


# -- what movers do ---------------------------------------------------------------------------


def planned(transfer, cache):
    """(source rank, its rectangles) for one destination rank."""
    ranks = transfer.source.ranks
    theirs = [rank.shard.views for rank in ranks]
    rects = assign(cache.shard.views, theirs, transfer.seed % len(ranks), allow_lossy=True)
    return [(rank, found) for rank, found in zip(ranks, rects, strict=True) if found]


class Move(NamedTuple):
    """One chunk, as both sides know it."""

    owner: ops.Prepared
    held: np.ndarray
    reader: ops.Prepared
    wanted: np.ndarray
    runs: tuple[tuple[int, int], ...]
    nbytes: int
    copies: list[ops.Copy]
    """The reader's."""

    def gather(self, fill=0):
        """(bytes, sums) of the chunk; bytes between copies are ``fill``."""
        slot = np.full(self.nbytes + GUARD, fill, dtype=np.uint8)
        launch = self.owner.move("gather", self.held, address(slot), self.nbytes, len(self.runs))
        assert launch.done() and (slot[self.nbytes :] == fill).all()
        return slot[: self.nbytes], launch.sums

    def scatter(self, wire):
        """Sums of the bytes that were scattered."""
        given = wire.copy()
        launch = self.reader.move(
            "scatter", self.wanted, address(given), self.nbytes, len(self.runs)
        )
        assert launch.done() and np.array_equal(given, wire)
        return launch.sums


def moves(transfer, cache, kernels):
    """All chunks for one destination rank."""
    for owner, rects in planned(transfer, cache):
        plan = ChunkPlan(rects, transfer.slot_bytes, join=transfer.seed % 4 > 0)
        views = {view.layer: view for view in owner.shard.views}
        asked = msgspec.msgpack.decode(msgspec.msgpack.encode(plan.slices), type=list[HeadSlice])
        copies = [source_copy(views, head_slice).copy for head_slice in asked]
        prepared = {}
        for chunk in plan.chunks(transfer.blocks, transfer.tokens, transfer.needed_from or ()):
            group, runs = chunk.slices, chunk.runs
            slices = slice(group.first, group.first + group.num_slices)
            if group not in prepared:
                prepared[group] = [kernels.prepare(x[slices]) for x in (copies, plan.copies)]
            theirs, ours = prepared[group]
            table = transfer.tables[group.kind.src_group]
            held = segments(runs, table, transfer.source.model.block_tokens)
            assert chunk.nbytes <= transfer.slot_bytes
            assert sum(count for _, count in runs) <= group.tokens
            mine = plan.copies[slices]
            yield Move(theirs, held, ours, chunk.segments, runs, chunk.nbytes, mine)


def address(wire):
    return int(wire.ctypes.data)


def stage(transfer, cache, kernels):
    """Move everything that is wanted; returns how many chunks that took."""
    count = 0
    for move in moves(transfer, cache, kernels):
        wire, sums = move.gather()
        arrived = move.scatter(wire)
        assert np.array_equal(arrived, sums) and len(sums) == len(move.runs)
        count += 1
    return count


def direct_routes(transfer, cache):
    """(source rank, route) of the direct path; None where it is not legal."""
    dram, found = Memory("DRAM", 0), []
    for owner, rects in planned(transfer, cache):
        if any(map(why_not_direct, rects)):
            return None
        try:
            found.append((owner, Route(rects, dram, dram)))
        except GeometryError:  # too many rows; the staged path takes over
            return None
    return found


def read_rows(transfer, cache, routes):
    """The direct path."""
    fabric = Fabric()
    reader = LoopbackTransport(cache.shard.regions, fabric)
    for owner, route in routes:
        chosen = route.select(transfer.tables, transfer.blocks)
        if not len(chosen.src):
            continue
        hello = LoopbackTransport(owner.shard.regions, fabric).hello()
        reader.add_peer(hello.decode(), hello)
        reader.submit(
            Work(
                Op.READ, hello.decode(), route.dst, chosen.dst, route.src, chosen.src, chosen.nbytes
            )
        )
    assert all(done.error is None for done in reader.poll())


# -- the property -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_wanted_cell_equals_its_converted_source_and_nothing_else_is_touched(name, capsys):
    kernels, ran = KERNELS[name], Counter()
    examples = EXAMPLES if name == "compiled" else EXAMPLES // 10

    @settings(max_examples=examples)
    @given(transfers())
    def check(transfer):
        source, target = transfer.source, transfer.target
        truth = held_by(source, transfer.tables, transfer.seed)
        sources = [cache.memory.copy() for cache in source.ranks]
        direct = transfer.needed_from is None  # which else copies what the staged path does not ask
        for cache in target.ranks:
            routes = direct_routes(transfer, cache) if direct else None
            before = cache.memory.copy()
            wanted = wanted_memory(transfer, cache, truth, transfer.tokens)
            ran["chunks"] += stage(transfer, cache, kernels)
            assert np.array_equal(cache.memory, wanted)
            if routes is None:
                direct = False
            else:
                cache.memory[:] = before
                wanted = wanted_memory(transfer, cache, truth, math.inf)
                read_rows(transfer, cache, routes)
                assert np.array_equal(cache.memory, wanted)
        for cache, memory in zip(source.ranks, sources, strict=True):
            assert np.array_equal(cache.memory, memory)
        ran.update(["staged", transfer.kind, *(["direct"] if direct else [])])
        ran.update(
            {
                (source.layout, target.layout),
                (source.model.dtype, target.model.dtype),
                ("TP", source.tp_size, target.tp_size),
                ("PP", source.pp_size, target.pp_size),
                ("block size", source.model.block_tokens, target.model.block_tokens),
            }
        )

    check()
    pairs = {
        "layouts": list(itertools.product(LAYOUTS, repeat=2)),
        "dtypes": list(itertools.product(NUMBERS, repeat=2)),
        "TP sizes": [("TP", *pair) for pair in itertools.product(TP_SIZES, repeat=2)],
        "PP sizes": [("PP", *pair) for pair in itertools.product(PP_SIZES, repeat=2)],
        "block sizes": [("block size", *p) for p in itertools.product(BLOCK_TOKENS, repeat=2)],
    }
    met = {name: sum(pair in ran for pair in found) for name, found in pairs.items()}
    with capsys.disabled():
        told = ", ".join(f"{met[name]} of {len(pairs[name])} pairs of {name}" for name in pairs)
        print(
            f"\n{ran['staged']} examples staged ({ran['chunks']} chunks, {kernels.name}), "
            f"{ran['direct']} of them direct too: {told}"
        )
    assert ran["staged"] >= examples
    if examples >= ENOUGH:
        assert ran["direct"] >= examples / 10
        assert all(ran[kind] >= examples / 20 for kind in HEADS)
        assert all(met[name] >= 0.9 * len(pairs[name]) for name in pairs), met


# -- what the checksum sees -------------------------------------------------------------------


def some_chunk(transfer, data):
    """A chunk of the transfer, or None if nothing is wanted."""
    held_by(transfer.source, transfer.tables, transfer.seed)
    found = list(moves(transfer, transfer.target.ranks[0], KERNELS["compiled"]))
    return data.draw(st.sampled_from(found)) if found else None


@pytest.mark.slow
@given(transfers(), st.data())
def test_a_flipped_bit_changes_the_sum_of_its_unit_only(transfer, data):
    if (move := some_chunk(transfer, data)) is None:
        return
    wire, sums = move.gather(fill=0)
    again, same = move.gather(fill=0xFF)
    assert np.array_equal(sums, same), "bytes between copies are nobody's"
    byte = data.draw(st.sampled_from(np.flatnonzero(wire == again).tolist()))
    changed = wire.copy()
    changed[byte] ^= 1 << data.draw(st.integers(0, 7))
    tokens = sum(count for _, count in move.runs)
    offsets = ops.wire_offsets(move.copies, tokens)
    index = np.searchsorted(offsets, byte, side="right") - 1
    copy = move.copies[index]
    token = (byte - offsets[index]) // (copy.content * copy.wire_type.itemsize) % tokens
    unit = np.repeat(np.arange(len(move.runs)), [count for _, count in move.runs])[token]
    assert np.flatnonzero(move.scatter(changed) != sums).tolist() == [unit]


@pytest.mark.slow
@given(transfers(), st.data())
def test_swapped_units_change_the_sums_of_both(transfer, data):
    if (move := some_chunk(transfer, data)) is None:
        return
    counts = [count for _, count in move.runs]
    pairs = [
        p for p in itertools.combinations(range(len(counts)), 2) if counts[p[0]] == counts[p[1]]
    ]
    if not pairs:
        return
    first, second = data.draw(st.sampled_from(pairs))
    starts = np.cumsum([0, *counts])
    wire, sums = move.gather()
    changed = wire.copy()
    offsets = ops.wire_offsets(move.copies, starts[-1])
    for copy, start in zip(move.copies, offsets, strict=False):
        row = copy.content * copy.wire_type.itemsize
        rows = changed[start : start + copy.heads * starts[-1] * row].reshape(copy.heads, -1, row)
        a = slice(starts[first], starts[first + 1])
        b = slice(starts[second], starts[second + 1])
        rows[:, a], rows[:, b] = rows[:, b].copy(), rows[:, a].copy()
    if not np.array_equal(changed, wire):
        assert np.flatnonzero(move.scatter(changed) != sums).tolist() == [first, second]


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.slow
@given(transfers(), st.data())
def test_a_token_that_the_source_does_not_hold_is_refused(transfer, data):
    """The reader plans from what it wants; the source looks at its own table."""
    if (move := some_chunk(transfer, data)) is None:
        return
    size = transfer.source.model.block_tokens
    start, count = data.draw(st.sampled_from(move.runs))
    lost = data.draw(st.integers(start // size, (start + count - 1) // size))
    table = np.zeros(-(-transfer.tokens // size), dtype=np.int64)
    assert len(segments(move.runs, table, size))
    table[lost] = NO_BLOCK
    for broken in (table, table[:lost]):
        with pytest.raises(GeometryError, match="tokens up to"):
            segments(move.runs, broken, size)


def both(ours, theirs, slot_bytes=1 << 16):
    """The chunk plan from one whole engine to another."""
    mine, peer = Cache(ours, 2), Cache(theirs, 2)
    (rects,) = assign(mine.shard.views, [peer.shard.views], 0)
    return ChunkPlan(rects, slot_bytes), {view.layer: view for view in peer.shard.views}


def test_a_slot_that_holds_no_token_is_refused():
    model = Model(heads=4, content=64, dtype="float32")
    assert both(model, model, slot_bytes=4 * 32 * 4)[0].slice_groups
    with pytest.raises(
        GeometryError, match=r"one token .* 512 bytes, .* slot 511; .*staging_bytes"
    ):
        both(model, model, slot_bytes=4 * 32 * 4 - 1)


def test_pieces_cross_in_the_smaller_dtype():
    wide, narrow = Model(dtype="bfloat16"), Model(dtype="fp8_e4m3", scales=(0.5, 2.0))
    plan, _ = both(narrow, wide)
    assert [(p.dtype, p.factor) for p in plan.slices[:2]] == [
        ("fp8_e4m3", 2),
        ("fp8_e4m3", 0.5),
    ]
    assert {copy.factor for copy in plan.copies} == {1.0}
    plan, _ = both(wide, narrow)
    assert {(p.dtype, p.factor) for p in plan.slices} == {("fp8_e4m3", 1.0)}
    assert [copy.factor for copy in plan.copies[:2]] == [0.5, 2.0]


HOSTILE = {
    "layer": ({"layer": "x"}, "layer x part kv is not held here"),
    "part": ({"part": "k", "content": 8}, "8 elements a token are wanted of k, 4 are held"),
    "heads": ({"count": 5}, r"heads \[0, 5\) are wanted, \[0, 4\) are held here"),
    "heads from": ({"first": 1}, r"heads \[1, 5\) are wanted"),
    "content": ({"content": 4}, "4 elements a token are wanted of kv, 8 are held"),
    "dtype": ({"dtype": "int8"}, "bfloat16 cannot be converted to int8"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_piece_that_is_not_held_is_refused(change, message):
    plan, views = both(Model(), Model())
    assert source_copy(views, plan.slices[0])
    with pytest.raises(GeometryError, match=message):
        source_copy(views, msgspec.structs.replace(plan.slices[0], **change))


@pytest.mark.parametrize(
    ("layout", "scales", "join", "parts"),
    [
        ("LBHNC", (2.0, 2.0), True, ["kv"]),
        ("LBHNC", (2.0, 2.0), False, ["k", "v"]),  # the source is of wire version 2.1
        ("LBHNC", (2.0, 1.0), True, ["k", "v"]),
        ("vec", (2.0, 2.0), True, ["k", "v"]),
    ],
    ids=["side by side", "not understood", "other scales", "apart"],
)
def test_k_and_v_cross_as_one_piece_where_they_lie_side_by_side(layout, scales, join, parts):
    model = Model(layers=1, dtype="fp8_e4m3", scales=scales)
    mine, peer = Cache(model, 2, "BLHNC"), Cache(model, 2, layout)
    for here, there in ((mine, peer), (peer, mine)):
        (rects,) = assign(here.shard.views, [there.shard.views], 0)
        plan = ChunkPlan(rects, 1 << 16, join=join)
        assert [head_slice.part for head_slice in plan.slices] == parts
    apart = Cache(replace(model, scales=(2.0, 1.0)), 2).shard.views
    with pytest.raises(GeometryError, match="part kv is not held here"):
        source_copy({view.layer: view for view in apart}, PART_KV)


PART_KV = HeadSlice("model.layers.0.attn", "kv", 0, 4, 8, "fp8_e4m3")


class Packed(NamedTuple):
    """Blocks ``[block, head, row, byte]`` of what only its owner understands."""

    bytes: np.ndarray
    view: BlockView


def packed(rng, blocks, heads, rows, nbytes, block_tokens):
    memory = rng.integers(0, 256, (blocks, heads, rows, nbytes), dtype=np.uint8)
    part = Part(address(memory), memory.strides, (heads, rows, nbytes), 1)
    whole = Heads(0, heads, heads)
    return Packed(
        memory, BlockView("l", 0, blocks, block_tokens, whole, "bfloat16", "cpu:rvv", (part,))
    )


@given(
    st.integers(0, 1 << 32),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([3, 64, 700]),
    st.sampled_from([16, 1 << 24]),
    st.sampled_from([1 << 11, 1 << 16]),
)
def test_packed_blocks_cross_whole(seed, heads, rows, nbytes, block_tokens, slot_bytes):
    """Whatever the number of tokens: the last block of a prompt too, and recurrent state."""
    rng, kernels = np.random.default_rng(seed), KERNELS["compiled"]
    shape = heads, rows, nbytes, block_tokens
    theirs, ours = packed(rng, 7, *shape), packed(rng, 5, *shape)
    (rects,) = assign([ours.view], [[theirs.view]], 0)
    plan = ChunkPlan(rects, slot_bytes)
    count = 1 if block_tokens > 100 else int(rng.integers(1, 5))
    table, ids = rng.permutation(7)[:count], rng.permutation(5)[:count]
    places = [place for place in range(count) if count == 1 or rng.random() < 0.7]
    wanted = ours.bytes.copy()
    for place in places:
        wanted[ids[place]] = theirs.bytes[table[place]]
    blocks = [[(place, int(ids[place])) for place in places]]
    for chunk in plan.chunks(blocks, tokens=(count - 1) * block_tokens + 1):
        slices = slice(chunk.slices.first, chunk.slices.first + chunk.slices.num_slices)
        held = [source_copy({"l": theirs.view}, head_slice) for head_slice in plan.slices[slices]]
        assert all(h.whole for h in held) and chunk.slices.kind.whole
        wire = np.empty(chunk.nbytes, dtype=np.uint8)
        found = segments(chunk.runs, table, held[0].copy.block_tokens)
        sent = kernels.prepare([h.copy for h in held]).move(
            "gather", found, address(wire), chunk.nbytes, len(chunk.runs)
        )
        arrived = kernels.prepare(plan.copies[slices]).move(
            "scatter", chunk.segments, address(wire), chunk.nbytes, len(chunk.runs)
        )
        assert sent.done() and arrived.done() and np.array_equal(sent.sums, arrived.sums)
    assert np.array_equal(ours.bytes, wanted)


def test_packed_content_is_never_converted():
    view = packed(np.random.default_rng(0), 2, 1, 1, 64, 16).view
    (rects,) = assign([view], [[view]], 0)
    head_slice = ChunkPlan(rects, 1 << 16).slices[0]
    with pytest.raises(GeometryError, match="bfloat16 cannot be converted to float32"):
        source_copy({"l": view}, msgspec.structs.replace(head_slice, dtype="float32"))
