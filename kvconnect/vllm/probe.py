"""Where vLLM's CPU attention keeps each element of K and V: by writing numbers and looking.

Its kernels pack a block for their instructions, differently for every ISA, and no API says how.
So the backend's own op writes the number of each cell into one scratch block, digit by digit in
values that every KV dtype holds exactly; what is found there is fitted to strides and tiles.

* A layout that does not fit, or an op that refuses, gives None: never a guess.
* Units are elements. Knows no caches and no peers.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from kvconnect.geometry.blocks import UNTILED, Tile
from kvconnect.vllm import _compat
from kvconnect.vllm.cells import Axis, CellLayout, Cells

BASE = 8  # digits are written as 1 … 8, exact in fp8 e5m2 (two bits of mantissa) and all others


class Kernel(NamedTuple):
    """What decides how the op packs. ``stored`` is the dtype that its bytes are of."""

    isa: str
    dtype: torch.dtype
    cache_dtype: str
    stored: torch.dtype


def kernel_of(
    cells: Cells, spec: Any, module: Any, stored: torch.dtype, vllm_config: Any
) -> Kernel:
    """How the CPU backend was told to store a layer."""
    model_dtype = vllm_config.model_config.dtype
    cache_dtype = vllm_config.cache_config.cache_dtype
    isa = _compat.cpu_attention_isa(module, model_dtype, cells.tokens, spec.head_size, cache_dtype)
    return Kernel(isa, model_dtype, module.kv_cache_dtype, stored)


@functools.cache
def cell_layouts(kernel: Kernel, tokens: int, size: int) -> tuple[CellLayout, CellLayout] | None:
    """How cells of ``size`` elements of K and V lie; None if strides and tiles cannot say."""
    found = _cells_found(kernel, tokens, size)
    if found is None or not np.array_equal(np.sort(found), np.arange(len(found))):
        return None
    place = np.empty_like(found)
    place[found] = np.arange(len(found))
    k, v = (fit(part) for part in place.reshape(2, tokens, size))
    return None if k is None or v is None else (k, v)


def fit(place: np.ndarray) -> CellLayout | None:
    """The layout that puts cell (token, content) at ``place[token, content]``, if there is one."""
    start = place[0, 0]
    token, content = place[:, 0] - start, place[0] - start
    if not np.array_equal(place, start + token[:, None] + content):
        return None
    axes = _fit_axis(token), _fit_axis(content)
    return None if axes[0] is None or axes[1] is None else CellLayout(int(start), axes[0], axes[1])


def _fit_axis(place: np.ndarray) -> Axis | None:
    """Uncut if that fits, else with the smallest tile."""
    count, cell = len(place), np.arange(len(place))
    inner = int(place[1]) if count > 1 else 1
    if inner < 0:
        return None
    if np.array_equal(place, cell * inner):
        return Axis(inner, UNTILED)
    for cells in range(2, count):
        outer = int(place[cells])
        if count % cells or outer < 0:
            continue
        if np.array_equal(place, cell // cells * outer + cell % cells * inner):
            return Axis(inner, Tile(cells, outer))
    return None


def _cells_found(kernel: Kernel, tokens: int, size: int) -> np.ndarray | None:
    """Number of the cell in each element of a block: K's first, ``[token, content]``, then V's."""
    # a call into the op of this vLLM; not at the top, since only CPU engines have it
    from vllm import _custom_ops as ops

    cells = tokens * size
    numbers = np.arange(2 * cells)
    found = np.zeros(2 * cells, dtype=np.int64)
    weight = 1
    while weight < 2 * cells:
        digits = torch.from_numpy(numbers // weight % BASE + 1).to(kernel.dtype)
        key, value = digits.reshape(2, tokens, 1, size).unbind()
        block = torch.zeros(1, 1, 2 * tokens, size, dtype=kernel.stored)
        # as the backend cuts its cache; it passes fp8 as uint8
        whole = block.view(torch.uint8) if kernel.stored.itemsize == 1 else block
        key_cache, value_cache = whole.chunk(2, dim=2)
        slots = torch.arange(tokens)
        try:
            ops.cpu_attn_reshape_and_cache(
                key,
                value,
                key_cache,
                value_cache,
                slots,
                kernel.isa,
                k_scale=1.0,
                v_scale=1.0,
                kv_cache_dtype=kernel.cache_dtype,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
            return None
        seen = block.reshape(-1).float().numpy().astype(np.float64)
        if not np.isin(seen, np.arange(1, BASE + 1)).all():
            return None
        found += (seen.astype(np.int64) - 1) * weight
        weight *= BASE
    return found
