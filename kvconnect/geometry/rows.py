"""The direct path: rectangles → rows, runs of bytes that are contiguous on both sides.

Rows are at the same place in every block and never change for a peer, so a transport can prepare
them once (`Route`); a request only selects some by index. Knows addresses, no requests.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import Heads, Part
from kvconnect.geometry.intersect import NO_BLOCK, Rect, part_pairs, tiles_of
from kvconnect.geometry.stretch import ALL, Stretch

MAX_ROWS_PER_LAYER = 1 << 16
MAX_ROWS = (1 << 31) - 1  # in all blocks: their indices are int32


class Memory(NamedTuple):
    """Kind (NIXL's name) and device of the memory that one side's rows lie in."""

    kind: str
    device: int


# One row per (source address in block 0, its block stride, the same of the destination, bytes).
Rows = np.ndarray


def rows_of(rect: Rect) -> Rows:
    """Rows of one rectangle, int64 ``[n, 5]``, adjacent ones merged; see `Rows`."""
    found = []
    for src, dst in part_pairs(rect):
        found.append(_part_rows(src, dst, rect.src.heads, rect.dst.heads, rect))
    rows = np.concatenate(found)
    if len(rows) > MAX_ROWS_PER_LAYER:
        raise GeometryError(
            f"layer {rect.dst.layer}: {len(rows)} rows a block, expected at most "
            f"{MAX_ROWS_PER_LAYER}; use the same layout on both engines, or the staged path"
        )
    return _merge(rows[np.argsort(rows[:, 2], kind="stable")])


def _part_rows(src: Part, dst: Part, src_heads: Heads, dst_heads: Heads, rect: Rect) -> Rows:
    """One part's rows, of all heads and tokens of a block: as long as both sides are contiguous.

    Axes are taken from our innermost outwards. 2 heads of 4 tokens of 8 elements of 2 bytes, ours
    ``[head][token][content]`` (strides 64, 16, 2), the peer's ``[token][head][content]``
    (16, 32, 2): content: 2 = 2 = run, so the run grows to 16 bytes; token: 32 and 16 differ,
    head: 16 and 64, so there are eight rows of 16 bytes. Between equal layouts all three axes
    join, to one row of 128 bytes.
    """
    if src.itemsize != dst.itemsize:  # a row would reach beyond our own cell
        raise GeometryError(
            f"layer {rect.dst.layer}: elements of {src.itemsize} bytes for cells of {dst.itemsize}"
        )
    run, outer = dst.itemsize, []
    token, content = (a.cells or b.cells for a, b in tiles_of(src, dst))
    cut = token, content
    (_, src_head), *src_axes = src.axes(cut)
    (_, dst_head), *dst_axes = dst.axes(cut)
    axes = [(rect.num_heads, src_head, dst_head)]
    axes += [(n, a, b) for (n, a), (_, b) in zip(src_axes, dst_axes, strict=True)]
    for count, src_stride, dst_stride in sorted(axes, key=lambda axis: axis[2]):
        if count == 1:
            continue
        if src_stride == dst_stride == run:
            run *= count
        else:
            outer.append((count, src_stride, dst_stride))
    src_at = np.array([src.base + (rect.first - src_heads.first) * src.strides[1]], dtype=np.int64)
    dst_at = np.array([dst.base + (rect.first - dst_heads.first) * dst.strides[1]], dtype=np.int64)
    for count, src_stride, dst_stride in reversed(outer):
        steps = np.arange(count, dtype=np.int64)
        src_at = (src_at[:, None] + steps * src_stride).reshape(-1)
        dst_at = (dst_at[:, None] + steps * dst_stride).reshape(-1)
    rows = np.empty((len(dst_at), 5), dtype=np.int64)
    rows[:, 0], rows[:, 1] = src_at, src.strides[0]
    rows[:, 2], rows[:, 3], rows[:, 4] = dst_at, dst.strides[0], run
    return rows


def _merge(rows: Rows) -> Rows:
    """Join rows that touch on both sides; ``rows`` are sorted by destination address."""
    ends = rows[:-1, [0, 2]] + rows[:-1, 4:]
    joins = (ends == rows[1:, [0, 2]]).all(axis=1) & (rows[:-1, [1, 3]] == rows[1:, [1, 3]]).all(1)
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    merged = rows[heads]
    merged[:, 4] = np.add.reduceat(rows[:, 4], heads)
    return merged


@dataclass(frozen=True, eq=False)
class RowTable:
    """All rows of one side of a route, in every block; compared and cached by identity.

    ``rows`` is int64 ``[n, 4]``: address in block 0, bytes, block stride, number of blocks.
    Row ``r`` of block ``b`` has index ``starts[r] + b``.
    """

    rows: np.ndarray
    starts: np.ndarray
    kind: str
    device: int

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and lengths, int64 ``[n]`` each, of the rows with these indices."""
        row = np.searchsorted(self.starts, indices, side="right") - 1
        address, nbytes, stride, _ = self.rows[row].T
        return address + (indices - self.starts[row]) * stride, nbytes


@dataclass(frozen=True)
class Selection:
    """The rows of one transfer, as indices into the two tables of a route: int32 ``[n]``."""

    src: np.ndarray
    dst: np.ndarray
    nbytes: int


DstBlocks = Sequence[Sequence[tuple[int, int]]]
"""Blocks to fill, per group: see `kvconnect.orders.Blocks`."""


class Route:
    """Rows from one source shard to the destination shard, made once per peer."""

    def __init__(self, rects: Sequence[Rect], src_memory: Memory, dst_memory: Memory) -> None:
        rows = [rows_of(rect) for rect in rects]
        blocks = [(rect.src.num_blocks, rect.dst.num_blocks) for rect in rects]
        sizes = [len(r) for r in rows]
        joined = np.concatenate(rows) if rows else np.empty((0, 5), dtype=np.int64)
        num_blocks = np.repeat(np.array(blocks, dtype=np.int64).reshape(-1, 2), sizes, axis=0)
        self.src = _table(joined[:, [0, 4, 1]], num_blocks[:, 0], src_memory)
        self.dst = _table(joined[:, [2, 4, 3]], num_blocks[:, 1], dst_memory)
        # (source group, destination group) → which rows are addressed by these block tables
        groups = np.repeat([(r.src.group, r.dst.group) for r in rects] or [(0, 0)][:0], sizes, 0)
        groups = groups.reshape(-1, 2)
        self.rows_by_group = {
            (int(s), int(d)): np.flatnonzero((groups == (s, d)).all(axis=1))
            for s, d in np.unique(groups, axis=0)
        }

    def nbytes(self, dst_blocks: DstBlocks, stretch: Stretch = ALL) -> int:
        """Bytes that fill ``dst_blocks``, as in `select`."""
        return sum(
            int(self.dst.rows[rows, 1].sum()) * len(_within(dst_blocks[group], src, stretch))
            for (src, group), rows in self.rows_by_group.items()
        )

    def descriptors(
        self,
        src_tables: Sequence[Sequence[int]],
        dst_blocks: DstBlocks,
        stretch: Stretch = ALL,
    ) -> int:
        """Runs of bytes that a selection has once neighbours are joined, as in `select`.

        Costs no more than the block tables are long.
        """
        total = 0
        for (src_group, dst_group), rows in self.rows_by_group.items():
            pairs = _within(dst_blocks[dst_group], src_group, stretch)
            table = np.array(src_tables[src_group], dtype=np.int64)
            if not len(pairs) or pairs[:, 0].max() >= len(table):
                continue
            follows = (np.diff(table[pairs[:, 0]]) == 1) & (np.diff(pairs[:, 1]) == 1)
            src, dst = self.src.rows[rows], self.dst.rows[rows]
            joins = (src[:, 1] == src[:, 2]) & (dst[:, 1] == dst[:, 2])
            total += len(rows) * len(pairs) - int(joins.sum()) * int(follows.sum())
        return total

    def select(
        self,
        src_tables: Sequence[Sequence[int]],
        dst_blocks: DstBlocks,
        stretch: Stretch = ALL,
    ) -> Selection:
        """Rows that fill ``dst_blocks`` from the blocks at the same place of ``src_tables``.

        ``src_tables[g][i]`` is the source's block of tokens ``[i, i + 1) * block_tokens`` in
        group ``g`` or NO_BLOCK; ``dst_blocks[g]`` are pairs ``(i, block id)``. Only places in
        ``stretch`` are taken. Raises GeometryError for a place the source does not hold.
        """
        src, dst, nbytes = [], [], 0
        for (src_group, dst_group), rows in self.rows_by_group.items():
            pairs = _within(dst_blocks[dst_group], src_group, stretch)
            table = np.array(src_tables[src_group], dtype=np.int64)
            if not len(pairs):
                continue
            if pairs[:, 0].max() >= len(table) or (table[pairs[:, 0]] == NO_BLOCK).any():
                raise GeometryError(
                    f"group {src_group}: the peer holds {np.count_nonzero(table != NO_BLOCK)} of "
                    f"{len(table)} blocks, but blocks up to {pairs[:, 0].max()} are needed"
                )
            src_ids, dst_ids = table[pairs[:, 0]], pairs[:, 1]
            _check_range(src_ids, self.src.rows[rows, 3].min(), "the peer's")
            _check_range(dst_ids, self.dst.rows[rows, 3].min(), "our")
            # row by row, so that neighbouring blocks of one row can be merged by the transport
            src.append((self.src.starts[rows][:, None] + src_ids).reshape(-1))
            dst.append((self.dst.starts[rows][:, None] + dst_ids).reshape(-1))
            nbytes += int(self.dst.rows[rows, 1].sum()) * len(pairs)
        return Selection(_indices(src), _indices(dst), nbytes)


def _within(blocks: Sequence[tuple[int, int]], group: int, stretch: Stretch) -> np.ndarray:
    """Those pairs whose place is in the stretch of a source's group: int64 ``[n, 2]``."""
    if stretch is not ALL:  # places ascend then
        since, until = stretch.of(group)
        blocks = blocks[bisect_left(blocks, (since,)) : bisect_left(blocks, (until,))]
    return np.array(blocks, dtype=np.int64).reshape(-1, 2)


def _table(rows: np.ndarray, num_blocks: np.ndarray, memory: Memory) -> RowTable:
    if (count := int(num_blocks.sum())) > MAX_ROWS:
        raise GeometryError(
            f"{count} rows in all blocks of a rank, expected at most {MAX_ROWS}; use fewer blocks "
            "per rank, or the staged path"
        )
    starts = np.concatenate(([0], np.cumsum(num_blocks)[:-1])) if len(num_blocks) else num_blocks
    return RowTable(np.column_stack([rows, num_blocks]), starts, memory.kind, memory.device)


def _check_range(ids: np.ndarray, num_blocks: int, whose: str) -> None:
    if ids.min() < 0 or ids.max() >= num_blocks:
        raise GeometryError(
            f"block ids {ids.min()}..{ids.max()} exceed {whose} {num_blocks} blocks"
        )


def _indices(found: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    return joined.astype(np.int32)
