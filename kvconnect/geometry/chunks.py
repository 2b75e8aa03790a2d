"""The staged path: rectangles → head slices of a canonical wire order → chunks.

What crosses is neutral to both sides' layout: a chunk holds some head slices (one part of some
heads of a layer each) in sequence, each dense ``[head][token][content]``, of the tokens of some
runs. Both sides map the same runs onto their own blocks (`segments`), so block sizes, layouts,
tiles and dtypes of the two never meet.

* A head slice crosses in the smaller of the two dtypes; whichever side has the other converts.
* A packed layout, recurrent state among them, moves whole blocks between equals: its runs count
  the rows that its parts have, not tokens.
* Knows no peers, slots or transports. `kvconnect.ops` moves the bytes.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import inf
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import DENSE, BlockView, Extent, Name, Part, Size
from kvconnect.geometry.intersect import NO_BLOCK, Rect, joined, part_pairs
from kvconnect.geometry.stretch import ALL, Stretch
from kvconnect.ops import NUMBERS, Copy, Type, chunk_bytes

MAX_RUNS = 1 << 14


class HeadSlice(msgspec.Struct, frozen=True, array_like=True):
    """One part of some heads of a layer, as it crosses: dense ``[head][token][content]``."""

    layer: Name
    part: Literal["k", "v", "kv"]
    first: Size
    """Heads ``[first, first + count)``, counted over the whole model."""
    count: Extent
    content: Extent
    """Elements of a token."""
    dtype: Name
    """The dtype in which elements cross."""
    factor: Annotated[float, msgspec.Meta(gt=0, le=1e30)] = 1.0
    """What the source's elements are multiplied by."""


Runs = tuple[tuple[int, int], ...]
"""(first token, count), of the prompt."""


class SliceGroup(NamedTuple):
    """Head slices from ``first`` on that cross together, ``tokens`` at most at a time."""

    first: int
    num_slices: int
    kind: "Kind"
    tokens: int


class Kind(NamedTuple):
    """What head slices must share to cross together."""

    src_group: int
    dst_group: int
    block_tokens: int
    """Tokens of a block on our side."""
    whole: bool
    """Whether blocks move whole, and "tokens" are rows of a packed part."""
    src_block_tokens: int
    """Tokens of a block on the source's side; rows likewise."""


class SourceSlice(NamedTuple):
    """A head slice as the source has it; see `Kind`."""

    copy: Copy
    group: int
    whole: bool


class Chunk(NamedTuple):
    """What one slot takes: a group of slices, the runs, and where they go; see `segments`."""

    slices: SliceGroup
    runs: Runs
    segments: np.ndarray
    nbytes: int


class ChunkPlan:
    """How the rectangles from one source shard to our shard cross, in slots of ``slot_bytes``."""

    def __init__(self, rects: Sequence[Rect], slot_bytes: int, *, join: bool = True) -> None:
        """``join``: K and V cross as one head slice where both sides have them side by side."""
        self.slices: list[HeadSlice] = []
        self.copies: list[Copy] = []  # of our side
        kinds: list[Kind] = []
        for rect in sorted(rects, key=lambda r: (r.src.group, r.dst.group)):
            for src, dst in _pairs(rect, slot_bytes if join else 0):
                head_slice, factor = _head_slice(rect, src, dst)
                self.slices.append(head_slice)
                copy = copy_of(rect.dst, dst, head_slice, factor)
                self.copies.append(copy)
                whole = rect.dst.layout != DENSE
                size = copy.block_tokens
                src_size = size if whole else rect.src.block_tokens
                kinds.append(Kind(rect.src.group, rect.dst.group, size, whole, src_size))
        self.slice_groups = list(_slice_groups(self.copies, kinds, slot_bytes))

    def chunks(
        self,
        blocks: Sequence[Sequence[tuple[int, int]]],
        tokens: int,
        needed_from: Sequence[int] = (),
        stretch: Stretch = ALL,
    ) -> Iterator[Chunk]:
        """Chunks that fill ``blocks`` (`order.Fetch`) with the first ``tokens`` tokens.

        Of group ``g`` nothing before token ``needed_from[g]`` is asked for, where that is given.
        ``stretch``: only what the source has in these blocks; all of them, one after the other,
        fill the same cells as one that holds everything.
        """
        packed: dict[tuple[Kind, int], list[tuple[Runs, np.ndarray]]] = {}
        for slices in self.slice_groups:
            copies = self.copies[slices.first : slices.first + slices.num_slices]
            sizes: dict[int, int] = {}  # tokens → bytes: nearly all chunks have as many
            known = packed.get((slices.kind, slices.tokens))
            kept = packed.setdefault((slices.kind, slices.tokens), [])
            group = slices.kind.dst_group
            start = needed_from[group] if group < len(needed_from) else 0
            runs_of = self._runs(slices, blocks[group], start, tokens, stretch)
            for runs, found in known or runs_of:
                if known is None:
                    kept.append((runs, found))
                total = sum(count for _, count in runs)
                if total not in sizes:
                    sizes[total] = chunk_bytes(copies, total)
                yield Chunk(slices, runs, found, sizes[total])

    def _runs(
        self,
        slices: SliceGroup,
        blocks: Sequence[tuple[int, int]],
        start: int,
        tokens: int,
        stretch: Stretch,
    ) -> Iterator[tuple[Runs, np.ndarray]]:
        """What to ask for, chunk by chunk, and where in our blocks it goes.

        Our blocks of 4 tokens, at most 6 tokens a chunk, and tokens [2, 9) of the prompt wanted in
        blocks 7, 5 and 9 (places 0, 1 and 2):
        runs (2,2) (2,2) (4,2) and then (6,3) (8,3); segments of the first chunk are (block 7, from
        cell 2, 2 cells), (7, 0, 2), (5, 0, 2); of the second (5, 2, 2), (9, 0, 1) and (9, 1, 3).
        Cells 0 and 1 of block 7, and 1 to 3 of block 9, belong to no token that is wanted: they
        are filled with those of their block that are, over and over (see `_filled`).
        """
        group, _, block_tokens, whole, src_size = slices.kind
        first, end = stretch.of(group)
        since, until = first * src_size, end * src_size
        if stretch is not ALL:  # places ascend then
            first, end = since // block_tokens, until / block_tokens
            blocks = blocks[bisect_left(blocks, (first,)) : bisect_left(blocks, (end,))]
        table = np.full(max((p for p, _ in blocks), default=-1) + 1, NO_BLOCK)
        for place, block in blocks:
            table[place] = block
        if whole:
            start, tokens = 0, len(table) * block_tokens
        wanted = (
            span
            for place, _ in blocks
            for span in _filled(place * block_tokens, block_tokens, start, tokens, since, until)
        )
        for spans in _packed(wanted, slices.tokens):
            runs = tuple((first, count) for first, _, count in spans)
            cells = tuple((at, count) for _, at, count in spans)
            yield runs, segments(cells, table, block_tokens)


class Span(NamedTuple):
    """Tokens ``[first, first + tokens)`` of the prompt go to the cells of tokens from ``at`` on."""

    first: int
    at: int
    tokens: int


def _filled(
    begin: int, size: int, start: int, tokens: int, since: int = 0, until: float = inf
) -> Iterator[Span]:
    """What fills the block of tokens ``[begin, begin + size)``, of which only those from ``start``
    and below ``tokens`` are wanted: so far as the source has it in ``[since, until)``.

    vLLM zeroes no block that is loaded, so a cell that was left as it was may hold NaN, which a
    kernel that masks it still multiplies by nought. Each cell without a token gets a wanted
    token's content: finite, and of this very prompt. That is done with the last wanted token.
    """
    low, high = max(begin, start), min(begin + size, tokens)
    if low >= high:
        return
    first, end = max(low, since), int(min(high, until))
    if first < end:
        yield Span(first, first, end - first)
    if not since < high <= until:
        return
    for first, end in ((begin, low), (high, begin + size)):
        for at in range(first, end, high - low):
            yield Span(low, at, min(high - low, end - at))


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


def copy_of(view: BlockView, part: Part, head_slice: HeadSlice, factor: float) -> Copy:
    """One side's half of a head slice: the part's cells of its heads."""
    token, content = part.tiles
    numbers = view.layout == DENSE and view.dtype in NUMBERS
    raw = None if numbers else Type.raw(part.itemsize)
    return Copy(
        base=part.base + (head_slice.first - view.heads.first) * part.strides[1],
        block_stride=part.strides[0],
        head_stride=part.strides[1],
        token_stride=part.strides[2],
        content_stride=part.strides[3],
        heads=head_slice.count,
        content=part.shape[2],
        block_tokens=part.shape[1],
        num_blocks=view.num_blocks,
        kv_type=raw or NUMBERS[view.dtype],
        wire_type=raw or NUMBERS[head_slice.dtype],
        factor=1.0 if raw else factor,
        token_tile=token.cells,
        token_outer=token.stride,
        content_tile=content.cells,
        content_outer=content.stride,
    )


def source_copy(views: dict[str, BlockView], asked: HeadSlice) -> SourceSlice:
    """The source's half of a head slice that a reader asked for.

    Raises GeometryError if our caches do not hold it, or not so.
    """
    view = views.get(asked.layer)
    part = _part(view, asked.part) if view else None
    if view is None or part is None:
        raise GeometryError(f"layer {asked.layer} part {asked.part} is not held here")
    held = view.heads
    if asked.first < held.first or asked.first + asked.count > held.first + held.count:
        raise GeometryError(
            f"layer {asked.layer}: heads [{asked.first}, {asked.first + asked.count}) are wanted, "
            f"[{held.first}, {held.first + held.count}) are held here"
        )
    if asked.content != part.shape[2]:
        raise GeometryError(
            f"layer {asked.layer}: {asked.content} elements a token are wanted of "
            f"{asked.part}, {part.shape[2]} are held here"
        )
    whole = view.layout != DENSE
    convertible = not whole and {asked.dtype, view.dtype} <= NUMBERS.keys()
    if asked.dtype != view.dtype and not convertible:
        raise GeometryError(
            f"layer {asked.layer}: {view.dtype} cannot be converted to {asked.dtype}"
        )
    return SourceSlice(copy_of(view, part, asked, asked.factor), view.group, whole)


def _pairs(rect: Rect, most_bytes: int) -> list[tuple[Part, Part]]:
    """Parts that cross as a head slice each: one if a token has at most ``most_bytes``."""
    src, dst = joined(rect.src), joined(rect.dst)
    if src is None or dst is None:
        return part_pairs(rect)
    token_bytes = rect.num_heads * dst.shape[2] * min(src.itemsize, dst.itemsize)
    return [(src, dst)] if token_bytes <= most_bytes else part_pairs(rect)


def _part(view: BlockView, name: str) -> Part | None:
    return next((part for part in view.parts if part.name == name), None) or (
        joined(view) if name == "kv" else None
    )


def _head_slice(rect: Rect, src: Part, dst: Part) -> tuple[HeadSlice, float]:
    """How a part crosses, and the factor of our side."""
    scale = src.scale / dst.scale
    at_source = dst.itemsize <= src.itemsize  # the source converts, to our dtype
    head_slice = HeadSlice(
        layer=rect.dst.layer,
        part=dst.name,
        first=rect.first,
        count=rect.num_heads,
        content=dst.shape[2],
        dtype=rect.dst.dtype if at_source else rect.src.dtype,
        factor=scale if at_source else 1.0,
    )
    return head_slice, 1.0 if at_source else scale


def _slice_groups(
    copies: Sequence[Copy], kinds: Sequence[Kind], slot_bytes: int
) -> Iterator[SliceGroup]:
    """Neighbouring head slices of one kind, as many as fit with a whole block of ours."""
    first = 0
    while first < len(copies):
        count = 1
        kind = kinds[first]
        while (
            first + count < len(copies)
            and kinds[first + count] == kind
            and chunk_bytes(copies[first : first + count + 1], kind.block_tokens) <= slot_bytes
        ):
            count += 1
        chosen = copies[first : first + count]
        tokens = _most_tokens(chosen, slot_bytes)
        if tokens < 1:
            raise GeometryError(
                f"one token of a layer is {chunk_bytes(chosen, 1)} bytes, a staging slot "
                f"{slot_bytes}; raise staging_bytes"
            )
        yield SliceGroup(first, count, kind, tokens)
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


def _packed(spans: Iterator[Span], most: int) -> Iterator[list[Span]]:
    """``spans`` in lists of at most ``most`` tokens, cut where they must be, neighbours joined."""
    packed: list[Span] = []
    free = most
    for first, at, count in spans:
        while count > 0:
            taken = min(count, free)
            last = packed[-1] if packed else Span(-1, -1, 0)
            if (last.first + last.tokens, last.at + last.tokens) == (first, at):
                packed[-1] = Span(last.first, last.at, last.tokens + taken)
            else:
                packed.append(Span(first, at, taken))
            first, at, count, free = first + taken, at + taken, count - taken, free - taken
            if not free or len(packed) == MAX_RUNS:
                yield packed
                packed, free = [], most
    if packed:
        yield packed
