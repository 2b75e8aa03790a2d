"""How the blocks of a chunk lie in a slot.

A slot's payload is its blocks in sequence, each the parts of all layers of a KV cache group,
dense ``[head][token][content]`` as in `kvconnect.ops`, and after them one 64-bit sum per block.
A header's digest is of those sums. So any block of a chunk can be loaded and verified alone,
without another pass over the bytes: the kernels sum what they move.

* What is dense crosses layouts: `format` names what the bytes mean, not where they came from.
* Nothing is converted. Another dtype, scale, head or layer is another format.
* A sum shows damage, not malice (`kvconnect.tier.keys` says who may write).
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from kvconnect.blocks import MAX_BLOCKS, BlockView, Part, Shard
from kvconnect.errors import GeometryError
from kvconnect.ops import WIRE_ALIGN, Copy, Kernels, Launch, Prepared, Type, chunk_bytes
from kvconnect.plan import NO_BLOCK

SUM_BYTES = 8
_ODD = 0x9E3779B97F4A7C15  # keeps sums of a block's bundles apart
_MASK = (1 << 64) - 1


class _Bundle:
    """Parts of equal tokens a block, which one call of the kernels moves."""

    def __init__(self, kernels: Kernels, copies: Sequence[Copy], offset: int) -> None:
        self.tokens = copies[0].block_tokens
        self.offset = offset
        self.nbytes = chunk_bytes(copies, self.tokens)
        self.prepared: Prepared = kernels.prepare(copies)


class Packing:
    """Of one group of one rank. ``chunk_blocks``: blocks in a slot.

    A pipeline stage may have no layers of a group: then there is nothing to move, and it moves.
    """

    def __init__(self, shard: Shard, group: int, chunk_blocks: int, kernels: Kernels) -> None:
        views = sorted((v for v in shard.views if v.group == group), key=lambda v: v.layer)
        self.chunk_blocks = chunk_blocks
        self.tokens = chunk_blocks * views[0].block_tokens if views else 0
        self.num_blocks = min((v.num_blocks for v in views), default=MAX_BLOCKS)
        self.format = _format(views, chunk_blocks)
        by_tokens: dict[int, list[Copy]] = {}
        for view in views:
            for part in view.parts:
                by_tokens.setdefault(part.shape[1], []).append(_copy(view, part))
        self._bundles: list[_Bundle] = []
        end = 0
        for _, copies in sorted(by_tokens.items()):
            bundle = _Bundle(kernels, copies, end)
            end = _aligned(end + bundle.nbytes)
            self._bundles.append(bundle)
        self.block_bytes = end
        self._sums_at = chunk_blocks * end
        self.nbytes = self._sums_at + chunk_blocks * SUM_BYTES
        """Of a slot's payload."""

    def gather(self, blocks: Sequence[int], address: int) -> "Packed":
        """Blocks → payload at ``address``."""
        self._check(blocks)
        launches = []
        for place, block in enumerate(blocks):
            for bundle in self._bundles:
                at = address + place * self.block_bytes + bundle.offset
                segments = np.array([[block, 0, bundle.tokens, 0]], dtype=np.int32)
                found = bundle.prepared.gather(segments, at, bundle.nbytes, 1)
                launches.append(found)
        return Packed(launches, len(blocks))

    def scatter(self, blocks: Sequence[int], address: int) -> "dict[int, Packed]":
        """Payload at ``address`` → blocks, except those that are NO_BLOCK; by place."""
        self._check([block for block in blocks if block != NO_BLOCK], len(blocks))
        found = {}
        for place, block in enumerate(blocks):
            if block == NO_BLOCK:
                continue
            launches = []
            for bundle in self._bundles:
                at = address + place * self.block_bytes + bundle.offset
                segments = np.array([[block, 0, bundle.tokens, 0]], dtype=np.int32)
                call = bundle.prepared.scatter(segments, at, bundle.nbytes, 1)
                launches.append(call)
            found[place] = Packed(launches, 1)
        return found

    def put_sums(self, payload: np.ndarray, sums: Sequence[int]) -> int:
        """Write the sums of all blocks behind them; returns the digest."""
        raw = np.array(sums, dtype="<u8").tobytes()
        payload[self._sums_at : self.nbytes] = np.frombuffer(raw, np.uint8)
        return _digest(raw)

    def sums(self, payload: np.ndarray, digest: int) -> list[int] | None:
        """Sums of all blocks; None if they are not those of ``digest``."""
        raw = payload[self._sums_at : self.nbytes].tobytes()
        found: list[int] = np.frombuffer(raw, "<u8").tolist()
        return found if _digest(raw) == digest else None

    def _check(self, blocks: Sequence[int], count: int | None = None) -> None:
        count = len(blocks) if count is None else count
        if count != self.chunk_blocks:
            raise GeometryError(f"{count} blocks for a chunk of {self.chunk_blocks}")
        if blocks and not 0 <= min(blocks) <= max(blocks) < self.num_blocks:
            raise GeometryError(f"blocks {list(blocks)} are not all in [0, {self.num_blocks})")


class Packed:
    """``blocks`` under way, with equally many launches each."""

    def __init__(self, launches: Sequence[Launch], blocks: int) -> None:
        self._launches = launches
        self._blocks = blocks

    def done(self) -> bool:
        """Whether all bytes are written; raises TransportError if the device failed."""
        return all(launch.done() for launch in self._launches)

    def sums(self) -> list[int]:
        """One per block; valid once done."""
        each = [int(launch.sums[0]) for launch in self._launches]
        found = []
        bundles = len(each) // self._blocks
        for block in range(self._blocks):
            total = 0
            for value in each[block * bundles : (block + 1) * bundles]:
                total = (total * _ODD + value) & _MASK
            found.append(total)
        return found


def slot_bytes(packings: Sequence[Packing]) -> int:
    """What a slot must have for any of ``packings``."""
    return max(packing.nbytes for packing in packings)


def _copy(view: BlockView, part: Part) -> Copy:
    """All of a part, as it is."""
    token, content = part.tiles
    kind = Type.raw(part.itemsize)
    return Copy(
        part.base,
        *part.strides,
        heads=part.shape[0],
        content=part.shape[2],
        block_tokens=part.shape[1],
        num_blocks=view.num_blocks,
        kv_type=kind,
        wire_type=kind,
        token_tile=token.cells,
        token_outer=token.stride,
        content_tile=content.cells,
        content_outer=content.stride,
    )


def _format(views: Sequence[BlockView], chunk_blocks: int) -> str:
    pieces = [
        (
            view.layer,
            view.block_tokens,
            msgspec.structs.astuple(view.heads),
            view.dtype,
            view.layout,  # DENSE, or what only an equal engine understands
            [(part.name, part.shape, part.itemsize, part.scale) for part in view.parts],
        )
        for view in views
    ]
    text = msgspec.msgpack.encode([WIRE_ALIGN, chunk_blocks, pieces])
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _digest(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // WIRE_ALIGN) * WIRE_ALIGN
