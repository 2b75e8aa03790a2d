"""KV caches of any geometry in plain memory, and their cells one by one: the oracle of tests.

* A `Model` is what two engines agree on; a `Cache` is one rank's memory, in any layout, with
  guard bytes around it.
* Layouts are orders of ``L``ayer, ``B``lock, ``H``ead, ``N`` (token) and ``C``ontent, outermost
  first, e.g. ``LBHNC``; or ``vec``, as vLLM's CPU backend keeps them: K column-major ``[C, N]``
  and V row-major ``[N, C]``, two parts.
* Cells are reached through strides by numpy, not by kvconnect's own arithmetic.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvconnect.blocks import BlockView, Part, Region, Shard, held_heads

LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "LHBNC", "BLNHC", "BHLNC", "vec")
GUARD_BYTES = 64


@dataclass(frozen=True)
class Model:
    """What both engines agree on. Layer ``i`` belongs to KV cache group ``i % groups``."""

    layers: int = 2
    heads: int = 4
    block_tokens: int = 4
    content: int = 8
    itemsize: int = 2
    groups: int = 1
    dtype: str = "bfloat16"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers."""
        return tuple(f"model.layers.{i}.attn" for i in range(self.layers))

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
        self.model = model
        self.num_blocks = num_blocks
        self.heads = held_heads(tp_rank, tp_size, model.heads)
        self._names = tuple(model.names if layers is None else layers)
        self._layout = layout
        strides, size = self._strides(padding)
        # whole memory, guards included: one equality shows that nothing else was touched
        rng = np.random.default_rng(seed)
        self.memory = rng.integers(0, 256, size + 2 * GUARD_BYTES, dtype=np.uint8)
        self._cells = {
            (name, p): self._array(i * strides["L"] + offset, axes)
            for i, name in enumerate(self._names)
            for p, (offset, axes) in enumerate(self._parts(strides))
        }
        base = int(self.memory.ctypes.data) + GUARD_BYTES
        self.shard = Shard(
            tuple(self._view(name) for name in self._names), (Region(base, size),), self.memory
        )

    @property
    def parts(self) -> int:
        """Parts of each layer."""
        return 2 if self._layout == "vec" else 1

    def cells(self, layer: str, part: int = 0) -> np.ndarray:
        """Live bytes ``[block, held head, token, content, itemsize]`` of a part of a layer."""
        return self._cells[layer, part]

    def holds(self, layer: str, head: int) -> bool:
        """Whether this rank has the model's KV head ``head`` of ``layer``."""
        first = self.heads.first
        return layer in self._names and first <= head < first + self.heads.count

    def read(self, layer: str, part: int, block: int, head: int, token: int) -> bytes:
        """One cell: ``head`` counts over the whole model."""
        cell = self._cells[layer, part][block, head - self.heads.first, token]
        return bytes(cell.tobytes())

    def write(self, layer: str, part: int, block: int, head: int, token: int, value: bytes) -> None:
        """Set one cell, as `read` tells it."""
        cell = self._cells[layer, part][block, head - self.heads.first, token]
        cell[...] = np.frombuffer(value, dtype=np.uint8).reshape(cell.shape)

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """Write what ``seed`` stands for into whole blocks; the same on all ranks of an engine."""
        for (layer, part), cells in self._cells.items():
            for place, block in enumerate(blocks):
                cells[block] = self._held(layer, part, place, seed)

    def holds_fill(self, blocks: Sequence[tuple[int, int]], seed: int) -> bool:
        """Whether blocks hold what `fill` wrote; pairs of (place in `fill`'s blocks, block)."""
        return all(
            np.array_equal(cells[block], self._held(layer, part, place, seed))
            for (layer, part), cells in self._cells.items()
            for place, block in blocks
        )

    def _held(self, layer: str, part: int, place: int, seed: int) -> np.ndarray:
        model = self.model
        shape = (model.heads, model.block_tokens, model.content, model.itemsize)
        rng = np.random.default_rng([seed, model.names.index(layer), part, place])
        whole = rng.integers(0, 256, shape, dtype=np.uint8)
        return whole[self.heads.first : self.heads.first + self.heads.count]

    def _strides(self, padding: int) -> tuple[dict[str, int], int]:
        """Bytes of a step along L, B, H, N and C, and of the whole."""
        model, layout = self.model, self._layout
        counts = {
            "L": len(self._names),
            "B": self.num_blocks,
            "H": self.heads.count,
            "N": model.block_tokens * self.parts,
            "C": model.content,
        }
        strides, step = {}, model.itemsize
        for axis in reversed("LBHNC" if layout == "vec" else layout):
            if axis == "B":  # padded blocks, as where groups of unequal layers share pages
                step += padding * model.itemsize
            strides[axis] = step
            step *= counts[axis]
        return strides, step

    def _parts(self, strides: dict[str, int]) -> list[tuple[int, tuple[int, int, int, int]]]:
        """(offset, strides over block, head, token, content) of each part."""
        block, head = strides["B"], strides["H"]
        if self._layout != "vec":
            return [(0, (block, head, strides["N"], strides["C"]))]
        model = self.model
        size = model.itemsize
        k = (block, head, size, model.block_tokens * size)
        v = (block, head, model.content * size, size)
        return [(0, k), (model.block_tokens * model.content * size, v)]

    def _array(self, offset: int, axes: tuple[int, int, int, int]) -> np.ndarray:
        model = self.model
        return np.lib.stride_tricks.as_strided(
            self.memory[GUARD_BYTES + offset :],
            shape=(self.num_blocks, *self._shape(), model.itemsize),
            strides=(*axes, 1),
        )

    def _shape(self) -> tuple[int, int, int]:
        return self.heads.count, self.model.block_tokens, self.model.content

    def _view(self, name: str) -> BlockView:
        cells = [self._cells[name, p] for p in range(self.parts)]
        return BlockView(
            layer=name,
            group=self.model.names.index(name) % self.model.groups,
            num_blocks=self.num_blocks,
            block_tokens=self.model.block_tokens,
            heads=self.heads,
            dtype=self.model.dtype,
            layout="cpu:vec" if self._layout == "vec" else "dense",
            parts=tuple(
                Part(c.ctypes.data, _four(c.strides), self._shape(), self.model.itemsize)
                for c in cells
            ),
        )


def _four(strides: Sequence[int]) -> tuple[int, int, int, int]:
    block, head, token, content, _ = strides
    return block, head, token, content


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
