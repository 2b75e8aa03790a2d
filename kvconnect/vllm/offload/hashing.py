"""What vLLM's block hashes stand for, and which tokens' KV may still change."""

from typing import Any

from kvconnect.vllm import _compat


def hash_seed() -> str:
    """The seed of the first hash of every request, as vLLM drew or read it."""
    return _compat.hash_seed()


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """How many tokens a hash of ``request.block_hashes`` stands for."""
    return _compat.tokens_per_hash(vllm_config, kv_cache_config)


def volatile_tokens(vllm_config: Any) -> int:
    """At the end of what was computed, tokens whose draft KV may be computed again."""
    speculative = vllm_config.speculative_config
    return speculative.num_speculative_tokens + 1 if speculative else 0
