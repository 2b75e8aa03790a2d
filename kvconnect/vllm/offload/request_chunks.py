"""A request, as the offloading scheduler follows it: keys of its chunks, and what was offered."""

import logging
from typing import Any

from kvconnect.offload.eviction import Key
from kvconnect.offload.keys import ChunkKeys, Context, Item
from kvconnect.vllm.offload.identity import GroupOffloadConfig

logger = logging.getLogger(f"vllm.{__name__}")

NO_LIMIT = 1 << 62


class RequestChunks:
    """One request; see the module. ``hash_tokens``: how many a block hash stands for.

    ``adapter``: the digest of the request's; "" if it is not known: nothing is stored or loaded.
    """

    def __init__(
        self,
        request: Any,
        chunk_keys: ChunkKeys,
        group_configs: list[GroupOffloadConfig],
        hash_tokens: int,
        adapter: str | None = None,
    ) -> None:
        self.request = request
        self.local_tokens = 0
        """Cached by the engine itself, as it said when it last asked."""
        self.no_loads = False
        """A load has failed; another would too, and the request must get on."""
        self.looked = False
        """Whether the workers were given a step to say what other engines hold."""
        self.counted = False
        """Whether it was counted what of the prompt is nowhere."""
        self.offered = [0] * len(group_configs)
        """Per group, chunks from the first on that were offered to be stored."""
        self.next_end = 0
        """Tokens at which the first chunk ends that was not."""
        self.most_tokens = _limit(request, "max_offload_tokens")
        """How many of the request's tokens may be stored, as its client says."""
        self.most_loaded = _limit(request, "max_load_tokens")
        """How many may be loaded, beyond those that the engine itself has."""
        self._chunk_keys = chunk_keys.of(_context(request, adapter))
        self._known_adapter = adapter != ""
        self._group_configs = group_configs
        self._hash_tokens = hash_tokens
        self._keys: list[list[Key]] = [[] for _ in group_configs]
        self._known = 0  # hashes of which keys were made, and the last of them
        self._last = b""

    def keys(self) -> list[list[Key]]:
        """Per group, of all chunks whose tokens are known."""
        if not self._known_adapter:
            return self._keys
        hashes = self.request.block_hashes
        known = self._known
        if known and (len(hashes) < known or hashes[known - 1] != self._last):
            self._keys = [[] for _ in self._group_configs]  # a session took back what it had said
            self._known = known = 0
        if len(hashes) > known:
            self._known, self._last = len(hashes), hashes[-1]
            for at, (config, keys) in enumerate(zip(self._group_configs, self._keys, strict=True)):
                tokens = config.group.chunk_tokens
                per_chunk = tokens // self._hash_tokens
                for chunk in range(len(keys), len(hashes) // per_chunk):
                    last = hashes[(chunk + 1) * per_chunk - 1]  # it chains all before it
                    keys.append(self._chunk_keys.key(last, at, (chunk + 1) * tokens))
        return self._keys

    def in_order(self) -> list[Key]:
        """All keys that were asked for, as their chunks end, of all groups."""
        found = [
            ((chunk + 1) * config.group.chunk_tokens, at, key)
            for at, (config, keys) in enumerate(zip(self._group_configs, self._keys, strict=True))
            for chunk, key in enumerate(keys)
        ]
        return [key for _, _, key in sorted(found)]


def _context(request: Any, adapter: str | None) -> Context:
    items = tuple(
        Item(str(feature.identifier), feature.mm_position.offset)
        for feature in request.mm_features or ()
    )
    return Context(cache_salt=request.cache_salt, lora=adapter, items=items)


def _limit(request: Any, name: str) -> int:
    """What the request's ``kv_transfer_params`` say under ``name``; NO_LIMIT if nothing."""
    params = request.kv_transfer_params
    asked = params.get(name) if isinstance(params, dict) else None
    if asked is None:
        return NO_LIMIT
    if isinstance(asked, float) and asked.is_integer():
        asked = int(asked)  # numbers that went through a router
    if type(asked) is int and asked >= 0:
        return asked
    logger.warning(
        "request %s: %s is %.100r, expected a whole number; it is ignored",
        request.request_id,
        name,
        asked,
    )
    return NO_LIMIT
