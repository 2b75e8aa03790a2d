"""An authenticated peer that says anything: fetches end, movers go on, no other byte is touched.

One field of one kind of message is changed, on its way from either side, to something else that
the wire allows or does not. Whatever it was, both movers still step, the fetch ends, nothing but
the blocks that it fills is written, and each side's next one, with an honest peer, succeeds. (What
a peer that knows the secret says of its own KV has to be believed.)
"""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.engines import Engine, World

from kvconnect.control import wire
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant
from kvconnect_bench.caches import Model

pytestmark = pytest.mark.slow

MODEL = Model(layers=2, heads=2, block_tokens=4, content=8, itemsize=2)
INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    100,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    (1 << 62) + 5,
    (1 << 63) - 1,
]
ASKED = (wire.Open, wire.Stage, wire.Want, wire.Close)
ANSWERED = (wire.Opened, wire.Staged, wire.Filled, wire.Refused, wire.Closed)
TABLE, MINE, TOKENS = (7, 8, 9), (1, 2, 3), 9


def changed(draw, value):
    """``value`` with something in it replaced."""
    if isinstance(value, msgspec.Struct):
        name = draw(st.sampled_from(value.__struct_fields__))
        return msgspec.structs.replace(value, **{name: changed(draw, getattr(value, name))})
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([*INTEGERS, -1]))
    if isinstance(value, float):
        return draw(st.sampled_from([1e-30, 0.37, 1e30]))
    if isinstance(value, bytes):
        return draw(st.sampled_from([b"", value[:-1], value + b"x", bytes(len(value)), value * 9]))
    if isinstance(value, str):
        return draw(st.sampled_from(["", value + "x", "v", "kv", "bfloat16", "float32", "x" * 300]))
    if isinstance(value, tuple) and value:
        place = draw(st.integers(0, len(value) - 1))
        return draw(
            st.sampled_from(
                [
                    (*value[:place], *value[place + 1 :]),
                    (*value, value[place]),
                    (*value[:place], changed(draw, value[place]), *value[place + 1 :]),
                ]
            )
        )
    return value


def make(world, mode, **options):
    return Engine(world, MODEL, num_blocks=12, staging=(4, 1), mode=mode, **options)


def lend(p, request_id, seed):
    for cache in p.caches:
        cache.fill(TABLE, seed)
    p.put(Grant(Terms(request_id, f"generation {request_id}", (TABLE,), TOKENS, b"d", 60.0)))
    return Terms(request_id, f"generation {request_id}", (TABLE,), TOKENS, b"d", 60.0)


def fetch(p, d, terms, request_id):
    blocks = (tuple(enumerate(MINE)),)
    d.put(Fetch(request_id, p.source(terms), blocks, TOKENS, b"d"))


@given(st.data())
def test_a_peer_that_says_anything_is_a_failed_fetch(data):
    world = World()
    mode = data.draw(st.sampled_from(["staged", "staged", "direct"]))
    p, d = make(world, mode, load_timeout_s=12.0), make(world, mode, load_timeout_s=12.0)
    kind = data.draw(st.sampled_from(ASKED + ANSWERED))
    left = data.draw(st.integers(1, 3))

    def spoiled(message):
        nonlocal left
        if not isinstance(message, kind) or not left:
            return message
        left -= 1
        return changed(data.draw, message)

    dialer, listener = d.movers[0].dialer, p.movers[0].listener
    tell, answer = dialer.calls.tell, listener.answer
    dialer.calls.tell = lambda peer, message: tell(peer, spoiled(message))
    listener.answer = lambda link, message: answer(link, spoiled(message))

    terms = lend(p, "r", seed=4)
    before = [p.caches[0].memory.copy(), d.caches[0].memory.copy()]
    fetch(p, d, terms, "d")
    world.go_on(30)
    world.go_on(10, seconds=2.0)  # whatever waits in vain times out
    assert len(d.ended["d"]) == 1
    assert np.array_equal(p.caches[0].memory, before[0])
    cache = d.caches[0]
    for layer in cache.layers:
        for part in range(cache.parts):
            cache.cells(layer, part)[list(MINE)] = 0
    filled = cache.memory.copy()
    cache.memory[:] = before[1]
    for layer in cache.layers:
        for part in range(cache.parts):
            cache.cells(layer, part)[list(MINE)] = 0
    assert np.array_equal(cache.memory, filled)

    # each of the two goes on with an honest one
    left = 0
    world.go_on(40, seconds=2.0)  # slots leave their quarantine
    for source, reader in ((make(world, mode), d), (p, make(world, mode))):
        fetch(source, reader, lend(source, "again", seed=5), "e")
        world.go_on(40)
        assert reader.ended["e"] == [None], kind
        assert reader.caches[0].holds_fill(tuple(enumerate(MINE)), 5, TOKENS)
