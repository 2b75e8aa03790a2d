"""What an engine's stored KV depends on, and into which chunks it is cut. Both halves agree."""

import hashlib
import json
import os
from typing import Any, NamedTuple

from msgspec.structs import replace
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.hits import Group
from kvconnect.offload.keys import Identity
from kvconnect.vllm import _compat
from kvconnect.vllm.fingerprint import all_weights, fingerprint

UNNAMED = "compared apart"


class GroupOffloadConfig(NamedTuple):
    """How one transferred KV cache group is cut into chunks."""

    group_id: int
    """As vLLM counts groups."""
    block_tokens: int
    chunk_blocks: int
    group: Group


def group_configs(kv_cache_config: Any, config: OffloadConfig) -> list[GroupOffloadConfig]:
    """How each transferred group is cut into chunks; raises ConfigError for what cannot be."""
    found = []
    for group_id in _compat.transfer_group_ids(kv_cache_config):
        spec = kv_cache_config.kv_cache_groups[group_id].kv_cache_spec
        each = getattr(spec, "kv_cache_specs", None)
        one = next(iter(each.values())) if each else spec
        window = None
        if isinstance(one, SlidingWindowSpec):
            window = one.sliding_window - 1  # the token that comes next is in its window itself
        elif not isinstance(one, FullAttentionSpec):
            raise ConfigError(
                f"KV cache group {group_id} keeps {type(one).__name__} state, which cannot be "
                "offloaded; serve this model without KVConnectOffloading"
            )
        block = spec.block_size
        tokens = config.block_size or block * (config.blocks_per_chunk or 1)
        if tokens % block:
            raise ConfigError(
                f"block_size is {tokens}, expected a multiple of the engine's {block}; both are "
                "in tokens"
            )
        found.append(GroupOffloadConfig(group_id, block, tokens // block, Group(tokens, window)))
    return found


def identity(
    vllm_config: Any,
    group_configs: list[GroupOffloadConfig],
    model_id: str | None = None,
    seed: str | None = None,
    unknown: str = "not known",
) -> Identity:
    """``seed``: of vLLM's block hashes; by default what every process of an engine knows of it.

    ``unknown``: what weights are called that are not known. An arena of them is not read by another
    engine, see `kept_apart`; keys, which say what is in it, are to be unlike any other's.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    fields = fingerprint(vllm_config, model_id or UNNAMED)
    if seed is None:
        seed = os.getenv("PYTHONHASHSEED", "")
    weights = {"weights": model_id} if model_id else _told_weights(vllm_config, unknown)
    return Identity(
        model=weights.pop("weights"),
        config=hashlib.blake2b(_config(model.hf_config).encode(), digest_size=16).hexdigest(),
        rope=fields["positions"],
        dtype=str(model.dtype),
        kv_dtype=str(cache.cache_dtype),
        quantization=model.quantization,
        speculative=fields["speculation"],
        block_tokens=group_configs[0].block_tokens,
        chunk_blocks=group_configs[0].chunk_blocks,
        hashing=f"{cache.prefix_caching_hash_algo} {seed}",
        more=(
            ("groups", repr([tuple(one) for one in group_configs])),
            ("model", "named" if model_id else "by content"),
            ("sizes", fields["sizes"]),
            *weights.items(),
        ),
    )


def kept_apart(config: OffloadConfig, vllm_config: Any) -> tuple[OffloadConfig, str]:
    """``config`` without persist and share where weights are not known; why they are not."""
    if config.model_id or not (config.persist or config.share):
        return config, ""
    for weights in all_weights(vllm_config).values():
        if not weights.known:
            alone = replace(config, persist=False, share=False, memory_path=None)
            return alone, weights.why_not
    return config, ""


def _told_weights(vllm_config: Any, unknown: str) -> dict[str, str]:
    return {name: one.digest or unknown for name, one in all_weights(vllm_config).items()}


def _config(hf_config: Any) -> str:
    """All of a model's config but where it is."""
    fields = {k: v for k, v in hf_config.to_dict().items() if k != "_name_or_path"}
    return json.dumps(fields, sort_keys=True, default=str)
