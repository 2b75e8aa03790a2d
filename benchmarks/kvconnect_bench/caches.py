"""KV caches of any geometry in plain memory: the oracle of tests.

* A `Model` is one engine's model with its KV format. Two engines agree on its layers, heads and
  content, and may differ in everything else: block size, dtype, scales, groups.
* A `Cache` is one rank's memory, in any of LAYOUTS, with guard bytes around it.
* Layouts are orders of ``L``ayer, ``B``lock, ``H``ead, ``N`` (token) and ``C``ontent, outermost
  first, e.g. ``LBHNC``, with K and V side by side in C; ``pieces``: LBHNC of several kernel blocks
  a block; or as vLLM's CPU backend packs a head of a block, K before V: ``vec`` (K column-major
  ``[C, N]``, V ``[N, C]``) and ``amx`` (both in tiles).
* Cells are reached by numpy's reshape and transpose, not by kvconnect's own arithmetic.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Literal

import numpy as np

from kvconnect.geometry.blocks import (
    DENSE,
    UNTILED,
    BlockView,
    Part,
    Region,
    Shard,
    Tile,
    held_heads,
)
from kvconnect.ops import NUMBERS
from kvconnect_bench.numbers import bits_at

ORDERS = ("LBHNC", "LBNHC", "BLHNC", "LHBNC", "BLNHC", "BHLNC")
LAYOUTS = (*ORDERS, "pieces", "vec", "amx")
TORCH_ALIGN = 64
GUARD_BYTES = 64
ITEM_BYTES = {name: row.itemsize for name, row in NUMBERS.items()} | {
    "int8": 1,
    "int16": 2,
    "int32": 4,
}
_BY_BYTES = {1: "fp8_e4m3", 2: "bfloat16", 4: "float32"}


@dataclass(frozen=True)
class Model:
    """Layer ``i`` belongs to KV cache group ``i % groups``."""

    layers: int = 2
    heads: int = 4
    block_tokens: int = 4
    content: int = 8
    """Elements of K and V together, of a token and head."""
    itemsize: int = 2
    """Bytes of the dtype; chooses one where ``dtype`` is empty."""
    groups: int = 1
    dtype: str = ""
    values: int | None = None
    """Elements of V; None for half of the content, 0 for one fused part as of MLA."""
    scales: tuple[float, float] = (1.0, 1.0)
    """The scale of K, or of both fused, and that of V."""

    def __post_init__(self) -> None:
        dtype = self.dtype or _BY_BYTES[self.itemsize]
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "itemsize", ITEM_BYTES[dtype])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers."""
        return tuple(f"model.layers.{i}.attn" for i in range(self.layers))

    @property
    def parts(self) -> tuple[tuple[Literal["k", "v", "kv"], int], ...]:
        """Name and elements of each part."""
        values = self.content // 2 if self.values is None else self.values
        return (("k", self.content - values), ("v", values)) if values else (("kv", self.content),)

    def stages(self, pp_size: int) -> list[tuple[str, ...]]:
        """Layers of each pipeline stage; the first stages take what cannot be divided."""
        each, rest = divmod(self.layers, pp_size)
        ends = [each * i + min(i, rest) for i in range(pp_size + 1)]
        return [self.names[a:b] for a, b in itertools.pairwise(ends)]


class Cache:
    """One rank's KV cache. ``layers``: of its pipeline stage; None for all."""

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        layout: str = "LBHNC",
        tp_rank: int = 0,
        tp_size: int = 1,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        padding: int = 0,
    ) -> None:
        """``padding``: elements after each block, as where unequal layers share pages."""
        self.model = model
        self.num_blocks = num_blocks
        self.layout = layout
        self.heads = held_heads(tp_rank, tp_size, model.heads)
        self.layers = tuple(model.names if layers is None else layers)
        self.parts = len(model.parts)
        """Parts of each layer."""
        counts = self._counts()
        at = counts[0].index("B") + 1
        inner = prod(counts[1][at:])
        size = prod(counts[1][:at]) * (inner + padding) * model.itemsize
        # whole memory, guards included: one equality shows that nothing else was touched
        self.memory = _aligned(size + 2 * GUARD_BYTES)
        self.memory[:] = np.random.default_rng(seed).integers(
            0, 256, len(self.memory), dtype=np.uint8
        )
        live = self.memory[GUARD_BYTES : GUARD_BYTES + size].view(f"u{model.itemsize}")
        blocks = live.reshape(*counts[1][:at], inner + padding)[..., :inner]
        self._cells = self._found(counts[0], blocks.reshape(counts[1]))
        assert all(np.may_share_memory(cells, live) for cells in self._cells.values())
        base = int(self.memory.ctypes.data) + GUARD_BYTES
        self.shard = Shard(
            tuple(self._view(name) for name in self.layers), (Region(base, size),), self.memory
        )

    def cells(self, layer: str, part: int = 0) -> np.ndarray:
        """Live cells of a part: ``[block, head, token tile, token, content tile, element]``."""
        return self._cells[layer, part]

    def read(self, layer: str, part: int, blocks: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Cells ``[i, held head, element]`` of token ``tokens[i]`` of block ``blocks[i]``."""
        cells = self._cells[layer, part]
        inner = cells.shape[3]
        found = cells[blocks, :, tokens // inner, tokens % inner]
        size = self.model.parts[part][1]
        return found.reshape(len(blocks), self.heads.count, size)

    def write(
        self, layer: str, part: int, blocks: np.ndarray, tokens: np.ndarray, values: np.ndarray
    ) -> None:
        """Set cells that `read` reads."""
        cells = self._cells[layer, part]
        inner = cells.shape[3]
        shape = len(blocks), self.heads.count, *cells.shape[4:]
        cells[blocks, :, tokens // inner, tokens % inner] = values.reshape(shape)

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """Write what ``seed`` stands for into the blocks of a prompt's tokens.

        The same numbers on all ranks of all engines, whatever their block size, dtype and scales.
        """
        held = np.asarray(blocks, dtype=np.int64)
        tokens = np.arange(len(held) * self.model.block_tokens)
        place, offset = np.divmod(tokens, self.model.block_tokens)
        for layer, part in self._cells:
            self.write(layer, part, held[place], offset, self._filled(layer, part, tokens, seed))

    def holds_fill(
        self, blocks: Sequence[tuple[int, int]], seed: int, tokens: int | None = None
    ) -> bool:
        """Whether blocks hold what `fill` wrote; pairs of (place in the prompt's blocks, block).

        ``tokens``: only the first of the prompt are looked at; None for all.
        """
        places, held = np.array(blocks, dtype=np.int64).reshape(-1, 2).T
        size = self.model.block_tokens
        at, offset = np.divmod(np.arange(len(held) * size), size)
        token = places[at] * size + offset
        if tokens is not None:
            at, offset, token = (x[token < tokens] for x in (at, offset, token))
        return all(
            np.array_equal(
                self.read(layer, part, held[at], offset), self._filled(layer, part, token, seed)
            )
            for layer, part in self._cells
        )

    def _filled(self, layer: str, part: int, tokens: np.ndarray, seed: int) -> np.ndarray:
        model, heads = self.model, self.heads
        size = model.parts[part][1]
        head = np.arange(heads.first, heads.first + heads.count)
        at = (tokens[:, None] * model.heads + head)[:, :, None] * size + np.arange(size)
        key = [seed, model.names.index(layer), part]
        return bits_at(at, key, model.dtype, model.itemsize, model.scales[part])

    def _counts(self) -> tuple[str, tuple[int, ...]]:
        """Letters of the axes, outermost first, and how many each has; P: pieces of a block."""
        model = self.model
        tokens, pieces = model.block_tokens, 1
        order = self.layout
        if order == "pieces":
            pieces = tokens // (16 if tokens % 32 == 0 else gcd(tokens, 2))
            order = "LBPHNC"
        elif order in ("vec", "amx"):
            order = "LBHNC"
        count = {"L": len(self.layers), "B": self.num_blocks, "P": pieces}
        count |= {"H": self.heads.count, "N": tokens // pieces, "C": model.content}
        return order, tuple(count[axis] for axis in order)

    def _found(self, order: str, whole: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
        if "P" not in order:
            order, whole = order.replace("B", "BP"), np.expand_dims(whole, order.index("B") + 1)
        whole = whole.transpose([order.index(axis) for axis in "LBHPNC"])
        found = {}
        for index, name in enumerate(self.layers):
            first = 0
            for part, (_, size) in enumerate(self.model.parts):
                if self.layout in ("vec", "amx"):
                    # a head's bytes in a block, K's before V's
                    head = whole[index].reshape(*whole.shape[1:3], -1)
                    tokens = self.model.block_tokens
                    own = head[..., first * tokens : (first + size) * tokens]
                    cells = _packed(own, self.layout, tokens, size, last=part > 0)
                else:
                    cells = whole[index][..., None, first : first + size]
                found[name, part] = cells
                first += size
        return found

    def _view(self, name: str) -> BlockView:
        model = self.model
        return BlockView(
            layer=name,
            group=model.names.index(name) % model.groups,
            num_blocks=self.num_blocks,
            block_tokens=model.block_tokens,
            heads=self.heads,
            dtype=model.dtype,
            layout=DENSE,
            parts=tuple(self._part(name, part) for part in range(self.parts)),
        )

    def _part(self, layer: str, part: int) -> Part:
        cells = self._cells[layer, part]
        name, size = self.model.parts[part]
        block, head, *rest = cells.strides
        token, token_tile = _axis(cells.shape[2:4], rest[:2])
        element, content_tile = _axis(cells.shape[4:], rest[2:])
        return Part(
            base=int(cells.ctypes.data),
            strides=(block, head, token, element),
            shape=(self.heads.count, self.model.block_tokens, size),
            itemsize=self.model.itemsize,
            name=name,
            tiles=(token_tile, content_tile),
            scale=self.model.scales[part],
        )


def engine(
    model: Model,
    num_blocks: int,
    layout: str = "LBHNC",
    tp_size: int = 1,
    pp_size: int = 1,
    seed: int = 0,
    padding: int = 0,
) -> list[Cache]:
    """The caches of all ranks of an engine, pipeline stages outermost."""
    places = itertools.product(model.stages(pp_size), range(tp_size))
    return [
        Cache(model, num_blocks, layout, rank, tp_size, stage, seed + i, padding)
        for i, (stage, rank) in enumerate(places)
    ]


def _aligned(nbytes: int) -> np.ndarray:
    """Memory that begins where torch's does, at 64 bytes; numpy's begins at 16."""
    memory = np.empty(nbytes + TORCH_ALIGN, np.uint8)
    first = -memory.ctypes.data % TORCH_ALIGN
    return memory[first : first + nbytes]


def _packed(own: np.ndarray, layout: str, tokens: int, size: int, last: bool) -> np.ndarray:
    """Cells ``[B, H, token tile, token, content tile, element]`` of ``own`` ``[B, H, cells]``."""
    lead = own.shape[:2]
    if layout == "vec":
        if last:
            return own.reshape(*lead, 1, tokens, 1, size)
        return own.reshape(*lead, size, tokens).transpose(0, 1, 3, 2)[:, :, None, :, None]
    # amx: 16 rows of pairs, as far as they divide what tests use
    if last:
        rows, pair = _rows(size), gcd(tokens, 2)
        tiles = own.reshape(*lead, size // rows, tokens // pair, rows, pair)
        return tiles.transpose(0, 1, 3, 5, 2, 4)
    rows, pair = _rows(tokens), gcd(size, 2)
    tiles = own.reshape(*lead, tokens // rows, size // pair, rows, pair)
    return tiles.transpose(0, 1, 2, 4, 3, 5)


def _rows(count: int) -> int:
    return 16 if count % 16 == 0 else gcd(count, 4)


def _axis(counts: Sequence[int], strides: Sequence[int]) -> tuple[int, Tile]:
    """Stride and tile of an axis that is (outer, inner)."""
    (outer, cells), (far, near) = counts, strides
    if cells == 1:
        return far, UNTILED
    if outer == 1 or cells * near == far:
        return near, UNTILED
    return near, Tile(cells, far)
