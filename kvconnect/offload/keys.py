"""Names of stored KV: what it was computed from, as one digest of fixed size.

Two chunks of KV have one key only if everything that their numbers depend on is equal:

* of the engine, an `Identity`: weights, configuration, rope, dtypes, quantization, …;
* of the request, a `Context`: cache salt, LoRA adapter, multimodal items, and whatever else;
* of the chunk: vLLM's hash of its last block, which chains all tokens before it, its KV cache
  group, and where it ends.

What differs between ranks of one engine (TP shard, stage, layout, geometry) is the same for all
chunks of an arena, and is in its `arena_fingerprint` instead: the scheduler names a chunk once
for all ranks, and yet no slot of another shard is ever taken for it.

* A part that is absent is encoded as such: absent and empty never collide, and neither do parts
  that could be cut elsewhere ("ab", "c" and "a", "bc").
* `VERSION` is part of every key: another version's content is never found.
* Digests are keyed by nothing secret: who may write to an arena could forge any slot.
"""

import hashlib
from collections.abc import Mapping

import msgspec

VERSION = 2
KEY_BYTES = 32


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's KV depends on, the same for all requests and ranks. Texts are opaque."""

    model: str
    """Which weights: a digest of them, or the name that the user gave them; never a path's."""
    config: str
    """Digest of the model's configuration."""
    rope: str
    """Rope type, base and scaling, as overridden for this engine."""
    dtype: str
    """Dtype of the model's activations."""
    kv_dtype: str
    """As vLLM names the KV cache's, with its scales where they are static."""
    quantization: str | None
    speculative: str | None
    """Draft method: its layers are among the KV."""
    block_tokens: int
    """Tokens in a block that vLLM hashes."""
    chunk_blocks: int
    """How many blocks one key stands for."""
    hashing: str
    """Algorithm and seed of vLLM's block hashes: hashes of two seeds may not be compared."""
    more: tuple[tuple[str, str], ...] = ()
    """Anything else that tells engines apart, as (name, value)."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """A multimodal item of a prompt."""

    digest: str
    first_token: int


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's KV depends on besides its tokens."""

    cache_salt: str | None = None
    lora: str | None = None
    """The adapter's weights, not just its name: a name may be loaded again from elsewhere."""
    items: tuple[Item, ...] = ()
    more: tuple[tuple[str, str], ...] = ()


class ChunkKeys:
    """Keys of one engine's chunks."""

    def __init__(self, identity: Identity) -> None:
        self._start = hashlib.blake2b(digest_size=KEY_BYTES, person=b"kvconnect key")
        self._start.update(_encoded([VERSION, msgspec.to_builtins(identity)]))

    def of(self, context: Context) -> "RequestNames":
        """Keys of one request's chunks."""
        return RequestNames(self._start.copy(), context)


class RequestNames:
    """Keys of one request's chunks; made by `ChunkKeys.of`."""

    def __init__(self, start: "hashlib.blake2b", context: Context) -> None:
        start.update(_encoded([context.cache_salt, context.lora, context.more]))
        self._start = start
        self._items = sorted(context.items, key=lambda item: (item.first_token, item.digest))

    def key(self, block_hash: bytes, group: int, end_token: int) -> bytes:
        """The key of the chunk of ``group`` that ends before ``end_token`` in a block of this hash.

        Items that begin after the chunk do not matter to it.
        """
        items = [item for item in self._items if item.first_token < end_token]
        state = self._start.copy()
        state.update(_encoded([block_hash, group, end_token, items]))
        return state.digest()


def arena_fingerprint(identity: Identity, shard: Mapping[str, str]) -> bytes:
    """What all slots of an arena have in common. ``shard``: whatever tells ranks apart."""
    text = _encoded([VERSION, msgspec.to_builtins(identity), sorted(shard.items())])
    return hashlib.blake2b(text, digest_size=KEY_BYTES, person=b"kvconnect arena").digest()


def _encoded(value: object) -> bytes:
    """Lists, texts, bytes and numbers as bytes: one encoding for one value, lengths in front."""
    return msgspec.msgpack.encode(value, order="deterministic")
