"""Any two geometries in scope: every wanted cell arrives, and nothing else is touched.

Here through rows of equal blocks, the direct path; see test_staged_plan for the other.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from msgspec import structs

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import UNTILED, BlockView, Heads, Part, Tile
from kvconnect.geometry.intersect import NO_BLOCK, Rect, assign, check_mappable, why_not_direct
from kvconnect.geometry.rows import Memory, Route, rows_of
from kvconnect.transport.base import Op, Work
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect_bench.caches import ITEM_BYTES, LAYOUTS, Cache, Model, engine

DRAM = Memory("DRAM", 0)
TP_SIZES = (1, 2, 3, 4, 6, 8)


@st.composite
def models(draw):
    content = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 32]))
    return Model(
        layers=draw(st.integers(1, 5)),
        heads=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])),
        block_tokens=draw(st.sampled_from([1, 2, 3, 4, 8, 32])),
        content=content,
        values=draw(st.sampled_from([None, None, 0, content // 4])),
        groups=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(list(ITEM_BYTES))),
    )


@st.composite
def engines(draw, model):
    sizes = [n for n in TP_SIZES if model.heads % n == 0 or n % model.heads == 0]
    return engine(
        model,
        num_blocks=draw(st.integers(1, 9)),
        layout=draw(st.sampled_from(LAYOUTS)),
        tp_size=draw(st.sampled_from(sizes)),
        pp_size=draw(st.integers(1, model.layers)),
        seed=draw(st.integers(0, 1000)),
        padding=draw(st.sampled_from([0, 0, 3])),
    )


@st.composite
def transfers(draw):
    """(model, source ranks, destination ranks, source tables, destination blocks)."""
    model = draw(models())
    source, target = draw(engines(model)), draw(engines(model))
    tables, blocks = [], []
    for _ in range(model.groups):
        ids = draw(st.permutations(range(source[0].num_blocks)))
        table = ids[: draw(st.integers(0, len(ids)))]
        wanted = draw(st.sets(st.sampled_from(range(len(table))))) if table else set()
        wanted = sorted(wanted)[: target[0].num_blocks]
        chosen = draw(st.permutations(range(target[0].num_blocks)))[: len(wanted)]
        # what nobody wants may be missing, as outside a sliding window
        for place in set(range(len(table))) - set(wanted):
            if draw(st.booleans()):
                table[place] = NO_BLOCK
        tables.append(tuple(table))
        blocks.append(tuple(zip(wanted, chosen, strict=True)))
    return model, source, target, tuple(tables), tuple(blocks)


def legal(source, target):
    """Whether all that the two share can be read as rows."""
    theirs = {view.layer: view for cache in source for view in cache.shard.views}
    ours = [view for cache in target for view in cache.shard.views]
    return not any(why_not_direct(Rect(theirs[v.layer], v, 0, 1)) for v in ours)


def load(source, target, rank, tables, blocks):
    """What a mover does for one destination rank, over loopback."""
    fabric = Fabric()
    owners = [LoopbackTransport(s.shard.regions, fabric) for s in source]
    reader = LoopbackTransport(target[rank].shard.regions, fabric)
    nbytes = 0
    rects = assign(target[rank].shard.views, [s.shard.views for s in source], rank)
    for owner, wanted in zip(owners, rects, strict=True):
        if not wanted:
            continue
        route = Route(wanted, DRAM, DRAM)
        chosen = route.select(tables, blocks)
        if not len(chosen.src):
            continue
        name = owner.hello().decode()
        reader.add_peer(name, owner.hello())
        reader.submit(
            Work(Op.READ, name, route.dst, chosen.dst, route.src, chosen.src, chosen.nbytes)
        )
        nbytes += chosen.nbytes
    for done in reader.poll():
        assert done.error is None, done.error
    return nbytes


def wanted_memory(model, source, cache, tables, blocks):
    """All of ``cache``'s memory as it should be afterwards, cell by cell; and the cells' bytes."""
    before, nbytes = cache.memory.copy(), 0
    for layer, part in itertools.product(cache.layers, range(cache.parts)):
        group = model.names.index(layer) % model.groups
        if not blocks[group]:
            continue
        places, ids = np.array(blocks[group]).T
        src, dst = (
            np.repeat(b, model.block_tokens) for b in (np.array(tables[group])[places], ids)
        )
        tokens = np.tile(np.arange(model.block_tokens), len(ids))
        cells = cache.read(layer, part, dst, tokens)
        for place in range(cache.heads.count):
            head = cache.heads.first + place
            owner = next(
                s for s in source if layer in s.layers and 0 <= head - s.heads.first < s.heads.count
            )
            held = owner.read(layer, part, src, tokens)
            cells[:, place] = held[:, head - owner.heads.first]
        cache.write(layer, part, dst, tokens, cells)
        nbytes += cells.nbytes
    wanted = cache.memory.copy()
    cache.memory[:] = before
    return wanted, nbytes


def agree(source):
    """Make replicas equal, as the ranks of a real engine are."""
    for cache in source:
        cache.fill(range(cache.num_blocks), seed=7)


@pytest.mark.slow
def test_every_wanted_cell_equals_its_source_and_nothing_else_is_touched():
    ran = Counter()

    @given(transfers())
    def check(transfer):
        model, source, target, tables, blocks = transfer
        if not legal(source, target):
            ran["other path"] += 1
            return
        ran["direct"] += 1
        event(f"{len(source)}:{len(target)} ranks")
        agree(source)
        sources = [s.memory.copy() for s in source]
        for rank, cache in enumerate(target):
            wanted, nbytes = wanted_memory(model, source, cache, tables, blocks)
            assert load(source, target, rank, tables, blocks) == nbytes
            assert np.array_equal(cache.memory, wanted)
        for cache, before in zip(source, sources, strict=True):
            assert np.array_equal(cache.memory, before)

    check()
    assert ran["direct"] > 10 * ran["other path"]


@pytest.mark.slow
@given(transfers(), st.data())
def test_a_place_that_the_source_does_not_hold_is_refused(transfer, data):
    _, source, target, tables, blocks = transfer
    held = [(g, place) for g, pairs in enumerate(blocks) for place, _ in pairs]
    if not held or not legal(source, target):
        return
    group, place = data.draw(st.sampled_from(held))
    table = list(tables[group])
    if data.draw(st.booleans()):
        table[place] = NO_BLOCK
    else:
        del table[place:]
    broken = (*tables[:group], tuple(table), *tables[group + 1 :])
    ranks = range(len(target))
    # a rank whose layers are all in other groups does not care
    concerned = [r for r in ranks if any(v.group == group for v in target[r].shard.views)]
    for rank in concerned:
        with pytest.raises(GeometryError, match="the peer holds"):
            load(source, target, rank, broken, blocks)


@pytest.mark.slow
@given(transfers(), st.sampled_from([1 << 31, 1 << 62, -2, -(1 << 62)]))
def test_a_block_id_that_cannot_be_is_refused(transfer, hostile):
    """Ids beyond 63 bits are refused before, by `kvconnect.control.wire`."""
    _, source, target, tables, blocks = transfer
    if not legal(source, target):
        return
    hostile_tables = tuple(tuple(hostile for _ in table) for table in tables)
    for rank, cache in enumerate(target):
        before = cache.memory.copy()
        if any(blocks[view.group] for view in cache.shard.views):
            with pytest.raises(GeometryError, match="block ids"):
                load(source, target, rank, hostile_tables, blocks)
        assert np.array_equal(cache.memory, before)


@pytest.mark.slow
@given(models(), st.integers(0, 7))
def test_readers_spread_over_replicas(model, start):
    replicas = engine(model, 2, tp_size=model.heads * 2)
    (whole,) = engine(model, 2)
    rects = assign(whole.shard.views, [r.shard.views for r in replicas], start % len(replicas))
    taken = [len(r) for r in rects]
    assert sum(taken) == model.heads * model.layers
    first = start % len(replicas)
    assert taken[first] == model.layers  # the reader's own start is used


# What no path can bridge: what the peer has, what we have, and what is said of it.
REFUSED = {
    "heads": ({"heads": 8}, {}, r"8 KV heads, we have 4"),
    "content": (
        {"content": 16},
        {},
        r"parts {'k': 8, 'v': 8} .*, we have {'k': 4, 'v': 4}; .* same model",
    ),
    "parts": ({"values": 0}, {}, r"parts {'kv': 8} .*, we have {'k': 4, 'v': 4}"),
    "dtype": (
        {"dtype": "int8"},
        {},
        r"KV dtype int8, we have bfloat16, and int8 cannot be converted; .*--kv-cache-dtype",
    ),
    "our dtype": ({}, {"dtype": "int8"}, r"bfloat16, we have int8, and int8 cannot be"),
    "two floats of 16 bits": (
        {"dtype": "float16"},
        {},
        r'float16, we have bfloat16: neither holds .*--dtype .*"allow_lossy": true',
    ),
    "two floats of 8 bits": (
        {"dtype": "fp8_e4m3"},
        {"dtype": "fp8_e5m2"},
        r"fp8_e4m3, we have fp8_e5m2: neither holds",
    ),
}


@pytest.mark.parametrize(("peer", "own", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_bridged_is_named_with_both_values(peer, own, message):
    ours = Cache(replace(Model(dtype="bfloat16"), **own), 2)
    theirs = Cache(replace(Model(dtype="bfloat16"), **peer), 2)
    with pytest.raises(GeometryError, match=message):
        assign(ours.shard.views, [theirs.shard.views], 0)


@pytest.mark.parametrize(("peer", "own"), [("float16", "bfloat16"), ("fp8_e4m3", "fp8_e5m2")])
def test_what_loses_either_way_is_mapped_where_it_is_allowed(peer, own):
    ours, theirs = Cache(Model(dtype=own), 2), Cache(Model(dtype=peer), 2)
    (rects,) = assign(ours.shard.views, [theirs.shard.views], 0, allow_lossy=True)
    assert len(rects) == 2


# What only the staged path can bridge.
NOT_DIRECT = {
    "block size": ({"block_tokens": 8}, "blocks of 8 and 4 tokens"),
    "dtype": ({"dtype": "float32"}, "KV dtypes float32 and bfloat16"),
    "scale of K": ({"scales": (0.5, 1.0)}, "scales 0.5 and 1 of k"),
    "scale of V": ({"scales": (1.0, 0.5)}, "scales 0.5 and 1 of v"),
}


@pytest.mark.parametrize(("peer", "reason"), NOT_DIRECT.values(), ids=NOT_DIRECT)
def test_what_rows_cannot_bridge_is_mapped_and_said(peer, reason):
    model = Model(dtype="bfloat16")
    ours, theirs = Cache(model, 2), Cache(replace(model, **peer), 2)
    (rects,) = assign(ours.shard.views, [theirs.shard.views], 0)
    assert len(rects) == 2
    assert {why_not_direct(rect) for rect in rects} == {reason}


def test_other_tiles_are_not_direct():
    model = Model(block_tokens=64, content=64)
    ours, theirs = Cache(model, 2), Cache(model, 2, "amx")
    ((rect, *_),) = assign(ours.shard.views, [theirs.shard.views], 0)
    assert why_not_direct(rect) == ""
    k = structs.replace(rect.src.parts[0], tiles=(Tile(32, 4096), UNTILED))
    other = rect._replace(dst=structs.replace(rect.dst, parts=(k, rect.dst.parts[1])))
    assert why_not_direct(other).startswith("tiles (Tile(cells=16")


def packed(layout="cpu:rvv", **changes):
    """Views of a packed layout of 2 heads, and changes to them."""
    model = Model(layers=1, heads=2)
    (view,) = Cache(model, 2).shard.views
    part = structs.replace(
        view.parts[0], name="kv", strides=(128, 64, 0, 1), shape=(2, 1, 64), itemsize=1
    )
    return structs.replace(view, **({"layout": layout, "parts": (part,)} | changes))


PACKED = {
    "against dense": (
        Cache(Model(layers=1, heads=2), 2).shard.views[0],
        r"layout dense, we have cpu:rvv; .*VLLM_KV_CACHE_LAYOUT",
    ),
    "another packing": (packed("cpu:amx"), r"layout cpu:amx, we have cpu:rvv; .*attention backend"),
    "block size": (packed(block_tokens=8), r"8-token blocks, we have 4, of a packed.*--block-size"),
    "dtype": (
        packed(dtype="float32"),
        r"float32, we have bfloat16, in a packed .*--kv-cache-dtype",
    ),
    "parts": (
        packed(parts=Cache(Model(), 2).shard.views[0].parts[:1]),
        r"parts \{.*we have \{.*64, 1\)",
    ),
}


@pytest.mark.parametrize(("theirs", "message"), PACKED.values(), ids=PACKED)
def test_packed_content_moves_between_equals_only(theirs, message):
    with pytest.raises(GeometryError, match=message):
        check_mappable(theirs, packed())


def test_packed_content_of_equals_is_direct():
    (rects,) = assign([packed()], [[packed()]], 0)
    assert [why_not_direct(rect) for rect in rects] == [""]
    assert rows_of(rects[0])[:, 4].tolist() == [128]


def test_a_head_that_nobody_holds_is_named():
    ours = Cache(Model(), 2)
    half = Cache(Model(), 2, tp_rank=1, tp_size=2)
    with pytest.raises(GeometryError, match=r"heads \[\(0, 2\)\] are held by none of the peer's 1"):
        assign(ours.shard.views, [half.shard.views], 0)


def test_a_layer_that_nobody_holds_is_named():
    ours = Cache(Model(layers=3), 2)
    theirs = Cache(Model(layers=3), 2, layers=Model(layers=3).names[:2])
    with pytest.raises(GeometryError, match=r"layer model\.layers\.2\.attn"):
        assign(ours.shard.views, [theirs.shard.views], 0)


def test_rows_beyond_reason_are_refused():
    # row per element: the peer keeps content outermost, we keep it innermost
    model = Model(layers=1, heads=16, block_tokens=64, content=128)
    ours, theirs = Cache(model, 1), Cache(model, 1, layout="LBCHN")
    (rects,) = assign(ours.shard.views, [theirs.shard.views], 0)
    with pytest.raises(GeometryError, match=r"131072 rows a block, expected at most 65536"):
        Route(rects, DRAM, DRAM)


def test_rows_that_have_no_index_are_no_route():
    """Each fetch used to fail, where the staged path can do it: a route was made all the same."""
    model = Model(layers=2)
    ours, theirs = Cache(model, 4), Cache(model, 6)
    (rects,) = assign(ours.shard.views, [theirs.shard.views], 0)
    large = [r._replace(src=structs.replace(r.src, num_blocks=1 << 30)) for r in rects]
    with pytest.raises(GeometryError, match=r"2147483648 rows .* at most 2147483647"):
        Route(large, DRAM, DRAM)


def test_rows_that_touch_in_one_block_only_are_not_joined():
    """K and V side by side in block 0 and elsewhere in all others."""
    memory = np.arange(256, dtype=np.uint8)
    base = int(memory.ctypes.data)
    parts = (
        Part(base, (32, 8, 4, 1), (1, 2, 4), 1, "k"),
        Part(base + 8, (64, 8, 4, 1), (1, 2, 4), 1, "v"),
    )
    view = BlockView("a", 0, 3, 2, Heads(0, 1, 1), "int8", "dense", parts)
    rows = rows_of(Rect(view, view, 0, 1))
    assert rows[:, 4].tolist() == [8, 8]
    assert rows[:, 1].tolist() == [32, 64]


def test_equal_layouts_become_one_row_a_block_and_layer():
    model = Model(layers=2)
    ours, theirs = Cache(model, 4), Cache(model, 6)
    (rects,) = assign(ours.shard.views, [theirs.shard.views], 0)
    route = Route(rects, DRAM, DRAM)
    assert len(route.src.rows) == len(route.dst.rows) == 2
    assert len(route.select([(5, 0, 3)], [((0, 1), (2, 3))]).src) == 4
