"""The staged path: rectangles → pieces of a canonical wire order → chunks.

What crosses is neutral to both sides' layout: a chunk holds some pieces (one part of some heads
of a layer each) in sequence, each dense ``[head][token][content]``, of the tokens of some runs.
Both sides map the same runs onto their own blocks (`segments`), so block sizes, layouts, tiles
and dtypes of the two never meet.

* A piece crosses in the smaller of the two dtypes; whichever side has the other converts.
* Knows no peers, slots or transports. `kvconnect.ops` moves the bytes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvconnect.blocks import DENSE, BlockView, Part
from kvconnect.errors import GeometryError
from kvconnect.ops import Copy, Type, chunk_bytes
from kvconnect.plan import FLOATS, NO_BLOCK, Rect, part_pairs
from kvconnect.wire import MAX_RUNS, Piece

TYPES = {
    "bfloat16": Type.BF16,
    "float16": Type.FP16,
    "float32": Type.FP32,
    "fp8_e4m3": Type.E4M3,
    "fp8_e5m2": Type.E5M2,
}

Runs = Sequence[tuple[int, int]]
"""(first token, count), of the prompt."""


class Bundle(NamedTuple):
    """Pieces ``[first, first + num_pieces)`` that cross together, ``tokens`` at most at a time."""

    first: int
    num_pieces: int
    src_group: int
    dst_group: int
    tokens: int


class Chunk(NamedTuple):
    """What one slot takes: a bundle, the runs, and where they go; see `segments`."""

    bundle: Bundle
    runs: tuple[tuple[int, int], ...]
    segments: np.ndarray
    nbytes: int


class Course:
    """How the rectangles from one source shard to our shard cross, in slots of ``slot_bytes``."""

    def __init__(self, rects: Sequence[Rect], slot_bytes: int) -> None:
        self.pieces: list[Piece] = []
        self.copies: list[Copy] = []  # of our side
        groups: list[tuple[int, int, int]] = []  # source's group, ours, our block's tokens
        for rect in sorted(rects, key=lambda r: (r.src.group, r.dst.group)):
            for src, dst in part_pairs(rect):
                piece, factor = _piece(rect, src, dst)
                self.pieces.append(piece)
                self.copies.append(copy_of(rect.dst, dst, piece, factor))
                groups.append((rect.src.group, rect.dst.group, rect.dst.block_tokens))
        if any(rect.src.layout != DENSE for rect in rects):
            raise GeometryError(
                "a packed layout moves whole blocks only, which the staged path cannot; "
                'set "transfer_mode": "direct" or "auto" on both engines'
            )
        self.bundles = list(_bundles(self.copies, groups, slot_bytes))

    def chunks(self, blocks: Sequence[Sequence[tuple[int, int]]], tokens: int) -> Iterator[Chunk]:
        """Chunks that fill ``blocks`` (`order.Fetch`) with the first ``tokens`` tokens."""
        for bundle in self.bundles:
            block_tokens = self.copies[bundle.first].block_tokens
            table = np.full(max((p for p, _ in blocks[bundle.dst_group]), default=-1) + 1, NO_BLOCK)
            for place, block in blocks[bundle.dst_group]:
                table[place] = block
            wanted = (
                (place * block_tokens, min(block_tokens, tokens - place * block_tokens))
                for place, _ in blocks[bundle.dst_group]
            )
            copies = self.copies[bundle.first : bundle.first + bundle.num_pieces]
            for runs in _packed(wanted, bundle.tokens):
                total = sum(count for _, count in runs)
                yield Chunk(
                    bundle,
                    runs,
                    segments(runs, table, block_tokens),
                    chunk_bytes(copies, total),
                )


def segments(runs: Runs, table: Sequence[int] | np.ndarray, block_tokens: int) -> np.ndarray:
    """Where the tokens of ``runs`` are: int32 ``[n, 4]`` of (block, first token in it, count, run).

    ``table[i]`` is the block of tokens ``[i, i + 1) * block_tokens`` or NO_BLOCK. Raises
    GeometryError for a token that the table does not hold.
    """
    start, count = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    end = start + count
    first = start // block_tokens
    pieces = (end - 1) // block_tokens - first + 1
    run = np.repeat(np.arange(len(start)), pieces)
    before = np.cumsum(pieces) - pieces
    place = first[run] + np.arange(len(run)) - before[run]
    blocks = np.asarray(table, dtype=np.int64)
    if len(place) and (place.max() >= len(blocks) or (blocks[place] == NO_BLOCK).any()):
        raise GeometryError(
            f"tokens up to {end.max()} are needed, in blocks of {block_tokens}, but of the table's "
            f"{len(blocks)} blocks {np.count_nonzero(blocks != NO_BLOCK)} are held"
        )
    low = np.maximum(start[run], place * block_tokens)
    high = np.minimum(end[run], (place + 1) * block_tokens)
    found = np.column_stack([blocks[place], low - place * block_tokens, high - low, run])
    return found.astype(np.int32)


def copy_of(view: BlockView, part: Part, piece: Piece, factor: float) -> Copy:
    """One side's half of a piece: the part's cells of its heads."""
    token, content = part.tiles
    raw = Type.raw(part.itemsize) if view.dtype not in FLOATS else None
    return Copy(
        base=part.base + (piece.first - view.heads.first) * part.strides[1],
        block_stride=part.strides[0],
        head_stride=part.strides[1],
        token_stride=part.strides[2],
        content_stride=part.strides[3],
        heads=piece.count,
        content=part.shape[2],
        block_tokens=part.shape[1],
        num_blocks=view.num_blocks,
        kv_type=raw or TYPES[view.dtype],
        wire_type=raw or TYPES[piece.dtype],
        factor=1.0 if raw else factor,
        token_tile=token.cells,
        token_outer=token.stride,
        content_tile=content.cells,
        content_outer=content.stride,
    )


def source_copy(views: dict[str, BlockView], piece: Piece) -> tuple[Copy, int]:
    """The source's half of a piece that a reader asked for, and its group.

    Raises GeometryError if our caches do not hold it, or not so.
    """
    view = views.get(piece.layer)
    part = next((p for p in view.parts if p.name == piece.part), None) if view else None
    if view is None or part is None or view.layout != DENSE:
        raise GeometryError(f"layer {piece.layer} part {piece.part} is not held here")
    held = view.heads
    if piece.first < held.first or piece.first + piece.count > held.first + held.count:
        raise GeometryError(
            f"layer {piece.layer}: heads [{piece.first}, {piece.first + piece.count}) are wanted, "
            f"[{held.first}, {held.first + held.count}) are held here"
        )
    if piece.content != part.shape[2]:
        raise GeometryError(
            f"layer {piece.layer}: {piece.content} elements a token are wanted of "
            f"{piece.part}, {part.shape[2]} are held here"
        )
    if piece.dtype != view.dtype and not {piece.dtype, view.dtype} <= FLOATS.keys():
        raise GeometryError(
            f"layer {piece.layer}: {view.dtype} cannot be converted to {piece.dtype}"
        )
    return copy_of(view, part, piece, piece.factor), view.group


def _piece(rect: Rect, src: Part, dst: Part) -> tuple[Piece, float]:
    """How a part crosses, and the factor of our side."""
    scale = src.scale / dst.scale
    at_source = dst.itemsize <= src.itemsize  # the source converts, to our dtype
    piece = Piece(
        layer=rect.dst.layer,
        part=dst.name,
        first=rect.first,
        count=rect.num_heads,
        content=dst.shape[2],
        dtype=rect.dst.dtype if at_source else rect.src.dtype,
        factor=scale if at_source else 1.0,
    )
    return piece, 1.0 if at_source else scale


def _bundles(
    copies: Sequence[Copy], groups: Sequence[tuple[int, int, int]], slot_bytes: int
) -> Iterator[Bundle]:
    """Neighbouring pieces of one pair of groups, as many as fit with a whole block of ours."""
    first = 0
    while first < len(copies):
        count = 1
        block_tokens = groups[first][2]
        while (
            first + count < len(copies)
            and groups[first + count] == groups[first]
            and chunk_bytes(copies[first : first + count + 1], block_tokens) <= slot_bytes
        ):
            count += 1
        chosen = copies[first : first + count]
        tokens = _most_tokens(chosen, slot_bytes)
        if tokens < 1:
            raise GeometryError(
                f"one token of a layer is {chunk_bytes(chosen, 1)} bytes, a staging slot "
                f"{slot_bytes}; raise staging_bytes"
            )
        yield Bundle(first, count, groups[first][0], groups[first][1], tokens)
        first += count


def _most_tokens(copies: Sequence[Copy], slot_bytes: int) -> int:
    """The largest number of tokens whose chunk fits."""
    low, high = 0, slot_bytes
    while low < high:
        middle = (low + high + 1) // 2
        if chunk_bytes(copies, middle) <= slot_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _packed(runs: Iterator[tuple[int, int]], most: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """``runs`` in lists of at most ``most`` tokens, cut where they must be; empty ones left out."""
    packed: list[tuple[int, int]] = []
    free = most
    for start, count in runs:
        while count > 0:
            taken = min(count, free)
            packed.append((start, taken))
            start, count, free = start + taken, count - taken, free - taken
            if not free or len(packed) == MAX_RUNS:
                yield tuple(packed)
                packed, free = [], most
    if packed:
        yield tuple(packed)
