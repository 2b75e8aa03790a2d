"""vLLM's KV cache tensors as BlockViews: which layers there are, and whose heads.

Since vLLM 0.30 a layer is a strided view ``[B, H, N, C]`` whatever the physical layout
(``v1/kv_cache_interface.py`` create_kv_cache_views); `kvconnect.vllm.content` says what C holds.

* Content that no spec explains moves whole, between equals.
* Recurrent state (Mamba, linear attention, short convolutions) is one block a request and moves
  whole too: it is the state after the last token that prefill computed.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import DENSE, BlockView, Heads, Region, Shard, held_heads
from kvconnect.vllm import _compat
from kvconnect.vllm.cells import Cells, cells_of
from kvconnect.vllm.content import (
    content_of,
    dtype_of,
    has_slots,
    name_of,
    packed,
)

logger = logging.getLogger(f"vllm.{__name__}")

ALL_TOKENS = 1 << 24  # of a block of recurrent state, whatever vLLM's block size says


class TpRank(NamedTuple):
    """This rank among the tensor-parallel ranks."""

    tp_rank: int
    tp_size: int


def describe(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, vllm_config: Any, place: TpRank
) -> Shard:
    """Views of all transferred layers of this rank; raises ConfigError for what cannot be."""
    views = []
    for index, layer, spec in _layers(kv_cache_config):
        if layer not in kv_caches:
            continue  # another pipeline stage's
        cache, num_blocks = kv_caches[layer], kv_cache_config.num_blocks
        _check(layer, spec, cache, num_blocks, vllm_config.kv_transfer_config.kv_connector)
        module = vllm_config.compilation_config.static_forward_context.get(layer)
        if isinstance(spec, MambaSpec):
            views.append(_state(index, layer, spec, cells_of(cache, num_blocks), num_blocks, place))
            continue
        dtype = dtype_of(spec, module)
        layout, parts = content_of(cells_of(cache, num_blocks), spec, module, dtype, vllm_config)
        if layout != DENSE:
            logger.info("kvconnect: layer %s is packed (%s): for equal engines only", layer, layout)
            if has_slots(spec):  # which are no heads: never cut
                layout = f"{layout}, TP {place.tp_size}"
        views.append(
            BlockView(
                layer=layer,
                group=index,
                num_blocks=num_blocks,
                block_tokens=spec.block_size,
                heads=_heads(spec, vllm_config, place),
                dtype=dtype.name,
                layout=layout,
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


def _check(layer: str, spec: Any, cache: torch.Tensor, num_blocks: int, connector: str) -> None:
    """Raise ConfigError for what ``connector``, as the operator calls it, cannot handle."""
    if isinstance(spec, MambaSpec):
        if spec.mamba_cache_mode != "none":
            raise ConfigError(
                f"layer {layer} keeps recurrent state in cache mode {spec.mamba_cache_mode!r}, of "
                f"which {connector} cannot tell which block is the last; set "
                "--no-enable-prefix-caching"
            )
        if cache.dim() != 4 or cache.shape[1:3] != (1, 1):
            raise ConfigError(
                f"layer {layer}: recurrent state of shape {list(cache.shape)}, expected "
                "[B, 1, 1, bytes]; this vLLM is of another version, see docs/compat.md"
            )
    elif not isinstance(spec, AttentionSpec) or not _compat.has_layer_views(spec):
        raise ConfigError(
            f"layer {layer} keeps {type(spec).__name__} state, which {connector} cannot hand "
            "over or store yet; serve this model without a KV connector or with vLLM's own"
        )
    elif (tokens := _compat.tokens_per_state(spec)) != 1:
        raise ConfigError(f"layer {layer} stores {tokens} tokens per state, expected 1")
    if cache.dim() != 4:
        raise ConfigError(
            f"layer {layer}: KV cache of {cache.dim()} dimensions, expected [B, H, N, C]; "
            "this vLLM is older than 0.30, see docs/compat.md"
        )
    if cache.shape[0] % num_blocks:
        raise ConfigError(
            f"layer {layer}: {cache.shape[0]} kernel blocks for {num_blocks} blocks; "
            "set --block-size to the attention backend's own"
        )


def _state(
    index: int, layer: str, spec: Any, cells: Cells, num_blocks: int, place: TpRank
) -> BlockView:
    """Recurrent state: convolution state, then SSM state; TP cuts it in ways of its own."""
    shapes = ", ".join(
        f"{name_of(dtype)}{list(shape)}"
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    heads = Heads(0, 1, 1) if spec.tp_replicated else Heads(place.tp_rank, 1, place.tp_size)
    return BlockView(
        layer=layer,
        group=index,
        num_blocks=num_blocks,
        block_tokens=ALL_TOKENS,
        heads=heads,
        dtype="state",
        layout=f"state {shapes}"[:512],
        parts=(packed(cells),),
    )


# -- heads and memory -------------------------------------------------------------------------


def _heads(spec: Any, vllm_config: Any, place: TpRank) -> Heads:
    slots = spec.num_heads
    if _compat.is_replicated(spec):
        return Heads(0, slots, slots)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if slots == model.get_num_kv_heads(parallel) and not has_slots(spec):
        return held_heads(place.tp_rank, place.tp_size, model.get_total_num_kv_heads())
    return Heads(place.tp_rank * slots, slots, place.tp_size * slots)


def _regions(caches: list[torch.Tensor]) -> tuple[Region, ...]:
    found = {}
    for cache in caches:
        storage = cache.untyped_storage()
        start, nbytes = storage.data_ptr(), storage.nbytes()
        on_host = cache.device.type == "cpu"
        found[start] = (
            Region(start, nbytes) if on_host else Region(start, nbytes, "VRAM", cache.device.index)
        )
    return tuple(found.values())
