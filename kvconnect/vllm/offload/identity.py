"""What an engine's stored KV depends on, and into which chunks it is cut. Both halves agree."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.hits import Group
from kvconnect.offload.keys import Identity
from kvconnect.vllm import _compat
from kvconnect.vllm.fingerprint import fingerprint

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class Cut(NamedTuple):
    """Of one transferred KV cache group."""

    group_id: int
    """As vLLM counts groups."""
    block_tokens: int
    chunk_blocks: int
    group: Group


def cuts(kv_cache_config: Any, config: OffloadConfig) -> list[Cut]:
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
        found.append(Cut(group_id, block, tokens // block, Group(tokens, window)))
    return found


def identity(vllm_config: Any, cut: list[Cut], seed: str | None = None) -> Identity:
    """``seed``: of vLLM's block hashes; by default what every process of an engine knows of it."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    fields = fingerprint(vllm_config, None)
    text = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    commit = str(getattr(model.hf_config, "_commit_hash", None))  # of a hub's model
    if seed is None:
        seed = os.getenv("PYTHONHASHSEED", "")
    return Identity(
        model=fields["model"],
        revision=model.revision,
        config=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        rope=fields["positions"],
        dtype=str(model.dtype),
        kv_dtype=str(cache.cache_dtype),
        quantization=model.quantization,
        speculative=fields["speculative method"],
        block_tokens=cut[0].block_tokens,
        chunk_blocks=cut[0].chunk_blocks,
        hashing=f"{cache.prefix_caching_hash_algo} {seed}",
        more=(
            ("groups", repr([tuple(one) for one in cut])),
            ("sizes", fields["sizes"]),
            ("weights", weights_at(str(model.model)) or commit),
        ),
    )


def weights_at(place: str) -> str | None:
    """What tells weights from others that had the same name: a folder can be written anew.

    Of a folder or file, what is in it, by name, size and time; None if ``place`` is neither.
    """
    path = Path(place)
    try:
        files = [p for p in path.iterdir() if p.suffix in WEIGHTS] if path.is_dir() else [path]
        found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    except OSError:
        return None
    return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()
