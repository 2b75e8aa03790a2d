"""Views that a peer claims are checked before any address of them is used."""

import msgspec
import pytest
from msgspec.structs import replace

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import (
    DENSE,
    MAX_ADDRESS,
    MAX_LAYERS,
    UNTILED,
    BlockView,
    Heads,
    Part,
    Region,
    Tile,
    check_views,
    held_heads,
    part_extent,
)
from kvconnect_bench.caches import LAYOUTS, Cache, Model

PART = Part(0x1000, (64, 32, 8, 2), (2, 4, 4), 2)
VIEW = BlockView("a", 0, 4, 4, Heads(0, 2, 2), "bfloat16", DENSE, (PART,))
REGION = Region(0x1000, 256)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_real_cache_says_of_itself_is_accepted(layout):
    shard = Cache(Model(), 3, layout).shard
    check_views(shard.views, shard.regions)


def test_a_part_ends_with_its_last_element():
    assert part_extent(PART, 4) == (0x1000, 0x1000 + 3 * 64 + 32 + 3 * 8 + 3 * 2 + 2)


def test_views_that_just_fit_are_accepted():
    check_views((VIEW,), (REGION,))


OUTSIDE = {
    "before": replace(PART, base=0x0FFF),
    "after": replace(PART, base=0x1001),
    "by stride": replace(PART, strides=(65, 32, 8, 2)),
    "by count": replace(PART, shape=(2, 4, 5)),
    "by the stride of a tile": replace(PART, tiles=(Tile(2, 17), UNTILED)),
    "by the size of a tile": replace(PART, tiles=(UNTILED, Tile(1, 3))),
    "at the end of memory": replace(PART, base=MAX_ADDRESS),
    "at null": replace(PART, base=0),
    "overflowing": replace(PART, strides=(MAX_ADDRESS, MAX_ADDRESS, MAX_ADDRESS, MAX_ADDRESS)),
}


@pytest.mark.parametrize("part", OUTSIDE.values(), ids=OUTSIDE)
def test_bytes_outside_every_region_are_refused(part):
    with pytest.raises(GeometryError, match=r"layer a: bytes \[.*outside every registered"):
        check_views((replace(VIEW, parts=(PART, replace(part, name="v"))),), (REGION,))


def test_a_part_may_not_lie_across_two_regions():
    halves = (Region(0x1000, 128), Region(0x1080, 128))
    with pytest.raises(GeometryError, match="outside every"):
        check_views((VIEW,), halves)


def test_no_region_at_all_is_refused():
    with pytest.raises(GeometryError, match="outside every"):
        check_views((VIEW,), ())


def test_addresses_beyond_63_bits_are_refused():
    """Used to end the mover's thread with OverflowError when rows were computed."""
    far = replace(PART, base=MAX_ADDRESS - 10)
    with pytest.raises(GeometryError, match="63-bit"):
        check_views((replace(VIEW, parts=(far,)),), (Region(MAX_ADDRESS - 20, MAX_ADDRESS),))


def test_heads_beyond_their_total_are_refused():
    with pytest.raises(GeometryError, match="exceed their total"):
        check_views((replace(VIEW, heads=Heads(1, 2, 2)),), (REGION,))


def test_a_part_with_other_heads_than_its_view_is_refused():
    with pytest.raises(GeometryError, match="a part has 2 heads, expected 1"):
        check_views((replace(VIEW, heads=Heads(0, 1, 2)),), (REGION,))


def test_a_part_with_other_tokens_than_its_view_is_refused():
    with pytest.raises(GeometryError, match="a part has 4 tokens a block, expected 2"):
        check_views((replace(VIEW, block_tokens=2),), (REGION,))


def test_a_packed_part_says_nothing_of_tokens():
    packed = replace(PART, strides=(64, 32, 0, 1), shape=(2, 1, 32), itemsize=1)
    check_views((replace(VIEW, layout="cpu:rvv", parts=(packed,)),), (REGION,))


@pytest.mark.parametrize("tiles", [(Tile(3, 8), UNTILED), (UNTILED, Tile(8, 8))])
def test_a_tile_that_does_not_divide_its_axis_is_refused(tiles):
    with pytest.raises(GeometryError, match="an axis of 4 is cut into tiles of"):
        check_views((replace(VIEW, parts=(replace(PART, tiles=tiles),)),), (REGION,))


def test_two_parts_of_one_name_are_refused():
    with pytest.raises(GeometryError, match="two parts have one name"):
        check_views((replace(VIEW, parts=(PART, PART)),), (REGION,))


def test_a_tile_is_where_it_says():
    """Tokens in tiles of 2 and content in tiles of 2: the last cell counts."""
    tiled = replace(PART, strides=(64, 32, 4, 2), tiles=(Tile(2, 16), Tile(2, 8)))
    assert part_extent(tiled, 4) == (0x1000, 0x1000 + 3 * 64 + 32 + 16 + 4 + 8 + 2 + 2)


def test_axes_of_an_uncut_part_are_cut_as_the_other_side_wants():
    assert PART.axes((0, 0)) == [(2, 32), (4, 8), (4, 2)]
    assert PART.axes((2, 4)) == [(2, 32), (2, 16), (2, 8), (1, 8), (4, 2)]
    tiled = replace(PART, tiles=(Tile(2, 20), UNTILED))
    assert tiled.axes((2, 0)) == [(2, 32), (2, 20), (2, 8), (4, 2)]


def test_a_layer_that_is_claimed_twice_is_refused():
    with pytest.raises(GeometryError, match="claimed twice"):
        check_views((VIEW, VIEW), (REGION,))


def test_more_layers_than_any_model_has_are_refused():
    views = tuple(replace(VIEW, layer=str(i)) for i in range(MAX_LAYERS + 1))
    with pytest.raises(GeometryError, match=f"{MAX_LAYERS + 1} layers"):
        check_views(views, (REGION,))


HOSTILE = {
    "negative base": {"base": -1},
    "negative stride": {"strides": [-1, 1, 1, 1]},
    "three strides": {"strides": [1, 1, 1]},
    "no heads": {"shape": [0, 1, 1]},
    "no tokens": {"shape": [1, 0, 1]},
    "no item": {"itemsize": 0},
    "no such part": {"name": "q"},
    "negative tile": {"tiles": [[-1, 1], [0, 0]]},
    "one tile": {"tiles": [[0, 0]]},
    "no scale": {"scale": 0.0},
    "negative scale": {"scale": -1.0},
    "infinite scale": {"scale": float("inf")},
    "no number for a scale": {"scale": float("nan")},
    "64 bits": {"base": 1 << 63},
    "text": {"base": "0"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_part_that_cannot_be_does_not_decode(change):
    fields = {**msgspec.structs.asdict(PART), **change}
    data = msgspec.msgpack.encode(list(fields.values()))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=Part)


def test_heads_are_divided_as_vllm_does():
    assert [held_heads(r, 2, 8) for r in range(2)] == [Heads(0, 4, 8), Heads(4, 4, 8)]
    assert [held_heads(r, 4, 2).first for r in range(4)] == [0, 0, 1, 1]
    with pytest.raises(GeometryError, match="6 KV heads cannot be divided over 4"):
        held_heads(0, 4, 6)
    with pytest.raises(GeometryError, match="4 KV heads cannot be replicated over 6"):
        held_heads(0, 6, 4)
