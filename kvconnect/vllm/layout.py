"""vLLM's KV cache tensors as BlockViews: the one place that knows its specs and backends.

Since vLLM 0.30 a layer is a strided view ``[B, H, N, C]`` whatever the physical layout
(``v1/kv_cache_interface.py`` create_kv_cache_views), with K and V side by side in C. The CPU
backend reads the same bytes as ``[B, H, 2N, D]``, K blocks before V blocks, in an order that
depends on the ISA (``v1/attention/backends/cpu_attn.py`` forward, ``csrc/cpu/cpu_attn_vec.hpp``).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from kvconnect.blocks import BlockView, Heads, Part, Region, Shard, held_heads
from kvconnect.errors import ConfigError
from kvconnect.vllm import _compat


class Place(NamedTuple):
    """This rank among the tensor-parallel ranks."""

    tp_rank: int
    tp_size: int


def describe(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, vllm_config: Any, place: Place
) -> Shard:
    """Views of all transferred layers of this rank; raises ConfigError for what cannot be."""
    views = []
    for index, layer, spec in _layers(kv_cache_config):
        if layer not in kv_caches:
            continue  # another pipeline stage's
        cache = kv_caches[layer]
        _check(layer, spec, cache)
        if cache.shape[0] % kv_cache_config.num_blocks:
            raise ConfigError(
                f"layer {layer}: {cache.shape[0]} kernel blocks for {kv_cache_config.num_blocks} "
                "blocks; set --block-size to the attention backend's own"
            )
        parts, content = _parts(cache, kv_cache_config.num_blocks, layer, vllm_config)
        if spec.num_heads != spec.num_kv_heads:  # head slots are not heads: never sliced
            content = f"{content} packed, TP {place.tp_size}"
        views.append(
            BlockView(
                layer=layer,
                group=index,
                num_blocks=kv_cache_config.num_blocks,
                block_tokens=spec.block_size,
                heads=_heads(spec, vllm_config, place),
                dtype=_dtype_name(vllm_config),
                layout=content,
                parts=parts,
            )
        )
    if not views:
        raise ConfigError("vLLM registered no KV cache that could be transferred")
    caches = [kv_caches[v.layer] for v in views]
    return Shard(tuple(views), _regions(caches), memory=tuple(caches))


def _layers(kv_cache_config: Any) -> Iterator[tuple[int, str, Any]]:
    """(index among the transferred groups, layer, its spec); aliases of shared KV are in none."""
    for index, group_id in enumerate(_compat.transfer_group_ids(kv_cache_config)):
        group = kv_cache_config.kv_cache_groups[group_id]
        for layer in group.layer_names:
            yield index, layer, _compat.layer_spec(group.kv_cache_spec, layer)


def _check(layer: str, spec: Any, cache: torch.Tensor) -> None:
    if not isinstance(spec, AttentionSpec) or not getattr(spec, "has_layer_views", True):
        raise ConfigError(
            f"layer {layer} keeps {type(spec).__name__} state, which KVConnectNixl cannot hand "
            "over yet; serve this model without a KV connector or with vLLM's own"
        )
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise ConfigError(
            f"layer {layer} stores {spec.tokens_per_state} tokens per state, expected 1"
        )
    if cache.dim() != 4:
        raise ConfigError(
            f"layer {layer}: KV cache of {cache.dim()} dimensions, expected [B, H, N, C]; "
            "this vLLM is older than 0.30, see docs/compat.md"
        )


def _parts(
    cache: torch.Tensor, num_blocks: int, layer: str, vllm_config: Any
) -> tuple[tuple[Part, ...], str]:
    """Parts of a layer and the name of its content."""
    item = cache.element_size()
    kernel_blocks = cache.shape[0] // num_blocks
    block, head, token, element = (s * item for s in cache.stride())
    _, heads, tokens, content = cache.shape
    # kernel blocks are equal pieces of a block: one part each
    bases = [cache.data_ptr() + i * block for i in range(kernel_blocks)]
    block *= kernel_blocks
    isa = _cpu_isa(layer, vllm_config)
    if isa is None:
        shape, strides = (heads, tokens, content), (block, head, token, element)
        return tuple(Part(b, strides, shape, item) for b in bases), "dense"
    if isa not in ("vec", "vec16"):  # packed for the ISA: only whole heads of a block can be moved
        shape, strides = (heads, 1, tokens * content * item), (block, head, 0, 1)
        return tuple(Part(b, strides, shape, 1) for b in bases), f"cpu:{isa}"
    size = content // 2
    k = (block, head, item, tokens * item)  # K is column-major: [head_dim, token]
    v = (block, head, size * item, item)
    return tuple(
        Part(base + offset, strides, (heads, tokens, size), item)
        for base in bases
        for offset, strides in ((0, k), (tokens * size * item, v))
    ), f"cpu:{isa}"


def _cpu_isa(layer: str, vllm_config: Any) -> str | None:
    """Under which ISA the CPU attention backend packs a layer's KV; None for other backends."""
    module = vllm_config.compilation_config.static_forward_context.get(layer)
    backend = module.get_attn_backend() if hasattr(module, "get_attn_backend") else None
    if backend is None or backend.get_name() != "CPU_ATTN":
        return None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    # as the backend's own metadata builder asks (cpu_attn.py CPUAttentionMetadataBuilder)
    return _get_attn_isa(
        vllm_config.model_config.dtype,
        vllm_config.cache_config.block_size,
        module.head_size,
        vllm_config.cache_config.cache_dtype,
    )


def _heads(spec: Any, vllm_config: Any, place: Place) -> Heads:
    slots = spec.num_heads
    if getattr(spec, "max_tp_shards", None) == 1:  # MLA: every rank holds the same
        return Heads(0, slots, slots)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if slots == model.get_num_kv_heads(parallel):
        return held_heads(place.tp_rank, place.tp_size, model.get_total_num_kv_heads())
    return Heads(place.tp_rank * slots, slots, place.tp_size * slots)


def _dtype_name(vllm_config: Any) -> str:
    cache_dtype = vllm_config.cache_config.cache_dtype
    return str(vllm_config.model_config.dtype) if cache_dtype == "auto" else str(cache_dtype)


def _regions(caches: list[torch.Tensor]) -> tuple[Region, ...]:
    found = {}
    for cache in caches:
        storage = cache.untyped_storage()
        kind, device = ("DRAM", 0) if cache.device.type == "cpu" else ("VRAM", cache.device.index)
        found[storage.data_ptr()] = Region(storage.data_ptr(), storage.nbytes(), kind, device)
    return tuple(found.values())
