"""Views that a peer claims are checked before any address of them is used."""

import msgspec
import pytest
from msgspec.structs import replace

from kvconnect.blocks import (
    MAX_ADDRESS,
    MAX_LAYERS,
    BlockView,
    Heads,
    Part,
    Region,
    check_views,
    held_heads,
    part_extent,
)
from kvconnect.errors import GeometryError
from kvconnect.testing.geometry import LAYOUTS, Cache, Model

PART = Part(0x1000, (64, 32, 8, 2), (2, 4, 4), 2)
VIEW = BlockView("a", 0, 4, 4, Heads(0, 2, 2), "bfloat16", "dense", (PART,))
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
    "by count": replace(PART, shape=(2, 5, 4), strides=(64, 32, 8, 2)),
    "at the end of memory": replace(PART, base=MAX_ADDRESS),
    "at null": replace(PART, base=0),
    "overflowing": replace(PART, strides=(MAX_ADDRESS, MAX_ADDRESS, MAX_ADDRESS, MAX_ADDRESS)),
}


@pytest.mark.parametrize("part", OUTSIDE.values(), ids=OUTSIDE)
def test_bytes_outside_every_region_are_refused(part):
    with pytest.raises(GeometryError, match=r"layer a: bytes \[.*outside every registered"):
        check_views((replace(VIEW, parts=(PART, part)),), (REGION,))


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
