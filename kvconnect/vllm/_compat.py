"""What we look for in vLLM that not every version or backend has, or that vLLM does not promise.

Differences between 0.30 and 0.33 are told by what is there and never by version number. Attributes
that only some KV cache specs and attention layers have are asked for here, and so are vLLM's
private names: docs/compat.md lists those. Whoever ports kvconnect to another vLLM begins here.
"""

import importlib
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch


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


_SPECS = "vllm.v1.kv_cache_interface"
_LATENT_SPECS = tuple(
    found
    for name in ("MLAAttentionSpec", "SlidingWindowMLASpec")
    if (found := _find(_SPECS, name)) is not None
)


def transfer_group_ids(kv_cache_config: Any) -> tuple[int, ...]:
    """KV cache groups whose state is handed over."""
    every = tuple(range(len(kv_cache_config.kv_cache_groups)))
    return tuple(getattr(kv_cache_config, "transfer_group_ids", every))


def block_bytes(group: Any) -> int:
    """About how large a block of a KV cache group is on this rank."""
    spec = group.kv_cache_spec
    layers = 1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names)
    return int(spec.page_size_bytes) * layers


def layer_spec(group_spec: Any, layer: str) -> Any:
    """The spec of one layer: unwraps UniformTypeKVCacheSpecs."""
    return getattr(group_spec, "kv_cache_specs", {}).get(layer, group_spec)


# -- of the scheduler -------------------------------------------------------------------------

NULL_BLOCK = 0  # vLLM's BlockPool takes block 0 as the placeholder of blocks it does not keep

_READ = ("has_finished_requests", "reset_prefix_cache", "get_request_counts", "pause_state")


def scheduler_class() -> Any:
    """The class whose methods say when vLLM has work; None where it is not as in 0.30 to 0.33."""
    found = _find("vllm.v1.core.sched.scheduler", "Scheduler")
    return found if all(hasattr(found, name) for name in _READ) else None


def is_paused(scheduler: Any) -> bool:
    """Whether new requests wait until the engine is resumed."""
    return bool(scheduler.pause_state.name != "UNPAUSED")


def blocks_in_use(block_pool: Any) -> int:
    """How many blocks are not free, the null block aside."""
    return int(block_pool.num_gpu_blocks - block_pool.get_num_free_blocks() - 1)


def shutdown_timeout_s(vllm_config: Any) -> float:
    """How long vLLM waits, at SIGTERM, before it kills the engine."""
    return float(getattr(vllm_config, "shutdown_timeout", 0))


# -- of the queues between its processes ------------------------------------------------------


def queue_wait_class() -> Any:
    """The class whose `wait` is what a process does until another one's message comes.

    None where it is not as in 0.30 to 0.33: it spins until `last_read` is a second ago, and sleeps
    after that until it is notified, for ``timeout_ms`` at most.
    """
    found = _find("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition")
    wait, read = getattr(found, "wait", None), getattr(found, "record_read", None)
    known = (
        inspect.isfunction(wait)
        and list(inspect.signature(wait).parameters) == ["self", "timeout_ms"]
        and inspect.isfunction(read)
        and "last_read" in read.__code__.co_names
    )
    return found if known else None


# -- of the API server ------------------------------------------------------------------------

_STREAMS = (
    ("chat_completion", "OpenAIServingChat", "chat_completion_stream_generator"),
    ("completion", "OpenAIServingCompletion", "completion_stream_generator"),
)


def stream_methods() -> list[tuple[Any, str]]:
    """Classes, and their methods that make the events of a stream of ``result_generator``."""
    found = []
    for api, owner, name in _STREAMS:
        served = _find(f"vllm.entrypoints.openai.{api}.serving", owner)
        method = getattr(served, name, None)
        if method is not None and "result_generator" in inspect.signature(method).parameters:
            found.append((served, name))
    return found


# -- of KV cache specs ------------------------------------------------------------------------


def has_layer_views(spec: Any) -> bool:
    """Whether each layer's cache is a tensor of its own."""
    return bool(getattr(spec, "has_layer_views", True))


def tokens_per_state(spec: Any) -> int:
    """How many tokens one entry of the cache stands for."""
    return int(getattr(spec, "tokens_per_state", 1))


def is_replicated(spec: Any) -> bool:
    """Whether every tensor-parallel rank holds the same (MLA)."""
    if hasattr(spec, "max_tp_shards"):
        return bool(spec.max_tp_shards == 1)
    return isinstance(spec, _LATENT_SPECS)  # before 0.31 the class alone says so


def has_head_slots(spec: Any) -> bool:
    """Whether what stands where heads do are slots of packed content."""
    return getattr(spec, "num_head_slots", None) is not None


def has_state_content(spec: Any) -> bool:
    """Whether the content of a token is not K and V alone."""
    return getattr(spec, "state_content_bytes", None) is not None


# -- of attention layers ----------------------------------------------------------------------


def cache_dtype(module: Any) -> str | None:
    """The layer's kv_cache_dtype; None for the DeepSeek indexer's cache, which has none."""
    return getattr(module, "kv_cache_dtype", None)


def has_scale_per_head(module: Any) -> bool:
    """Whether an fp8 layer has several scales."""
    scales = [getattr(module, name, None) for name in ("_k_scale", "_v_scale")]
    return any(isinstance(s, torch.Tensor) and s.numel() > 1 for s in scales)


def static_scale(module: Any, side: str) -> float:
    """The scale of K (``k``) or V (``v``) of an fp8 layer; 1 without one."""
    return float(getattr(module, f"_{side}_scale_float", None) or 1.0)


def cpu_attention_isa(
    module: Any, dtype: torch.dtype, tokens: int, head_size: int, cache_dtype: str
) -> str:
    """For which instructions the CPU backend packs a layer's blocks."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    left = getattr(module, "isa", None)  # by the backend's metadata builder, if that has run
    return left or str(_get_attn_isa(dtype, tokens, head_size, cache_dtype))


# -- of block hashes --------------------------------------------------------------------------


def hash_seed() -> str:
    """The seed of the first hash of every request; empty if it was not drawn yet."""
    from vllm.v1.core import kv_cache_utils

    return str(getattr(kv_cache_utils, "_NONE_HASH_SEED", None) or "")


def tokens_per_hash(vllm_config: Any, kv_cache_config: Any) -> int:
    """How many tokens a hash of ``request.block_hashes`` stands for."""
    from vllm.v1.core import kv_cache_utils

    resolve = getattr(kv_cache_utils, "resolve_kv_cache_block_sizes", None)
    if resolve is not None:
        return int(resolve(kv_cache_config, vllm_config)[1])
    return math.gcd(*(group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups))


# -- of KV events -----------------------------------------------------------------------------

_SPEC_KIND = _find(_SPECS, "get_kv_cache_spec_kind")
_SPEC_WINDOW = _find(_SPECS, "get_kv_cache_spec_sliding_window")
_UNTAGGED = _find("vllm.v1.core.kv_cache_utils", "to_event_extra_keys") or list


def event_fields_of_spec(spec: Any) -> dict[str, Any]:
    """What a BlockStored says of its group, where vLLM's own has it (0.32)."""
    fields: dict[str, Any] = {}
    if _SPEC_KIND is not None:
        fields["kv_cache_spec_kind"] = _SPEC_KIND(spec).value
    if _SPEC_WINDOW is not None:
        fields["kv_cache_spec_sliding_window"] = _SPEC_WINDOW(spec)
    return fields


def event_fields_of_request(request: Any, starts: range) -> dict[str, Any]:
    """What a BlockStored says of ``request``'s blocks that begin at the tokens ``starts``: what
    else than tokens their hashes are of, and in whose session they were saved."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, item = [], 0
    for start in starts:
        of_block, item = generate_block_hash_extra_keys(request, start, start + starts.step, item)
        keys.append(of_block)
    return {"extra_keys": _UNTAGGED(keys), "session_id": getattr(request, "session_id", None)}
