"""What a layer's blocks hold: K and V cell by cell, or packed content that moves whole.

Dense C of a view ``[B, H, N, C]`` is K and V side by side, or MLA's one vector. The CPU backend
reads the same bytes as ``[B, H, 2N, D]``, K before V, packed for the ISA
(``v1/attention/backends/cpu_attn.py`` forward): `kvconnect.vllm.probe` looks how.

* Content that no spec explains gets a layout of its own name.
* A dtype that cannot be converted keeps vLLM's name.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from msgspec.structs import replace

from kvconnect.geometry.blocks import DENSE, UNTILED, Part, Tile
from kvconnect.ops import NUMBERS, Type
from kvconnect.vllm import _compat
from kvconnect.vllm.cells import Axis, CellLayout, Cells

# vLLM stores fp8 as bytes; of which format, the layer's kv_cache_dtype tells ("fp8" is e4m3 on
# CUDA and CPU). Other names are of packings or, fp8_inc, of Gaudi's own format.
STORED = {
    name: getattr(torch, row.torch_name) for name, row in NUMBERS.items() if row.itemsize == 1
}
FP8 = {"fp8": Type.E4M3.kv_name} | {name: name for name in STORED}
FLOATS = [getattr(torch, row.torch_name) for row in NUMBERS.values() if row.itemsize > 1]
MOST_ROW_BYTES = 1 << 16

_PartName = Literal["k", "v", "kv"]


class Dtype(NamedTuple):
    """KV's dtype by our name, or by vLLM's where an element is no number by itself."""

    name: str
    numbers: bool
    scaled: bool = False


def has_slots(spec: Any) -> bool:
    """Whether H of the tensor is not one KV head each: nvfp4, b12x, ROCm."""
    return _compat.has_head_slots(spec) or spec.num_heads != spec.num_kv_heads


def dtype_of(spec: Any, module: Any) -> Dtype:
    """A layer's dtype: some keep the model's in an engine whose others are fp8."""
    if spec.dtype in FLOATS:
        return Dtype(name_of(spec.dtype), True)
    named = _compat.cache_dtype(module)
    if named not in FP8:
        return Dtype(str(named or name_of(spec.dtype)), False)
    from vllm.platforms import current_platform

    if current_platform.is_fp8_fnuz():
        return Dtype(f"{FP8[named]}fnuz", True)
    if _compat.has_scale_per_head(module):
        return Dtype(f"{FP8[named]} with a scale per head", True)
    return Dtype(FP8[named], True, scaled=True)


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without torch's."""
    return str(dtype).removeprefix("torch.")


def content_of(
    cells: Cells, spec: Any, module: Any, dtype: Dtype, vllm_config: Any
) -> tuple[str, tuple[Part, ...]]:
    """Layout and parts of a layer."""
    k, v = spec.head_size, spec.head_size_v
    explained = (
        dtype.numbers
        and not has_slots(spec)
        and not _compat.has_state_content(spec)
        and k + v == cells.content
        and cells.pieces * cells.tokens == spec.block_size
    )
    backend = _backend(module)
    if backend == "CPU_ATTN":
        from kvconnect.vllm import probe  # for CPU engines alone

        kernel = probe.kernel_of(
            cells, spec, module, STORED.get(dtype.name, spec.dtype), vllm_config
        )
        layout = f"cpu:{kernel.isa}"
        found = probe.cell_layouts(kernel, cells.tokens, k) if explained and k == v else None
    else:
        layout = f"packed by {backend}"
        row = Axis(cells.token_stride, UNTILED), Axis(cells.element_stride, UNTILED)
        found = (
            (CellLayout(0, *row), CellLayout(k * cells.element_stride, *row)) if explained else None
        )
    if dtype.scaled and (scales := (_scale(module, "k"), _scale(module, "v"))) != (1, 1):
        layout += f", scales {scales[0]:g} {scales[1]:g}"  # packed content is not rescaled
    if found is None:
        return layout, (packed(cells),)
    names: tuple[tuple[_PartName, int], ...] = (("k", k), ("v", v)) if v else (("kv", k),)
    parts = []
    for (name, size), layout_of_part in zip(names, found, strict=False):
        part = _part(cells, layout_of_part, name, size)
        if part is None:
            return layout, (packed(cells),)
        parts.append(replace(part, scale=_scale(module, name)) if dtype.scaled else part)
    return DENSE, tuple(parts)


def _part(cells: Cells, layout: CellLayout, name: _PartName, size: int) -> Part | None:
    """A part as ``layout`` has it in each piece; None where pieces need a tile of tiles."""
    tile = layout.token.tile
    if cells.pieces > 1:
        # tokens of the next piece: on in the same step, or in a tile of their own
        if tile.cells:
            if cells.tokens // tile.cells * tile.stride != cells.piece_stride:
                return None
        elif cells.tokens * layout.token.stride != cells.piece_stride:
            tile = Tile(cells.tokens, cells.piece_stride)
    block_stride = cells.pieces * cells.piece_stride
    strides = (block_stride, cells.head_stride, layout.token.stride, layout.content.stride)
    block, head, token, content = (s * cells.item for s in strides)
    return Part(
        base=cells.base + layout.start * cells.item,
        strides=(block, head, token, content),
        shape=(cells.heads, cells.pieces * cells.tokens, size),
        itemsize=cells.item,
        name=name,
        tiles=(_in_bytes(tile, cells.item), _in_bytes(layout.content.tile, cells.item)),
    )


def _in_bytes(tile: Tile, item: int) -> Tile:
    return Tile(tile.cells, tile.stride * item)


def packed(cells: Cells) -> Part:
    """All bytes of a head, or of its tokens where heads lie between them.

    Of content that nobody can explain (nvfp4, scales within a block), only where a run of bytes
    begins and ends is known, and a block is moved as those runs. With 16 tokens of 80 bytes, 2
    heads and one piece a block:

    * ``[B, H, N, C]`` (a head's tokens are one run: the token stride is 80): 2 rows of 1,280
      bytes a block, shape (2, 1, 1280). With 2,048 tokens the row would be 160 KiB, which no
      staging slot need hold: it is cut to the largest power of two that divides it and is at
      most MOST_ROW_BYTES, which makes 10 rows, shape (2, 5, 32768).
    * ``[B, N, H, C]`` (heads lie between the tokens: the token stride is 160): 32 rows of 80
      bytes, shape (2, 16, 80), token stride 160.
    * The second with a block of two kernel blocks (``pieces`` is 2): shape (2, 32, 80), and tokens
      16 to 31 lie in a tile of their own, a piece further on.
    """
    row = cells.content * cells.item
    pieces, tokens, nbytes = cells.pieces, cells.tokens, row
    tile, step = UNTILED, cells.token_stride * cells.item
    if cells.token_stride * cells.item == row or tokens == 1:
        tokens, nbytes, step = 1, cells.tokens * row, cells.piece_stride * cells.item
        if pieces == 1 and nbytes > MOST_ROW_BYTES:  # a row has to fit a staging slot
            step = math.gcd(nbytes, MOST_ROW_BYTES)
            tokens, nbytes = nbytes // step, step
    elif pieces > 1:
        tile = Tile(tokens, cells.piece_stride * cells.item)
    return Part(
        base=cells.base,
        strides=(pieces * cells.piece_stride * cells.item, cells.head_stride * cells.item, step, 1),
        shape=(cells.heads, pieces * tokens, nbytes),
        itemsize=1,
        tiles=(tile, UNTILED),
    )


def _scale(module: Any, name: _PartName) -> float:
    """vLLM's static scale; set when weights were loaded, before caches are registered."""
    return _compat.static_scale(module, "v" if name == "v" else "k")  # MLA's vector has K's


def _backend(module: Any) -> str:
    return str(module.get_attn_backend().get_name()) if hasattr(module, "get_attn_backend") else ""
