"""What vLLM's block hashes stand for, and which tokens' KV may still change."""

import math
from typing import Any


def hash_seed() -> str:
    """Of the first hash of every request, as vLLM drew or read it."""
    from vllm.v1.core import kv_cache_utils

    return str(getattr(kv_cache_utils, "_NONE_HASH_SEED", None) or "")


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """How many tokens a hash of ``request.block_hashes`` stands for."""
    from vllm.v1.core import kv_cache_utils

    resolve = getattr(kv_cache_utils, "resolve_kv_cache_block_sizes", None)
    if resolve is not None:
        return int(resolve(kv_cache_config, vllm_config)[1])
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return math.gcd(*sizes)


def volatile_tokens(vllm_config: Any) -> int:
    """At the end of what was computed, tokens whose draft KV may be computed again."""
    speculative = vllm_config.speculative_config
    return speculative.num_speculative_tokens + 1 if speculative else 0
