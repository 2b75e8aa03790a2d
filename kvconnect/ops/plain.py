"""The kernels in numpy and torch: fallback where nothing was compiled, oracle of the tests.

Written to be obviously right, not fast. Memory is seen through one six-dimensional view
``[block, head, token tile, token, content tile, element]`` per copy. torch is imported when
two types differ, and only converts.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvconnect.ops.copies import (
    Copy,
    DoneLaunch,
    Verb,
    Wires,
    as_segments,
    as_wires,
    check_segments,
    checked,
    shape,
    span,
    split,
    strides,
    wire_offsets,
)
from kvconnect.ops.dtypes import Type

# Of csrc/kvc/checksum.h
KEY_STEP = np.uint64(0x9E3779B97F4A7C15)
KEY_START = np.uint64(0xD1B54A32D192ED03)


class PlainPrepared:
    """Copies with their views; see `kvconnect.ops.Prepared`."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = [checked(copy) for copy in copies]
        self._cells = [_cells(copy) for copy in self._copies]

    def move(
        self, verb: Verb, segments: np.ndarray, wires: Wires, wire_bytes: int, units: int
    ) -> DoneLaunch:
        """See `kvconnect.ops.Prepared`."""
        segments, at = as_segments(segments), as_wires(wires)
        check_segments(self._copies, segments, len(at), wire_bytes, units)
        sums = np.zeros(units, dtype=np.uint64)
        for mine, wire in split(segments, at):
            self._move_chunk(verb, mine, wire, sums)
        return DoneLaunch(sums)

    def _move_chunk(self, verb: Verb, segments: np.ndarray, wire: int, sums: np.ndarray) -> None:
        block, first, count, unit = segments.T.astype(np.int64)
        blocks, units_of = np.repeat(block, count), np.repeat(unit, count)
        ends = np.cumsum(count)
        tokens = np.arange(len(blocks)) - np.repeat(ends - count, count) + np.repeat(first, count)
        if not len(blocks):
            return
        offsets = wire_offsets(self._copies, len(blocks))
        for copy, cells, offset in zip(self._copies, self._cells, offsets, strict=False):
            dims = (copy.heads, len(blocks), copy.content)
            dense = _memory(wire + offset, dims, copy.wire_type)
            # [τ, head, content tile, element]: what stands between two index arrays goes second
            at = (blocks, slice(None), tokens // copy.token_tile, tokens % copy.token_tile)
            if verb == "gather":
                found = cells[at].transpose(1, 0, 2, 3).reshape(dims)
                dense[...] = convert(found, copy.kv_type, copy.wire_type, copy.factor)
            else:
                found = convert(dense, copy.wire_type, copy.kv_type, copy.factor)
                tiled = (dims[0], dims[1], -1, copy.content_tile)
                cells[at] = found.reshape(tiled).transpose(1, 0, 2, 3)
            np.add.at(sums, units_of, row_sums(dense, offset).sum(axis=0, dtype=np.uint64))


class PlainKernels:
    """The fallback; see `kvconnect.ops.Kernels`."""

    name = "numpy"
    fast = False

    def prepare(self, copies: Sequence[Copy]) -> PlainPrepared:
        """Check ``copies`` and make their views."""
        return PlainPrepared(copies)


def _memory(address: int, dims: tuple[int, ...], kind: Type) -> np.ndarray:
    """Dense cells at an address, which need not be aligned."""
    nbytes = int(np.prod(dims)) * kind.itemsize
    buffer = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
    return np.ndarray(dims, _bits(kind), buffer=buffer)


def _cells(copy: Copy) -> np.ndarray:
    buffer = memoryview((ctypes.c_uint8 * span(copy)).from_address(copy.base))
    return np.ndarray(shape(copy), _bits(copy.kv_type), buffer=buffer, strides=strides(copy))


def _bits(kind: Type) -> np.dtype[Any]:
    return np.dtype({1: "u1", 2: "<u2", 4: "<u4", 8: "<u8", 16: "V16"}[kind.itemsize])


def convert(bits: np.ndarray, src: Type, dst: Type, factor: float) -> np.ndarray:
    """Bit patterns of ``src`` as bit patterns of ``dst``, by way of float32 times ``factor``.

    Rounds to nearest even; fp8 saturates; a NaN becomes the quiet NaN of its sign.
    """
    if (src == dst and factor == 1) or not bits.size:
        return bits if src == dst else np.empty(bits.shape, _bits(dst))
    import torch

    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[src.itemsize]
    given = torch.from_numpy(np.ascontiguousarray(bits).view(signed))
    given = given.view(getattr(torch, src.torch_name))
    value = given.float() * torch.tensor(factor, dtype=torch.float32)
    value = value.clamp(-dst.largest, dst.largest)
    made = value.to(getattr(torch, dst.torch_name))
    into = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dst.itemsize]
    found: np.ndarray = made.contiguous().view(into).numpy().view(_bits(dst))
    nan = value.isnan().numpy()
    if nan.any():  # torch keeps sign and payload in some code paths and not in others
        sign = (bits[nan] >> np.uint8(8 * src.itemsize - 1)).astype(found.dtype)
        shifted = sign << np.uint8(8 * dst.itemsize - 1)
        found[nan] = shifted | np.array(dst.quiet_nan, found.dtype)
    return found


def row_sums(dense: np.ndarray, offset: int) -> np.ndarray:
    """Sums of rows ``dense[..., :]`` that start at ``offset`` in the chunk; uint64 ``[...]``."""
    row_bytes = dense.shape[-1] * dense.itemsize
    rows = np.ascontiguousarray(dense).view(np.uint8).reshape(*dense.shape[:-1], row_bytes)
    padded = np.zeros((*dense.shape[:-1], -(-row_bytes // 8) * 8), dtype=np.uint8)
    padded[..., :row_bytes] = rows
    words = padded.view("<u8")
    starts = offset + row_bytes * np.arange(words[..., 0].size).reshape(words[..., 0].shape)
    places = starts[..., None] + 8 * np.arange(words.shape[-1])
    keyed = words ^ (places.astype(np.uint64) * KEY_STEP + KEY_START)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    swapped = (words << half) | (words >> half)
    mixed = swapped + (keyed & low) * (keyed >> half)
    return np.asarray(mixed.sum(axis=-1, dtype=np.uint64))
