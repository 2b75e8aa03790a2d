"""What a copy between cache and wire is, and what every implementation of it promises.

Wire of a *chunk*: the copies in sequence, each at an offset rounded up to `WIRE_ALIGN`; within a
copy dense ``[head][τ][content]``, τ counting the tokens of the chunk's segments in order. Bytes
between copies are neither read nor written nor summed.

* A call moves a chunk, or any number of chunks of equally many tokens, each at an address of its
  own: on a device that is one launch.
* All arguments are checked before a byte is written; what is wrong raises GeometryError.
* Whether addresses are mapped memory is for the caller to know.
* ``sums[unit]`` is a 64-bit sum over the wire bytes of a unit's rows, keyed by their place in
  the chunk: equal for every implementation, and for gather and scatter of the same chunk.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from kvconnect.errors import GeometryError
from kvconnect.ops.dtypes import Type

WIRE_ALIGN = 256
MAX_BYTES = 1 << 62


class Copy(NamedTuple):
    """One part (K, V or both fused) of one layer: strided cells ↔ dense wire. Strides in bytes.

    Cell (block, head, token, element) is at ``base + block * block_stride + head * head_stride``
    plus, for token t, ``(t // token_tile) * token_outer + (t % token_tile) * token_stride``
    plus the same of the element with ``content_*``. A tile of 0 means not tiled.
    """

    base: int
    """Address of (block 0, first selected head, token 0, element 0)."""
    block_stride: int
    head_stride: int
    token_stride: int
    content_stride: int
    heads: int
    content: int
    """Elements of a token and head."""
    block_tokens: int
    num_blocks: int
    kv_type: Type
    wire_type: Type
    factor: float = 1.0
    """gather: wire = kv * factor; scatter: kv = wire * factor."""
    token_tile: int = 0
    token_outer: int = 0
    content_tile: int = 0
    content_outer: int = 0


Verb = Literal["gather", "scatter"]
"""``gather``: cache → wire. ``scatter``: wire → cache."""

Wires = int | Sequence[int] | np.ndarray
"""Address of a chunk, or of several."""


class Launch(Protocol):
    """A gather or scatter under way."""

    def done(self) -> bool:
        """Whether all bytes are written; raises TransportError if the device failed."""

    @property
    def sums(self) -> np.ndarray:
        """uint64 ``[units]``; valid once done."""


class DoneLaunch:
    """A `Launch` that had ended when it was returned, as on a CPU."""

    def __init__(self, sums: np.ndarray) -> None:
        self.sums = sums

    def done(self) -> bool:
        """Always true."""
        return True


class Prepared(Protocol):
    """Copies made ready."""

    def move(
        self, verb: Verb, segments: np.ndarray, wires: Wires, wire_bytes: int, units: int
    ) -> Launch:
        """Start to move chunks between the cache and the wire.

        ``segments`` is int32 ``[n, 4]``: block, first token, tokens, unit. ``wires`` are the
        addresses of the chunks, with ``wire_bytes`` each; the segments of the first come first.
        A block may occur more than once in a gather. The sums of a scatter are of what was read
        from the wire.
        """


class Kernels(Protocol):
    """An implementation, made once by `load`."""

    name: str
    """``cpu:avx512``, ``cuda``, ``numpy``, …"""
    fast: bool
    """Whether moving KV with it is worth trying where it need not be."""

    def prepare(self, copies: Sequence[Copy]) -> Prepared:
        """Check ``copies`` and make them ready for any number of calls."""


def wire_offsets(copies: Sequence[Copy], tokens: int) -> list[int]:
    """Where each copy starts in a chunk of ``tokens`` tokens, and last where the chunk ends."""
    offsets, end = [], 0
    for copy in copies:
        start = -(-end // WIRE_ALIGN) * WIRE_ALIGN
        offsets.append(start)
        end = start + copy.heads * tokens * copy.content * copy.wire_type.itemsize
    return [*offsets, end]


def chunk_bytes(copies: Sequence[Copy], tokens: int) -> int:
    """Wire bytes of a chunk of ``tokens`` tokens."""
    return wire_offsets(copies, tokens)[-1]


def checked(copy: Copy) -> Copy:
    """``copy`` with its tiles filled in; raises GeometryError for what cannot be."""
    for kind in (copy.kv_type, copy.wire_type):
        if kind not in Type.__members__.values():
            raise GeometryError(f"{copy}: {kind} is no type, expected one of {list(Type)}")
    copy = copy._replace(
        kv_type=Type(copy.kv_type),
        wire_type=Type(copy.wire_type),
        token_tile=copy.token_tile or copy.block_tokens,
        content_tile=copy.content_tile or copy.content,
    )
    counts = (copy.heads, copy.content, copy.block_tokens, copy.num_blocks)
    if min(counts) < 1 or max(counts) >= 1 << 31:
        raise GeometryError(f"{copy}: counts must be in [1, 2^31)")
    for name, tile, whole in (
        ("token_tile", copy.token_tile, copy.block_tokens),
        ("content_tile", copy.content_tile, copy.content),
    ):
        if tile < 0 or whole % tile:
            raise GeometryError(f"{copy}: {name} {tile} must divide {whole}")
    if (copy.kv_type.is_raw or copy.wire_type.is_raw) and (
        copy.kv_type != copy.wire_type or copy.factor != 1
    ):
        raise GeometryError(f"{copy}: RAW types must be equal and have no factor")
    if not (math.isfinite(copy.factor) and copy.factor > 0):
        raise GeometryError(f"{copy}: factor must be finite and above 0")
    if min(copy.base, *strides(copy)) < 0 or copy.base + span(copy) > MAX_BYTES:
        raise GeometryError(f"{copy}: base and strides must be ≥0 and end below 2^62")
    return copy


def strides(copy: Copy) -> tuple[int, ...]:
    """Bytes between neighbours: block, head, token tile, token, content tile, element."""
    token = (copy.token_outer, copy.token_stride)
    return (copy.block_stride, copy.head_stride, *token, copy.content_outer, copy.content_stride)


def shape(copy: Copy) -> tuple[int, ...]:
    """Extents of the six dimensions, of a copy that was `checked`."""
    token = (copy.block_tokens // copy.token_tile, copy.token_tile)
    content = (copy.content // copy.content_tile, copy.content_tile)
    return (copy.num_blocks, copy.heads, *token, *content)


def span(copy: Copy) -> int:
    """Bytes from ``base`` to the end of the last cell."""
    last = sum((n - 1) * s for n, s in zip(shape(copy), strides(copy), strict=True))
    return last + copy.kv_type.itemsize


def check_segments(
    copies: Sequence[Copy], segments: np.ndarray, chunks: int, wire_bytes: int, units: int
) -> None:
    """Raise GeometryError that names the first segment or size that is wrong."""
    blocks = min((c.num_blocks for c in copies), default=1 << 31)
    tokens = min((c.block_tokens for c in copies), default=1 << 31)
    wide = segments.astype(np.int64)
    tests = (
        ("block", wide[:, 0], 0, blocks),
        ("first token", wide[:, 1], 0, tokens + 1),
        ("token count", wide[:, 2], 0, tokens + 1),
        ("end", wide[:, 1] + wide[:, 2], 0, tokens + 1),
        ("unit", wide[:, 3], 0, units),
    )
    for what, values, low, end in tests:
        bad = np.flatnonzero((values < low) | (values >= end))
        if len(bad):
            raise GeometryError(
                f"segment {bad[0]} (block, token, count, unit) = {segments[bad[0]].tolist()}: "
                f"{what} {values[bad[0]]} is outside [{low}, {end})"
            )
    total = int(wide[:, 2].sum())
    each = total // max(chunks, 1)
    ends = set(np.cumsum(wide[:, 2]).tolist())
    if each * chunks != total or not ends.issuperset(range(each, total, max(each, 1))):
        raise GeometryError(f"segments of {total} tokens do not fill {chunks} chunks equally")
    needed = chunk_bytes(copies, each)
    if wire_bytes < needed:
        raise GeometryError(f"wire has {wire_bytes} bytes, {each} tokens need {needed}")


def split(segments: np.ndarray, wires: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Each chunk's segments and address, of what was checked."""
    ends = np.cumsum(segments[:, 2], dtype=np.int64)
    each = int(ends[-1]) // len(wires) if len(wires) and len(ends) else 0
    first = 0
    for number, address in enumerate(wires.tolist(), 1):
        last = int(np.searchsorted(ends, number * each)) + 1
        yield segments[first:last], address
        first = last


def as_segments(segments: np.ndarray) -> np.ndarray:
    """``segments`` as C-contiguous int32 ``[n, 4]``, without ever wrapping a value around."""
    array = np.asarray(segments)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iu":
        raise GeometryError(
            f"segments are {array.dtype} {array.shape}, expected int32 [n, 4]: "
            "block, token, count, unit"
        )
    if array.dtype != np.int32:
        if array.size and (array.min() < -(1 << 31) or array.max() >= 1 << 31):
            raise GeometryError(f"segments reach {array.min()}..{array.max()}, beyond int32")
        array = array.astype(np.int32)
    return np.ascontiguousarray(array)


def as_wires(wires: Wires) -> np.ndarray:
    """``wires`` as C-contiguous uint64 ``[n]``."""
    return np.ascontiguousarray(wires, dtype=np.uint64).reshape(-1)
