"""Where a layer's KV blocks are in memory.

A `BlockView` is one layer's blocks on one rank: a base address and byte strides over
``[block, head, token, content]`` for each part (K, V, or both fused), tiled where a backend
packs for its instructions, and which of the model's KV heads this rank holds. It is made once,
when caches are registered; later code knows no model's and no attention backend's name. What
strides and tiles cannot say has another layout than DENSE and moves whole, between equals.

* A `Shard` is all views of one rank, with the memory they point into.
* Views travel to peers as they are, so they hold numbers only; `Shard.memory` keeps the
  owners of the memory alive and stays at home.
* Nothing here allocates, copies or talks.
"""

from typing import Annotated, Any, Literal

import msgspec

from kvconnect.errors import GeometryError

# Bounds of what a peer may claim (rule 3 of DESIGN: metadata is hostile until checked).
MAX_LAYERS = 4096
MAX_BLOCKS = 1 << 31
MAX_ADDRESS = (1 << 63) - 1

DENSE = "dense"
"""Layout of a view whose strides and tiles say where every cell is."""

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_ADDRESS)]
Extent = Annotated[int, msgspec.Meta(ge=1, le=MAX_ADDRESS)]
Name = Annotated[str, msgspec.Meta(max_length=512)]


class Tile(msgspec.Struct, frozen=True, array_like=True):
    """How an axis is cut: cell ``i`` is at ``(i // cells) * stride + (i % cells) * inner``.

    ``inner`` is the axis' own stride. ``cells`` 0: not cut.
    """

    cells: Size = 0
    stride: Size = 0


UNTILED = Tile()


class Part(msgspec.Struct, frozen=True, array_like=True):
    """K, V, or both fused, of one layer.

    ``shape`` is ``(heads, tokens, content)`` per block, content in elements of ``itemsize``
    bytes. ``strides`` are bytes over ``(block, head, token, content)``; ``tiles`` cut the token
    and the content axis. An element stands for ``scale`` times what it holds (vLLM's static
    k_scale and v_scale).
    """

    base: Size
    strides: tuple[Size, Size, Size, Size]
    shape: tuple[Extent, Extent, Extent]
    itemsize: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    name: Literal["k", "v", "kv"] = "kv"
    tiles: tuple[Tile, Tile] = (UNTILED, UNTILED)
    scale: Annotated[float, msgspec.Meta(gt=0, le=1e30)] = 1.0

    def axes(self, cells: tuple[int, int]) -> list[tuple[int, int]]:
        """(count, stride) of head, and of token and content cut into ``cells``; 0: not cut.

        ``cells`` are this part's own, or any where it is not cut.
        """
        found = [(self.shape[0], self.strides[1])]
        for axis, cut in enumerate(cells):
            size, inner, tile = self.shape[axis + 1], self.strides[axis + 2], self.tiles[axis]
            if cut:
                found.append((size // cut, tile.stride if tile.cells else cut * inner))
            found.append((cut or size, inner))
        return found


class Heads(msgspec.Struct, frozen=True, array_like=True):
    """Which of a layer's ``total`` KV heads are here: ``[first, first + count)``."""

    first: Size
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    total: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class BlockView(msgspec.Struct, frozen=True):
    """One layer's blocks on one rank."""

    layer: Name
    group: Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)]
    """Index of the KV cache group whose block table addresses this layer."""
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCKS)]
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    heads: Heads
    dtype: Name
    layout: Name
    """DENSE, or the name of a packing that moves whole blocks, between equals."""
    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=8)]


class Region(msgspec.Struct, frozen=True):
    """A piece of memory that a transport registers: all parts lie inside some region."""

    address: Size
    nbytes: Size
    kind: Literal["DRAM", "VRAM"] = "DRAM"
    """NIXL's names."""
    device: Annotated[int, msgspec.Meta(ge=0, lt=1024)] = 0


class Shard(msgspec.Struct, frozen=True):
    """All views of one rank, and the memory they point into."""

    views: tuple[BlockView, ...]
    regions: tuple[Region, ...]
    memory: Any = None
    """Owners of the memory (tensors); held so that no view outlives what it points to."""


def check_views(views: tuple[BlockView, ...], regions: tuple[Region, ...]) -> None:
    """Raise GeometryError unless every byte that ``views`` describe lies in ``regions``.

    Run on what a peer claims, before any address of it is used.
    """
    if len(views) > MAX_LAYERS:
        raise GeometryError(f"{len(views)} layers claimed, expected at most {MAX_LAYERS}")
    names = {v.layer for v in views}
    if len(names) != len(views):
        raise GeometryError("a layer is claimed twice")
    if any(r.address + r.nbytes > MAX_ADDRESS for r in regions):
        raise GeometryError("a region reaches beyond 63-bit addresses")
    for view in views:
        if view.heads.first + view.heads.count > view.heads.total:
            raise GeometryError(f"layer {view.layer}: heads {view.heads} exceed their total")
        if len({part.name for part in view.parts}) != len(view.parts):
            raise GeometryError(f"layer {view.layer}: two parts have one name")
        for part in view.parts:
            _check_part(view, part)
            first, end = part_extent(part, view.num_blocks)
            if not any(r.address <= first and end <= r.address + r.nbytes for r in regions):
                raise GeometryError(
                    f"layer {view.layer}: bytes [{first:#x}, {end:#x}) lie outside every "
                    "registered region"
                )


def _check_part(view: BlockView, part: Part) -> None:
    heads, tokens, _ = part.shape
    if heads != view.heads.count:
        raise GeometryError(
            f"layer {view.layer}: a part has {heads} heads, expected {view.heads.count}"
        )
    if view.layout == DENSE and tokens != view.block_tokens:
        raise GeometryError(
            f"layer {view.layer}: a part has {tokens} tokens a block, expected {view.block_tokens}"
        )
    for size, tile in zip(part.shape[1:], part.tiles, strict=True):
        if tile.cells and size % tile.cells:
            raise GeometryError(
                f"layer {view.layer}: an axis of {size} is cut into tiles of {tile.cells}"
            )


def part_extent(part: Part, num_blocks: int) -> tuple[int, int]:
    """Half-open range of addresses that a part touches."""
    cells = (part.tiles[0].cells, part.tiles[1].cells)
    axes = [(num_blocks, part.strides[0]), *part.axes(cells)]
    return part.base, part.base + sum((n - 1) * s for n, s in axes) + part.itemsize


def held_heads(rank: int, tp_size: int, total: int) -> Heads:
    """KV heads of one tensor-parallel rank, as vLLM assigns them.

    With more ranks than heads, ``tp_size / total`` neighbouring ranks hold the same head
    (vLLM ``config/model.py`` get_num_kv_heads).
    """
    if total >= tp_size:
        if total % tp_size:
            raise GeometryError(f"{total} KV heads cannot be divided over {tp_size} ranks")
        count = total // tp_size
        return Heads(rank * count, count, total)
    if tp_size % total:
        raise GeometryError(f"{total} KV heads cannot be replicated over {tp_size} ranks")
    return Heads(rank * total // tp_size, 1, total)
