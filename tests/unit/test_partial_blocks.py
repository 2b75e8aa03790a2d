"""Blocks of which only some tokens are wanted: the last of a prompt, and the first of a window.

vLLM does not zero a block that is loaded. What stood in it before may be NaN, and a kernel that
masks a cell still multiplies what is in it by nought.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.engines import Engine, World

from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant
from kvconnect_bench.caches import Model

MODEL = Model(layers=2, heads=2, block_tokens=4, content=8, itemsize=2)
NAN = 0x7FC0  # as bfloat16


def pair(sizes, mode, num_blocks=40):
    world = World()
    made = [
        Engine(world, replace(MODEL, block_tokens=size), num_blocks, staging=(8, 1), mode=mode)
        for size in sizes
    ]
    return world, *made


def lend(p, table, tokens, seed=3):
    """Blocks of the prompt as prefill keeps them: zeroes after its end."""
    held = [block if block != NO_BLOCK else 0 for block in table]
    size = p.caches[0].model.block_tokens
    p.caches[0].fill(held, seed)
    for layer in p.caches[0].layers:
        for part in (0, 1):
            p.caches[0].cells(layer, part)[held[-1], :, 0, (tokens - 1) % size + 1 :] = 0
    terms = Terms("r", "a lease id", (tuple(table),), tokens, b"d", 60.0)
    p.put(Grant(terms))
    return terms


def poison(d):
    for layer in d.caches[0].layers:
        for part in (0, 1):
            d.caches[0].cells(layer, part)[:] = NAN


def nans(d, blocks):
    cache = d.caches[0]
    return sum(
        int((cache.cells(layer, part)[list(blocks)] == NAN).sum())
        for layer in cache.layers
        for part in (0, 1)
    )


@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 17, 31, 33])
@pytest.mark.parametrize(
    ("sizes", "mode"),
    [((4, 4), "direct"), ((4, 4), "staged"), ((4, 16), "staged"), ((16, 4), "staged")],
    ids=str,
)
def test_no_cell_of_a_loaded_block_is_left_as_it_was(sizes, mode, tokens):
    """Of 288 cells after the end of a prompt the staged path used to leave 288."""
    world, p, d = pair(sizes, mode)
    terms = lend(p, range(1, 1 + -(-tokens // sizes[0])), tokens)
    poison(d)
    mine = tuple(enumerate(range(2, 2 + -(-tokens // sizes[1]))))
    d.put(Fetch("d", p.source(terms), (mine,), tokens, b"d"))
    world.go_on(30)
    assert d.ended["d"] == [None]
    assert d.caches[0].holds_fill(mine, 3, tokens)
    assert nans(d, [block for _, block in mine]) == 0
    others = set(range(d.caches[0].num_blocks)) - {block for _, block in mine}
    assert nans(d, others) == len(others) * sizes[1] * 2 * 8 * 2, "and of no other block any"


@given(st.data())
def test_a_window_is_loaded_with_every_pair_of_block_sizes(data):
    """Where decode's blocks are larger, 12 of 16 lengths of prompts used to fail at each try."""
    sizes = data.draw(st.sampled_from([(a, b) for a in (4, 6, 16) for b in (4, 8, 16, 24)]))
    tokens, window = data.draw(st.integers(1, 90)), data.draw(st.integers(2, 40))
    needed = max(0, tokens - window + 1)
    theirs, ours = (-(-tokens // size) for size in sizes)
    table = [i + 1 if (i + 1) * sizes[0] > needed else NO_BLOCK for i in range(theirs)]
    mine = tuple((i, i + 1) for i in range(ours) if (i + 1) * sizes[1] > needed)
    world, p, d = pair(sizes, "auto")
    terms = lend(p, table, tokens)
    poison(d)
    d.put(Fetch("d", p.source(terms), (mine,), tokens, b"d", needed_from=(needed,)))
    world.go_on(40)
    assert d.ended["d"] == [None]
    cache, size = d.caches[0], sizes[1]
    wanted = np.arange(needed, tokens)
    for layer in cache.layers:
        for part in (0, 1):
            found = cache.read(layer, part, wanted // size + 1, wanted % size)
            held = p.caches[0].read(layer, part, wanted // sizes[0] + 1, wanted % sizes[0])
            assert np.array_equal(found, held)
    assert nans(d, [block for _, block in mine]) == 0
