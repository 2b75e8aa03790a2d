"""A peer that describes its memory in any way at all: fetches end, no byte outside them is touched.

Every field of the Body in a Welcome, at any depth, is replaced in turn by each of the values that
its kind may have on the wire, and by some that it may not. Whatever the description is, our mover
steps on, the fetch ends, and what changed in our memory are cells of the blocks that it fills.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from kit.engines import Engine, World

from kvconnect.control import wire
from kvconnect.geometry.blocks import BlockView, Part, Shard, Tile
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant
from kvconnect_bench.caches import Model

pytestmark = pytest.mark.slow

MODEL = Model(layers=1, heads=2, block_tokens=4, content=8, itemsize=2)
ODD = Model(layers=1, heads=2, block_tokens=8, content=8, itemsize=4)
TABLE, MINE, TOKENS = (7, 8, 9), (1, 2, 3), 12

INTEGERS = (-1, 0, 1, 2, 3, 5, 8, 16, 64, 100, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31)
LARGE = (1 << 40, (1 << 62) + 5, (1 << 63) - 1)
FLOATS = (-1.0, 0.0, 1e-300, 1e-30, 0.37, 1e30, float("inf"), float("nan"))
TEXTS = ("", "k", "v", "kv", "bfloat16", "float16", "float32", "fp8_e4m3", "dense", "int2", "x" * 9)


def mutants(value: Any) -> Iterator[Any]:
    """``value`` with one thing in it replaced, in every way."""
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            for other in mutants(getattr(value, name)):
                yield msgspec.structs.replace(value, **{name: other})
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from {*INTEGERS, *LARGE, value + 1, value - 1, 2 * value} - {value}
    elif isinstance(value, float):
        yield from FLOATS
    elif isinstance(value, bytes):
        yield from (b"", value[:-1], value + b"x", bytes(len(value)))
    elif isinstance(value, str):
        yield from TEXTS
    elif isinstance(value, dict):
        yield from ({}, {"vllm": ""}, {"x": "y"})
    elif isinstance(value, tuple):
        yield ()
        for place, held in enumerate(value):
            yield (*value[:place], *value[place + 1 :])
            yield (*value, held)
            for other in mutants(held):
                yield (*value[:place], other, *value[place + 1 :])


def all_at_once(view: BlockView) -> Iterator[BlockView]:
    """Claims that need several fields to agree, of one view."""
    parts = view.parts
    for itemsize in (1, 2, 4, 8, 64, 256):
        for dtype in ("bfloat16", "float16", "float32", "fp8_e4m3", "int4", view.dtype):
            changed = tuple(msgspec.structs.replace(p, itemsize=itemsize) for p in parts)
            yield msgspec.structs.replace(view, parts=changed, dtype=dtype, num_blocks=10)
            closer = tuple(
                msgspec.structs.replace(p, itemsize=itemsize, strides=(*p.strides[:3], itemsize))
                for p in parts
            )
            yield msgspec.structs.replace(view, parts=closer, dtype=dtype, num_blocks=10)
    for names in itertools.product(("k", "v", "kv"), repeat=len(parts)):
        named = tuple(
            msgspec.structs.replace(p, name=name) for p, name in zip(parts, names, strict=True)
        )
        yield msgspec.structs.replace(view, parts=named)
    for cells, axis in itertools.product((1, 2, 4, 8), (0, 1)):
        for stride in (0, 2, 64, 1 << 12):
            cut = Tile(cells, stride)
            tiled = tuple(
                msgspec.structs.replace(
                    p, tiles=(cut, p.tiles[1]) if not axis else (p.tiles[0], cut)
                )
                for p in parts
            )
            yield msgspec.structs.replace(view, parts=tiled)
    for strides in itertools.product((0, 2, 1 << 10), repeat=4):
        moved = tuple(msgspec.structs.replace(p, strides=strides) for p in parts)
        yield msgspec.structs.replace(view, parts=moved)


def packed(view: BlockView) -> BlockView:
    """The same memory as a packing that moves whole blocks."""
    part = view.parts[0]
    heads, tokens, content = part.shape
    whole = Part(part.base, (*part.strides[:2], 1, 1), (heads, 1, tokens * content), 1)
    return msgspec.structs.replace(view, layout="packed", parts=(whole,))


def shard_of(shard: Shard, change: Any) -> Shard:
    return msgspec.structs.replace(shard, views=tuple(map(change, shard.views)))


class Pair:
    """Two engines over memory that is kept, each mutant with movers of their own."""

    def __init__(self, kind: str, mode: str) -> None:
        self.world = World()
        self.p = Engine(self.world, MODEL, num_blocks=12, staging=(4, 1), mode=mode)
        self.d = Engine(
            self.world,
            ODD if kind == "converted" else MODEL,
            num_blocks=12,
            layout="LBNHC" if kind == "other layout" else "LBHNC",
            staging=(4, 1),
            mode=mode,
        )
        if kind == "packed":
            for one in (self.p, self.d):
                one.caches[0].shard = shard_of(one.caches[0].shard, packed)
        self.p.caches[0].fill(TABLE, 4)
        self.before = [one.caches[0].memory.copy() for one in (self.p, self.d)]
        mine, view = self.d.caches[0], self.d.caches[0].shard.views[0]
        self.blocks = tuple((i, b) for i, b in enumerate(MINE) if i * view.block_tokens < TOKENS)
        self.may_change = np.zeros(len(mine.memory), dtype=bool)
        start = int(mine.memory.ctypes.data)
        for part in (part for view in mine.shard.views for part in view.parts):
            for _, block in self.blocks:
                at = np.array([part.base - start + block * part.strides[0]])
                for count, stride in part.axes((part.tiles[0].cells, part.tiles[1].cells)):
                    at = (at[:, None] + np.arange(count) * stride).reshape(-1)
                self.may_change[(at[:, None] + np.arange(part.itemsize)).reshape(-1)] = True

    def body(self) -> wire.Body:
        """What the prefill engine honestly says."""
        told: list[wire.Body] = []
        self.start(lambda body: told.append(body) or body)
        self.fetch()
        return told[0]

    def start(self, described: Callable[[wire.Body], wire.Body]) -> None:
        """New movers; the prefill engine's Body goes through ``described``."""
        for one, before in zip((self.p, self.d), self.before, strict=True):
            one.stop()
            one.caches[0].memory[:] = before
            one.start()
        listener = self.p.movers[0].listener
        answer = listener.answer

        def lie(link: Any, message: wire.Message) -> None:
            if isinstance(message, wire.Welcome):
                body = described(wire.decode_body(message.body))
                message = msgspec.structs.replace(message, body=msgspec.msgpack.encode(body))
            answer(link, message)

        listener.answer = lie

    def fetch(self) -> list[str | None]:
        """How a load of the whole lease ended."""
        groups = 1 + max(view.group for view in self.p.caches[0].shard.views)
        terms = Terms("r", "lease of r", (TABLE,) * groups, TOKENS, b"d", 60.0)
        self.p.put(Grant(terms))
        self.d.put(Fetch("d", self.p.source(terms), (self.blocks,), TOKENS, b"d"))
        for rounds in range(200):
            self.world.go_on(1, seconds=0.0 if rounds < 12 else 2.0)
            if "d" in self.d.ended:
                break
        return self.d.ended["d"]


def bodies(body: wire.Body) -> Iterator[wire.Body]:
    yield from mutants(body)
    for view in all_at_once(body.views[0]):
        yield msgspec.structs.replace(body, views=(view, *body.views[1:]))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("equal", "direct"),
        ("equal", "staged"),
        ("other layout", "direct"),
        ("packed", "direct"),
        ("packed", "staged"),
        ("converted", "staged"),
    ],
)
def test_whatever_a_peer_says_of_its_memory(kind: str, mode: str) -> None:
    pair, tried = Pair(kind, mode), 0
    honest = pair.body()
    assert pair.d.ended["d"] == [None], "an honest description is believed"
    for body in bodies(honest):

        def described(now: wire.Body, body: wire.Body = body) -> wire.Body:
            kept = {
                name: getattr(now, name)  # which is drawn anew at each start
                for name in ("incarnation", "hello")
                if getattr(body, name) == getattr(honest, name)
            }
            return msgspec.structs.replace(body, **kept)

        pair.start(described)
        assert len(pair.fetch()) == 1
        changed = pair.d.caches[0].memory != pair.before[1]
        assert not (changed & ~pair.may_change).any(), f"{body} wrote outside"
        assert np.array_equal(pair.p.caches[0].memory, pair.before[0])
        tried += 1
    assert tried >= 700, f"{tried} descriptions were tried"
