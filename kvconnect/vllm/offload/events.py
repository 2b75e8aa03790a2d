"""KV events of what is stored, for routers that follow them: BlockStored, BlockRemoved by medium.

An event names a stored chunk by the hashes of its blocks, as vLLM's own events name those on the
device, and says what a router needs to hash them itself and to tell windows from full attention.
What was found at the start has no event until it is stored again: its tokens are not known.
Work and memory grow with the chunks that are saved, not with the length of their prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvconnect.offload.cache import KeyChange
from kvconnect.offload.eviction import Key
from kvconnect.vllm import _compat
from kvconnect.vllm.offload.identity import GroupOffloadConfig

MEDIA = {"host": MEDIUM_CPU, "disk": MEDIUM_STORAGE}


@dataclass
class _SavedChunk:
    hashes: list[Any]
    parent: Any
    tokens: list[int]
    lora: Any
    group_id: int
    fields: dict[str, Any]
    media: set[str] = field(default_factory=set)


class Events:
    """Made where ``--kv-events-config`` asks for events."""

    def __init__(
        self, group_configs: list[GroupOffloadConfig], kv_cache_config: Any, hash_tokens: int
    ) -> None:
        self._group_configs = group_configs
        groups = [kv_cache_config.kv_cache_groups[config.group_id] for config in group_configs]
        self._of_specs = [
            _known(_compat.event_fields_of_spec(group.kv_cache_spec)) for group in groups
        ]
        self._hash_tokens = hash_tokens
        self._saved: dict[Key, _SavedChunk] = {}

    def __len__(self) -> int:
        """How many chunks have their tokens kept here."""
        return len(self._saved)

    def saving(self, request: Any, key: Key, group: int, end_token: int) -> None:
        """The chunk of ``request`` that ends there is being saved as ``key``."""
        config = self._group_configs[group]
        first = end_token - config.group.chunk_tokens
        start, end = first // self._hash_tokens, end_token // self._hash_tokens
        before = self._saved.get(key)
        self._saved[key] = _SavedChunk(
            [maybe_convert_block_hash(one) for one in request.block_hashes[start:end]],
            maybe_convert_block_hash(request.block_hashes[start - 1]) if start else None,
            list(request.all_token_ids[first:end_token]),
            request.lora_request,
            config.group_id,
            self._of_specs[group]
            | _known(
                _compat.event_fields_of_request(request, range(first, end_token, self._hash_tokens))
            ),
            before.media if before else set(),
        )

    def not_saved(self, key: Key) -> None:
        """Nothing came of a save: what it was of is kept only if another medium holds it."""
        if key in self._saved and not self._saved[key].media:
            del self._saved[key]

    def take(self, changes: Mapping[str, Sequence[KeyChange]]) -> list[Any]:
        """Events of what has changed in each tier, by its name."""
        found: list[Any] = []
        for tier, of_tier in changes.items():
            for key, held in of_tier:
                chunk = self._saved.get(key)
                if chunk is None:
                    continue
                medium = MEDIA[tier]
                found.append(self._stored(chunk, medium) if held else _removed(chunk, medium))
                (chunk.media.add if held else chunk.media.discard)(medium)
                if not chunk.media:
                    del self._saved[key]
        return found

    def _stored(self, chunk: _SavedChunk, medium: str) -> BlockStored:
        lora = chunk.lora
        return BlockStored(
            block_hashes=chunk.hashes,
            parent_block_hash=chunk.parent,
            token_ids=chunk.tokens,
            block_size=self._hash_tokens,
            lora_id=lora.adapter_id if lora else None,
            medium=medium,
            lora_name=lora.name if lora else None,
            group_idx=chunk.group_id,
            **chunk.fields,
        )


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this vLLM's event has."""
    return {k: v for k, v in fields.items() if k in BlockStored.__struct_fields__}


def _removed(chunk: _SavedChunk, medium: str) -> BlockRemoved:
    return BlockRemoved(block_hashes=chunk.hashes, medium=medium, group_idx=chunk.group_id)
