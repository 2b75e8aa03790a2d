"""KV events of what is stored, for routers that follow them: BlockStored, BlockRemoved by medium.

A stored chunk is told by the hashes of its blocks, as vLLM's own events tell those on the device.
What was found at the start is told only once it has been stored again: its tokens are not known.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvconnect.offload.cache import CacheTier
from kvconnect.offload.eviction import Key
from kvconnect.vllm.offload.identity import Cut

MEDIA = {"host": MEDIUM_CPU, "disk": MEDIUM_STORAGE}


@dataclass
class _Told:
    hashes: list[Any]
    parent: Any
    tokens: list[int]
    lora: Any
    group_id: int
    media: set[str] = field(default_factory=set)


class Events:
    """``enabled`` by ``--kv-events-config``; else changes are only taken, and thrown away."""

    def __init__(self, vllm_config: Any, cuts: list[Cut], hash_tokens: int) -> None:
        config = vllm_config.kv_events_config
        self._enabled = config is not None and config.enable_kv_cache_events
        self._cuts = cuts
        self._hash_tokens = hash_tokens
        self._told: dict[Key, _Told] = {}

    def __len__(self) -> int:
        """Of how many chunks it knows what to tell."""
        return len(self._told)

    def saving(self, request: Any, key: Key, group: int, end_token: int) -> None:
        """The chunk of ``request`` that ends there is being saved as ``key``."""
        if not self._enabled:
            return
        cut = self._cuts[group]
        first = end_token - cut.group.chunk_tokens
        start, end = first // self._hash_tokens, end_token // self._hash_tokens
        before = self._told.get(key)
        self._told[key] = _Told(
            [maybe_convert_block_hash(one) for one in request.block_hashes[start:end]],
            maybe_convert_block_hash(request.block_hashes[start - 1]) if start else None,
            list(request.all_token_ids[first:end_token]),
            request.lora_request,
            cut.group_id,
            before.media if before else set(),
        )

    def not_saved(self, key: Key) -> None:
        """Nothing came of a save: what it was of is kept only if another medium holds it."""
        if key in self._told and not self._told[key].media:
            del self._told[key]

    def take(self, tiers: Iterable[CacheTier | None]) -> list[Any]:
        """What has changed since the last call."""
        found: list[Any] = []
        for tier in tiers:
            for key, held in tier.take_changes() if tier else ():
                told = self._told.get(key)
                if told is None:
                    continue
                medium = MEDIA[tier.name]  # type: ignore[union-attr]
                found.append(self._stored(told, medium) if held else _removed(told, medium))
                (told.media.add if held else told.media.discard)(medium)
                if not told.media:
                    del self._told[key]
        return found

    def _stored(self, told: _Told, medium: str) -> BlockStored:
        lora = told.lora
        return BlockStored(
            block_hashes=told.hashes,
            parent_block_hash=told.parent,
            token_ids=told.tokens,
            block_size=self._hash_tokens,
            lora_id=lora.adapter_id if lora else None,
            medium=medium,
            lora_name=lora.name if lora else None,
            group_idx=told.group_id,
        )


def _removed(told: _Told, medium: str) -> BlockRemoved:
    return BlockRemoved(block_hashes=told.hashes, medium=medium, group_idx=told.group_id)
