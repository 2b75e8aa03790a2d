"""vLLM's KV events: which blocks one rank of an engine holds, by what it publishes.

Does not know sockets (``kv_subscriber``), nor the proxy's prompts. Reads what
``--kv-events-config`` publishes (vllm/distributed/kv_events.py): batches ``[time, events, rank]``
in msgpack. An event is a map with its ``type``, or in older versions an array that begins with it;
fields that we do not name are passed over, and so is an event that we cannot read.

- Engines hash blocks in ways of their own, so a block is known here by a digest of its tokens and
  those before it, and of the adapter's name. A block whose beginning was stored before we listened
  is not known, nor one that depends on more than its tokens: media, a salt, embeddings.
- Only groups of layers that attend to all tokens tell how far a prompt is held; device memory and
  tiers behind it count alike.
- Bounded: `REMEMBERED_BLOCKS`, the newest. What is not known counts as not held.
"""

import functools
import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

REMEMBERED_BLOCKS = 131_072
_MOST_NAMES = 1024
_MOST_BLOCK_SIZES = 4
_LATELY_ASKED = 16  # prompts
_ALL_TOKENS = (None, "full_attention", "mla_attention", "sink_full_attention")

_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
_Hash = int | bytes
# In the order of their first appearance in vLLM: an array's elements have no names.
_STORED: list[Any] = [
    ("block_hashes", list[_Hash]),
    ("parent_block_hash", _Hash | None),
    ("token_ids", list[_TokenId]),
    ("block_size", Annotated[int, msgspec.Meta(gt=0)]),
    ("lora_id", int | None, None),
    ("medium", str | None, None),
    ("lora_name", str | None, None),
    ("extra_keys", list[list[Any] | None] | None, None),
    ("group_idx", int | None, None),
    ("kv_cache_spec_kind", str | None, None),
]
_REMOVED: list[Any] = [
    ("block_hashes", list[_Hash]),
    ("medium", str | None, None),
    ("group_idx", int | None, None),
]
_KINDS = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": []}


def _decoder(arrays: bool) -> msgspec.msgpack.Decoder[Any]:
    kinds = [
        msgspec.defstruct(name, fields, tag=name, array_like=arrays)
        for name, fields in _KINDS.items()
    ]
    return msgspec.msgpack.Decoder(kinds[0] | kinds[1] | kinds[2])


_MAPS, _ARRAYS = _decoder(arrays=False), _decoder(arrays=True)
_ARRAY_BYTES = (*range(0x90, 0xA0), 0xDC, 0xDD)  # how a msgpack array may begin


class _EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[msgspec.Raw]


_BATCH = msgspec.msgpack.Decoder(_EventBatch)


class _Place(NamedTuple):
    """Where an engine says that a block is."""

    block_hash: _Hash
    group: int | None
    medium: str | None


class RankBlocks:
    """What one rank holds, and in which order it has told so."""

    def __init__(self) -> None:
        self.block_sizes: set[int] = set()
        """Tokens of a block, as it said."""
        self._places: OrderedDict[_Place, bytes] = OrderedDict()
        self._held: Counter[bytes] = Counter()  # by digest: in so many places
        self._adapters: set[str] = set()
        self._next: int | None = None

    @property
    def tells(self) -> bool:
        """Whether it has told anything since it was connected."""
        return self._next is not None

    def clear(self) -> None:
        """Nothing is known of it any more: it was connected anew, or a batch was lost."""
        self._forget_blocks()
        self._next = None

    def hear(self, sequence: int, payload: bytes) -> None:
        """The batch with this number; what cannot be read is passed over."""
        if sequence != self._next:
            self.clear()
        self._next = sequence + 1
        try:
            events = _BATCH.decode(payload).events
        except (ValueError, RecursionError):
            self._forget_blocks()  # it may have been of blocks that are gone
            return
        for raw in events:
            decoder = _ARRAYS if bytes(raw)[0] in _ARRAY_BYTES else _MAPS
            try:
                event = decoder.decode(raw)
            except (ValueError, RecursionError):
                continue
            self._apply(event)

    def held(self, tokens: "array[int]", adapter: str | None) -> int:
        """How many of a prompt's first tokens it holds.

        ``adapter``: name of the model that was asked for, which may be that of an adapter.
        """
        root = _root(adapter if adapter in self._adapters else None)
        data = tokens.tobytes()
        return max((self._chained(data, size, root) for size in self.block_sizes), default=0)

    def _chained(self, tokens: bytes, size: int, root: bytes) -> int:
        digests = _prompt_digests(tokens, size, root)
        lost = (number for number, digest in enumerate(digests) if digest not in self._held)
        return next(lost, len(digests)) * size

    def _apply(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            self._forget_blocks()
        elif kind == "BlockRemoved":
            for block_hash in event.block_hashes:
                self._drop(_Place(block_hash, event.group_idx, event.medium))
        elif event.kv_cache_spec_kind in _ALL_TOKENS and _by_tokens_alone(event):
            self._store(event)

    def _store(self, event: Any) -> None:
        size, hashes = event.block_size, event.block_hashes
        new_size = size not in self.block_sizes
        if len(event.token_ids) != size * len(hashes):
            return
        if new_size and len(self.block_sizes) >= _MOST_BLOCK_SIZES:
            return
        digest: bytes | None = _root(event.lora_name)
        if event.parent_block_hash is not None:
            parent = _Place(event.parent_block_hash, event.group_idx, event.medium)
            digest = self._places.get(parent)
        if digest is None:
            return
        self.block_sizes.add(size)
        if event.lora_name and len(self._adapters) < _MOST_NAMES:
            self._adapters.add(event.lora_name)
        digests = _digests(array("I", event.token_ids).tobytes(), size, digest)
        for block_hash, block_digest in zip(hashes, digests, strict=True):
            place = _Place(block_hash, event.group_idx, event.medium)
            self._drop(place)
            self._places[place] = block_digest
            self._held[block_digest] += 1
        while len(self._places) > REMEMBERED_BLOCKS:
            self._drop(next(iter(self._places)))

    def _drop(self, place: _Place) -> None:
        if (digest := self._places.pop(place, None)) is None:
            return
        self._held[digest] -= 1
        if not self._held[digest]:
            del self._held[digest]

    def _forget_blocks(self) -> None:
        self._places.clear()
        self._held.clear()


def _root(adapter: str | None) -> bytes:
    return (adapter or "").encode()


def _digests(tokens: bytes, size: int, digest: bytes) -> Iterator[bytes]:
    """Of each whole block of ``size`` tokens and those before it; ``digest``: of what is before."""
    step = size * array("I").itemsize
    for at in range(0, len(tokens) - step + 1, step):
        block = tokens[at : at + step]
        digest = hashlib.blake2b(digest + b"\0" + block, digest_size=16).digest()
        yield digest


@functools.lru_cache(_LATELY_ASKED)
def _prompt_digests(tokens: bytes, size: int, root: bytes) -> tuple[bytes, ...]:
    """Kept: a prompt is compared with each rank of each engine, several times."""
    return tuple(_digests(tokens, size, root))


def _by_tokens_alone(event: Any) -> bool:
    """Whether a block's keys name nothing but the adapter."""
    names: tuple[list[Any], ...] = ([], [event.lora_name])
    return all(keys is None or keys in names for keys in event.extra_keys or ())
