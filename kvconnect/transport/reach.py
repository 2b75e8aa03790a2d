"""Registered memory by address: what transports without a NIC's checks need to stay inside it.

`pair` gives a work's spans on both sides, `Reach` bounds them and copies host memory between
scattered spans and one dense buffer. Knows no peers, libraries or transfers.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvconnect.errors import TransportError
from kvconnect.geometry.blocks import Region
from kvconnect.transport.base import Work

Spans = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(our addresses, the peer's addresses, bytes), int64 ``[n]`` each."""

LARGE_BYTES = 4096  # from here on, calls of memmove are faster than numpy's one for all


def pair(work: Work) -> Spans:
    """Spans of ``work``, in its order; raises TransportError if their sizes do not match."""
    ours, nbytes = work.local.locate(work.local_index)
    theirs, their_nbytes = work.remote.locate(work.remote_index)
    if not np.array_equal(nbytes, their_nbytes):
        raise TransportError("rows of different sizes are paired")
    return ours, theirs, nbytes


def join(spans: Spans) -> Spans:
    """Fewer spans: neighbours in the list that touch on both sides become one."""
    ours, theirs, nbytes = spans
    if len(ours) < 2:
        return spans
    ends = (ours[:-1] + nbytes[:-1] == ours[1:]) & (theirs[:-1] + nbytes[:-1] == theirs[1:])
    heads = np.flatnonzero(np.concatenate(([True], ~ends)))
    return ours[heads], theirs[heads], np.add.reduceat(nbytes, heads)


def split(spans: Spans, most: int) -> Spans:
    """More spans: none of more than ``most`` bytes."""
    ours, theirs, nbytes = spans
    pieces = -(-nbytes // most)
    if pieces.max(initial=0) <= 1:
        return spans
    of = np.repeat(np.arange(len(nbytes)), pieces)
    first = np.cumsum(pieces) - pieces
    offset = (np.arange(len(of)) - first[of]) * most
    return ours[of] + offset, theirs[of] + offset, np.minimum(nbytes[of] - offset, most)


class Reach:
    """The regions of one side. A span is inside if one region holds all of it."""

    def __init__(self, regions: Sequence[Region]) -> None:
        extents: list[list[int]] = []
        for address, nbytes in sorted((r.address, r.nbytes) for r in regions):
            if extents and address < extents[-1][1]:
                extents[-1][1] = max(extents[-1][1], address + nbytes)
            else:
                extents.append([address, address + nbytes])
        self._first = np.array([first for first, _ in extents], dtype=np.int64)
        self._end = np.array([end for _, end in extents], dtype=np.int64)

    def check(self, addresses: np.ndarray, nbytes: np.ndarray) -> None:
        """Raise TransportError unless every span is inside; any numbers may be given."""
        region = self._region(addresses)
        inside = (region >= 0) & (nbytes > 0)
        if len(self._first):
            # not address + nbytes, which a hostile peer can make overflow
            inside &= nbytes <= self._end[region] - np.maximum(addresses, 0)
        if not inside.all():
            at = int(np.argmin(inside))
            raise TransportError(
                f"{int(nbytes[at])} bytes at address {int(addresses[at]):#x} lie outside every "
                "registered region"
            )

    def gather(self, addresses: np.ndarray, nbytes: np.ndarray, dense: np.ndarray) -> None:
        """Copy the spans, which must be inside, one after the other into ``dense`` (uint8)."""
        for span, to, size in _large(addresses, nbytes, dense):
            ctypes.memmove(to, span, size)
        for spans, places, at, to in self._small(addresses, nbytes, dense):
            places[to] = spans[at]

    def scatter(self, addresses: np.ndarray, nbytes: np.ndarray, dense: np.ndarray) -> None:
        """Copy from ``dense``, where they lie one after the other, to ``addresses``."""
        for span, to, size in _large(addresses, nbytes, dense):
            ctypes.memmove(span, to, size)
        for spans, places, at, to in self._small(addresses, nbytes, dense):
            spans[at] = places[to]

    def _region(self, addresses: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, addresses, side="right") - 1

    def _small(self, addresses: np.ndarray, nbytes: np.ndarray, dense: np.ndarray) -> Any:
        """Spans of equal size in one region: numpy copies them all in one call."""
        small = np.flatnonzero(nbytes < LARGE_BYTES)
        offsets, regions = (np.cumsum(nbytes) - nbytes)[small], self._region(addresses)[small]
        addresses, nbytes = addresses[small], nbytes[small]
        for region in np.unique(regions):
            first, end = int(self._first[region]), int(self._end[region])
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(first))
            for size in np.unique(nbytes[regions == region]):
                chosen = np.flatnonzero((regions == region) & (nbytes == size))
                windows = _windows(memory, int(size)), _windows(dense, int(size))
                yield *windows, addresses[chosen] - first, offsets[chosen]


def _large(addresses: np.ndarray, nbytes: np.ndarray, dense: np.ndarray) -> Any:
    """Spans that are worth a call each: address, address in ``dense``, bytes."""
    large = np.flatnonzero(nbytes >= LARGE_BYTES)
    at = int(dense.ctypes.data) + np.cumsum(nbytes) - nbytes
    return zip(addresses[large].tolist(), at[large].tolist(), nbytes[large].tolist(), strict=True)


def _windows(memory: np.ndarray, size: int) -> np.ndarray:
    """Every run of ``size`` bytes in ``memory``, by offset, as one opaque element each."""
    return np.ndarray((len(memory) - size + 1,), f"V{size}", memory, strides=(1,))
