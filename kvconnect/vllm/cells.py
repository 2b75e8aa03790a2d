"""Where the cells of a layer's cache are: strides and tiles, in elements."""

from typing import NamedTuple

import torch

from kvconnect.geometry.blocks import Tile


class Cells(NamedTuple):
    """A layer's cache, strides in elements. A block is ``pieces`` kernel blocks of equal stride."""

    base: int
    item: int
    pieces: int
    heads: int
    tokens: int
    """Tokens of one kernel block."""
    content: int
    piece_stride: int
    head_stride: int
    token_stride: int
    element_stride: int


class Axis(NamedTuple):
    """Cell ``i`` is ``(i // cells) * tile.stride + (i % cells) * stride`` from the first."""

    stride: int
    tile: Tile


class CellLayout(NamedTuple):
    """K or V of one head in one block; ``start`` counts from the head's first element."""

    start: int
    token: Axis
    content: Axis


def cells_of(cache: torch.Tensor, num_blocks: int) -> Cells:
    """Where the cells of a layer's cache ``[B, H, N, C]`` are."""
    _, heads, tokens, content = cache.shape
    pieces = cache.shape[0] // num_blocks
    item = cache.element_size()
    return Cells(cache.data_ptr(), item, pieces, heads, tokens, content, *cache.stride())
