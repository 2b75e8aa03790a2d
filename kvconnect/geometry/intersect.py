"""What goes where: geometry → rectangles.

Every transfer is a set of rectangles in (layer, head, token) space: what a source shard has
intersected with what the destination shard needs. Tensor and pipeline parallelism only make
other rectangles. A rectangle then becomes rows (`kvconnect.geometry.rows`, the direct path) or
pieces of a canonical wire order (`kvconnect.geometry.chunks`, the staged path).

* Knows no addresses, requests or transports.
* `assign` refuses what no path can map, and names both values. What only the staged path can
  map (another block size, dtype or cut of the cells) `why_not_direct` says.
"""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import DENSE, BlockView, Part, Tile
from kvconnect.ops import NUMBERS

NO_BLOCK = -1  # entry of a block table whose tokens are not kept (outside a sliding window)


class Rect(NamedTuple):
    """Heads ``[first, first + num_heads)`` of one layer, all tokens of whichever blocks."""

    src: BlockView
    dst: BlockView
    first: int
    num_heads: int


def assign(
    mine: Sequence[BlockView],
    theirs: Sequence[Sequence[BlockView]],
    start: int,
    allow_lossy: bool = False,
) -> list[list[Rect]]:
    """Which rectangles to take from which shard so that every head of ``mine`` is covered once.

    ``theirs`` is one list of views per source shard; the result has one list of rectangles per
    shard. Replicated heads are taken from the first holder counting from shard ``start``, so
    that several readers spread over the replicas. Raises GeometryError if a head of a layer is
    held by no shard, or if the two sides cannot be mapped on each other.
    """
    rects: list[list[Rect]] = [[] for _ in theirs]
    by_layer: dict[str, list[tuple[int, BlockView]]] = {}
    for step in range(len(theirs)):
        index = (start + step) % len(theirs)
        for view in theirs[index]:
            by_layer.setdefault(view.layer, []).append((index, view))
    for dst in mine:
        missing = [(dst.heads.first, dst.heads.first + dst.heads.count)]
        for index, src in by_layer.get(dst.layer, ()):
            check_mappable(src, dst, allow_lossy)
            rest = []
            for low, high in missing:
                first = max(low, src.heads.first)
                end = min(high, src.heads.first + src.heads.count)
                if first >= end:
                    rest.append((low, high))
                    continue
                rects[index].append(Rect(src, dst, first, end - first))
                rest += [(a, b) for a, b in ((low, first), (end, high)) if a < b]
            missing = rest
        if missing:
            raise GeometryError(
                f"layer {dst.layer}: heads {missing} are held by none of the peer's "
                f"{len(theirs)} shards; do both engines run the same model?"
            )
    return rects


def check_mappable(src: BlockView, dst: BlockView, allow_lossy: bool = False) -> None:
    """Raise GeometryError that names the first difference that no path can bridge."""
    where = f"layer {dst.layer}: peer has"
    if src.heads.total != dst.heads.total:
        raise GeometryError(
            f"{where} {src.heads.total} KV heads, we have {dst.heads.total}; "
            "do both engines run the same model?"
        )
    if DENSE not in (src.layout, dst.layout) or src.layout != dst.layout:
        _check_equal(src, dst, where)
        return
    ours = {part.name: part.shape[2] for part in dst.parts}
    peers = {part.name: part.shape[2] for part in src.parts}
    if ours != peers:
        raise GeometryError(
            f"{where} parts {peers} (name, elements a token), we have {ours}; "
            "do both engines run the same model, with comparable attention backends?"
        )
    if src.dtype != dst.dtype:
        _check_convertible(src, dst, where, allow_lossy)
    _check_itemsizes(src, dst, where)


def _check_convertible(src: BlockView, dst: BlockView, where: str, allow_lossy: bool) -> None:
    unknown = [d for d in (src.dtype, dst.dtype) if d not in NUMBERS]
    if unknown:
        raise GeometryError(
            f"{where} KV dtype {src.dtype}, we have {dst.dtype}, and {unknown[0]} cannot be "
            "converted; set the same --kv-cache-dtype on both engines"
        )
    if NUMBERS[src.dtype].itemsize == NUMBERS[dst.dtype].itemsize and not allow_lossy:
        raise GeometryError(
            f"{where} KV dtype {src.dtype}, we have {dst.dtype}: neither holds the other's values; "
            'set the same --dtype and --kv-cache-dtype on both engines, or "allow_lossy": true in '
            "the decode engine's kv_connector_extra_config"
        )


def _check_itemsizes(src: BlockView, dst: BlockView, where: str) -> None:
    """An element is as wide as its dtype, on both sides: rows are counted in the peer's elements,
    and wider ones than ours would be written over what lies beside our cells."""
    ours = {part.name: part.itemsize for part in dst.parts}
    for part in src.parts:
        number = NUMBERS.get(src.dtype)
        wanted = number.itemsize if number else ours[part.name]
        if part.itemsize != wanted or (src.dtype == dst.dtype and wanted != ours[part.name]):
            raise GeometryError(
                f"{where} elements of {part.itemsize} bytes in part {part.name} of KV dtype "
                f"{src.dtype}, expected {wanted}; run one version of kvconnect on both"
            )


def _check_equal(src: BlockView, dst: BlockView, where: str) -> None:
    """Packed content moves whole: all of the geometry must be the same."""
    if src.layout != dst.layout:
        raise GeometryError(
            f"{where} layout {src.layout}, we have {dst.layout}; use the same attention "
            "backend and VLLM_KV_CACHE_LAYOUT on both engines"
        )
    if src.block_tokens != dst.block_tokens:
        raise GeometryError(
            f"{where} {src.block_tokens}-token blocks, we have {dst.block_tokens}, of a packed "
            f"layout ({dst.layout}); set the same --block-size on both engines"
        )
    if src.dtype != dst.dtype:
        raise GeometryError(
            f"{where} KV dtype {src.dtype}, we have {dst.dtype}, in a packed layout "
            f"({dst.layout}); set the same --dtype and --kv-cache-dtype on both engines"
        )
    ours = {p.name: (*p.shape[1:], p.itemsize) for p in dst.parts}
    peers = {p.name: (*p.shape[1:], p.itemsize) for p in src.parts}
    if ours != peers:
        raise GeometryError(
            f"{where} parts {peers} (name, tokens, content, itemsize), we have {ours}; do both "
            "engines run the same model, with the same attention backend?"
        )


def why_not_direct(rect: Rect) -> str:
    """Why a rectangle cannot be read as rows of equal blocks; empty if it can."""
    src, dst = rect.src, rect.dst
    if src.block_tokens != dst.block_tokens:
        return f"blocks of {src.block_tokens} and {dst.block_tokens} tokens"
    if src.dtype != dst.dtype:
        return f"KV dtypes {src.dtype} and {dst.dtype}"
    for theirs, ours in part_pairs(rect):
        if theirs.scale != ours.scale:
            return f"scales {theirs.scale:g} and {ours.scale:g} of {ours.name}"
        if any(a.cells and b.cells and a.cells != b.cells for a, b in tiles_of(theirs, ours)):
            return f"tiles {theirs.tiles} and {ours.tiles} of {ours.name}"
    return ""


def part_pairs(rect: Rect) -> list[tuple[Part, Part]]:
    """(source's, destination's) of each part."""
    theirs = {part.name: part for part in rect.src.parts}
    return [(theirs[part.name], part) for part in rect.dst.parts]


def joined(view: BlockView) -> Part | None:
    """K and V as one part, where they lie side by side in every token and mean the same."""
    parts = {part.name: part for part in view.parts}
    if view.layout != DENSE or parts.keys() != {"k", "v"}:
        return None
    k, v = parts["k"], parts["v"]
    beside = v.base == k.base + k.shape[2] * k.strides[3]
    uncut = not (k.tiles[1].cells or v.tiles[1].cells)
    equal = (k.strides, k.shape[:2], k.itemsize, k.scale, k.tiles[0]) == (
        (v.strides, v.shape[:2], v.itemsize, v.scale, v.tiles[0])
    )
    if not (beside and uncut and equal):
        return None
    heads, tokens, content = k.shape
    return replace(k, name="kv", shape=(heads, tokens, content + v.shape[2]))


def tiles_of(a: Part, b: Part) -> "zip[tuple[Tile, Tile]]":
    """How both cut their tokens, and their content."""
    return zip(a.tiles, b.tiles, strict=True)
