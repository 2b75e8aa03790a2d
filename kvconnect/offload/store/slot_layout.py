"""How the blocks of a chunk lie in a slot.

A slot's payload is its blocks in sequence, each the parts of all layers of a KV cache group,
dense ``[head][token][content]`` as in `kvconnect.ops`, and after them one 64-bit sum per block.
A header's digest is of those sums. So any block of a chunk can be loaded and verified alone,
without another pass over the bytes: the kernels sum what they move.

* What is dense crosses layouts: `format` names what the bytes mean, not where they came from.
* Nothing is converted. Another dtype, scale, head or layer is another format.
* A sum shows damage, not malice (`kvconnect.offload.keys` says who may write).
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np

from kvconnect.errors import GeometryError
from kvconnect.geometry.blocks import MAX_BLOCKS, BlockView, Part, Shard
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.ops import WIRE_ALIGN, Copy, Kernels, Launch, Prepared, Type, Verb, chunk_bytes

SUM_BYTES = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)  # keeps sums of a block's bundles apart

ChunkAt = tuple[Sequence[int], int]
"""Its blocks, and the address of its payload."""


class _Bundle:
    """Parts of equal tokens a block, which one call of the kernels moves."""

    def __init__(self, kernels: Kernels, copies: Sequence[Copy], offset: int) -> None:
        self.tokens = copies[0].block_tokens
        self.offset = np.uint64(offset)
        self.nbytes = chunk_bytes(copies, self.tokens)
        self._prepared: Prepared = kernels.prepare(copies)

    def move(self, verb: Verb, blocks: np.ndarray, payloads: np.ndarray) -> Launch:
        """Blocks ↔ the payload of each, all at once; a sum for each.

        To the kernels each block is a chunk of its own, so that it can be loaded alone.
        """
        segments = np.zeros((len(blocks), 4), np.int32)
        segments[:, 0], segments[:, 2] = blocks, self.tokens
        segments[:, 3] = np.arange(len(blocks))
        return self._prepared.move(verb, segments, payloads + self.offset, self.nbytes, len(blocks))


class SlotLayout:
    """How a chunk of one group lies in a slot of one rank; ``chunk_blocks``: blocks in a slot.

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
        """Size of a slot's payload."""

    def move(self, verb: Verb, chunks: Sequence[ChunkAt]) -> "SlotMove":
        """All blocks of ``chunks`` ↔ their payloads.

        Blocks that are NO_BLOCK are left out of a scatter and have no sum; to gather them raises
        GeometryError.
        """
        if verb == "gather":
            for blocks, _ in chunks:
                if NO_BLOCK in blocks:
                    raise GeometryError(f"blocks {list(blocks)} are not all there")
        found = self._places(chunks)
        return SlotMove([bundle.move(verb, *found) for bundle in self._bundles], len(found[0]))

    def put_sums(self, payload: np.ndarray, sums: np.ndarray) -> int:
        """Write the sums of all blocks after the blocks; returns the digest."""
        raw = sums.astype("<u8").tobytes()
        payload[self._sums_at : self.nbytes] = np.frombuffer(raw, np.uint8)
        return _digest(raw)

    def sums(self, payload: np.ndarray, digest: int) -> np.ndarray | None:
        """Sums of all blocks; None if they are not those of ``digest``."""
        raw = payload[self._sums_at : self.nbytes].tobytes()
        found = np.frombuffer(raw, "<u8")
        return found if _digest(raw) == digest else None

    def _places(self, chunks: Sequence[ChunkAt]) -> tuple[np.ndarray, np.ndarray]:
        """Blocks, and the address of the payload of each."""
        moved: list[int] = []
        places: list[int] = []
        for blocks, address in chunks:
            if len(blocks) != self.chunk_blocks:
                raise GeometryError(f"{len(blocks)} blocks for a chunk of {self.chunk_blocks}")
            for place, block in enumerate(blocks):
                if block != NO_BLOCK:
                    moved.append(block)
                    places.append(address + place * self.block_bytes)
        if moved and not 0 <= min(moved) <= max(moved) < self.num_blocks:
            raise GeometryError(f"blocks {moved} are not all in [0, {self.num_blocks})")
        return np.array(moved, np.int64), np.array(places, np.uint64)


class SlotMove:
    """``blocks`` under way, by one launch for each bundle."""

    def __init__(self, launches: Sequence[Launch], blocks: int) -> None:
        self._launches = launches
        self._blocks = blocks

    def done(self) -> bool:
        """Whether all bytes are written; raises TransportError if the device failed."""
        return all(launch.done() for launch in self._launches)

    def sums(self) -> np.ndarray:
        """uint64 ``[blocks]``, in their order; valid once done."""
        total = np.zeros(self._blocks, np.uint64)
        for launch in self._launches:
            total = total * _ODD + launch.sums
        return total


def slot_bytes(slot_layouts: Sequence[SlotLayout]) -> int:
    """What a slot must have for any of ``slot_layouts``."""
    return max(slot_layout.nbytes for slot_layout in slot_layouts)


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
