"""Any two geometries in scope: every wanted cell arrives, and nothing else is touched."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvconnect.blocks import BlockView, Heads, Part
from kvconnect.errors import GeometryError
from kvconnect.plan import NO_BLOCK, Memory, Rect, Route, assign, rows_of
from kvconnect.testing.geometry import LAYOUTS, Cache, Model, engine
from kvconnect.transport.base import Op, Work
from kvconnect.transport.loopback import Fabric, LoopbackTransport

DRAM = Memory("DRAM", 0)
TP_SIZES = (1, 2, 3, 4, 6, 8)


@st.composite
def models(draw):
    return Model(
        layers=draw(st.integers(1, 5)),
        heads=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])),
        block_tokens=draw(st.sampled_from([1, 2, 3, 8])),
        content=draw(st.integers(1, 4)),
        itemsize=draw(st.sampled_from([1, 2, 4])),
        groups=draw(st.integers(1, 3)),
    )


@st.composite
def engines(draw, model, vec):
    sizes = [n for n in TP_SIZES if model.heads % n == 0 or n % model.heads == 0]
    return engine(
        model,
        num_blocks=draw(st.integers(1, 9)),
        layout="vec" if vec else draw(st.sampled_from([x for x in LAYOUTS if x != "vec"])),
        tp_size=draw(st.sampled_from(sizes)),
        pp_size=draw(st.integers(1, model.layers)),
        seed=draw(st.integers(0, 1000)),
        padding=draw(st.sampled_from([0, 0, 3])),
    )


@st.composite
def transfers(draw):
    """(model, source ranks, destination ranks, source tables, destination blocks)."""
    model = draw(models())
    vec = draw(st.booleans())
    source, target = draw(engines(model, vec)), draw(engines(model, vec))
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
    for layer, head in itertools.product(model.names, range(model.heads)):
        if not cache.holds(layer, head):
            continue
        owner = next(s for s in source if s.holds(layer, head))
        group = model.names.index(layer) % model.groups
        for (place, block), part in itertools.product(blocks[group], range(cache.parts)):
            for token in range(model.block_tokens):
                cell = owner.read(layer, part, tables[group][place], head, token)
                cache.write(layer, part, block, head, token, cell)
                nbytes += len(cell)
    wanted = cache.memory.copy()
    cache.memory[:] = before
    return wanted, nbytes


def agree(source):
    """Make replicas equal, as the ranks of a real engine are."""
    for cache in source:
        cache.fill(range(cache.num_blocks), seed=7)


@pytest.mark.slow
@given(transfers())
def test_every_wanted_cell_equals_its_source_and_nothing_else_is_touched(transfer):
    model, source, target, tables, blocks = transfer
    event(f"{len(source)}:{len(target)} ranks")
    agree(source)
    sources = [s.memory.copy() for s in source]
    for rank, cache in enumerate(target):
        wanted, nbytes = wanted_memory(model, source, cache, tables, blocks)
        assert load(source, target, rank, tables, blocks) == nbytes
        assert np.array_equal(cache.memory, wanted)
    for cache, before in zip(source, sources, strict=True):
        assert np.array_equal(cache.memory, before)


@pytest.mark.slow
@given(transfers(), st.data())
def test_a_place_that_the_source_does_not_hold_is_refused(transfer, data):
    _, source, target, tables, blocks = transfer
    held = [(g, place) for g, pairs in enumerate(blocks) for place, _ in pairs]
    if not held:
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
    """Ids beyond 63 bits are refused before, by `kvconnect.wire`."""
    _, source, target, tables, blocks = transfer
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


DIFFERENCES = {
    "block size": ({"block_tokens": 8}, r"8-token blocks, we have 4.*--block-size"),
    "dtype": ({"dtype": "float8"}, r"KV dtype float8, we have bfloat16.*--kv-cache-dtype"),
    "heads": ({"heads": 8}, r"8 KV heads, we have 4"),
    "content": ({"content": 16}, r"\(4, 16\).*we have .*\(4, 8\)"),
    "itemsize": ({"itemsize": 4}, r"parts .*4\)\].*we have .*2\)\]"),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_cannot_be_bridged_is_named_with_both_values(change, message):
    ours = Cache(Model(), 2)
    theirs = Cache(replace(Model(), **change), 2)
    with pytest.raises(GeometryError, match=message):
        assign(ours.shard.views, [theirs.shard.views], 0)


def test_another_content_layout_is_named_with_both_values():
    ours, theirs = Cache(Model(), 2), Cache(Model(), 2, layout="vec")
    with pytest.raises(GeometryError, match=r"layout cpu:vec, we have dense.*VLLM_KV_CACHE_LAYOUT"):
        assign(ours.shard.views, [theirs.shard.views], 0)


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


def test_rows_that_touch_in_one_block_only_are_not_joined():
    """K and V side by side in block 0 and elsewhere in all others."""
    memory = np.arange(256, dtype=np.uint8)
    base = int(memory.ctypes.data)
    parts = (
        Part(base, (32, 8, 4, 1), (1, 2, 4), 1),
        Part(base + 8, (64, 8, 4, 1), (1, 2, 4), 1),
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
