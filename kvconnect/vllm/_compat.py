"""Differences between vLLM 0.30 and 0.33, by what is there and never by version number."""

import importlib
from dataclasses import dataclass, field
from typing import Any


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"

# Since 0.30. Before, a failed load is told by the ids of its blocks.
_TransferResults = _find(_BASE, "KVConnectorTransferResults")
HAS_TRANSFER_RESULTS = _TransferResults is not None


@dataclass
class _OwnTransferResults:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


TransferResults = _TransferResults or _OwnTransferResults

# Since 0.32.
_CacheHitSource = _find("vllm.v1.metrics.cache_hit_source", "CacheHitSource")
CACHE_HIT_SOURCE = getattr(_CacheHitSource, "P2P", None)
HOST_HIT_SOURCE = getattr(_CacheHitSource, "HOST", None)

# Since 0.30 layouts are named over [L, B, H, N, C]; before, HND and NHD.
HEAD_MAJOR_LAYOUT = "LBHNC" if _find("vllm.v1.kv_cache_layout", "KVCacheLayout") else "HND"


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """KV cache groups whose state is handed over."""
    every = tuple(range(len(kv_cache_config.kv_cache_groups)))
    return tuple(getattr(kv_cache_config, "transfer_group_ids", every))


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The spec of one layer: unwraps UniformTypeKVCacheSpecs."""
    return getattr(group_spec, "kv_cache_specs", {}).get(layer, group_spec)
