"""vLLM's KV cache tensors as BlockViews: the one place that knows its specs and backends.

Since vLLM 0.30 a layer is a strided view ``[B, H, N, C]`` whatever the physical layout
(``v1/kv_cache_interface.py`` create_kv_cache_views), where dense C is K and V side by side, or
MLA's one vector. The CPU backend reads the same bytes as ``[B, H, 2N, D]``, K before V, packed
for the ISA (``v1/attention/backends/cpu_attn.py`` forward): `kvconnect.vllm.probe` looks how.

* Content that no spec explains gets a layout of its own name and moves whole, between equals.
* Recurrent state (Mamba, linear attention, short convolutions) is one block a request and moves
  whole too: it is the state after the last token that prefill computed.
* A dtype that cannot be converted keeps vLLM's name.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from msgspec.structs import replace
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from kvconnect.blocks import DENSE, UNTILED, BlockView, Heads, Part, Region, Shard, Tile, held_heads
from kvconnect.errors import ConfigError
from kvconnect.vllm import _compat
from kvconnect.vllm.probe import Axis, Kernel, Packing, packings

logger = logging.getLogger("vllm.kvconnect")

# vLLM stores fp8 as bytes; of which format, the layer's kv_cache_dtype tells ("fp8" is e4m3 on
# CUDA and CPU). Other names are of packings or, fp8_inc, of Gaudi's own format.
FP8 = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ALL_TOKENS = 1 << 24  # of a block of recurrent state, whatever vLLM's block size says
MOST_ROW_BYTES = 1 << 16
STORED = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

_PartName = Literal["k", "v", "kv"]


class Place(NamedTuple):
    """This rank among the tensor-parallel ranks."""

    tp_rank: int
    tp_size: int


class _Cells(NamedTuple):
    """A layer's cache, strides in elements. A block is ``pieces`` kernel blocks of equal stride."""

    base: int
    item: int
    pieces: int
    heads: int
    tokens: int
    """Of a piece."""
    content: int
    piece_stride: int
    head_stride: int
    token_stride: int
    element_stride: int


class _Dtype(NamedTuple):
    """Of KV, by our name, or vLLM's where an element is no number by itself."""

    name: str
    numbers: bool
    scaled: bool = False


def describe(
    kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any, vllm_config: Any, place: Place
) -> Shard:
    """Views of all transferred layers of this rank; raises ConfigError for what cannot be."""
    views = []
    for index, layer, spec in _layers(kv_cache_config):
        if layer not in kv_caches:
            continue  # another pipeline stage's
        cache, num_blocks = kv_caches[layer], kv_cache_config.num_blocks
        _check(layer, spec, cache, num_blocks)
        module = vllm_config.compilation_config.static_forward_context.get(layer)
        if isinstance(spec, MambaSpec):
            views.append(_state(index, layer, spec, _cells(cache, num_blocks), num_blocks, place))
            continue
        dtype = _dtype(spec, module)
        layout, parts = _content(_cells(cache, num_blocks), spec, module, dtype, vllm_config)
        if layout != DENSE:
            logger.info("kvconnect: layer %s is packed (%s): for equal engines only", layer, layout)
            if _has_slots(spec):  # which are no heads: never cut
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


def _check(layer: str, spec: Any, cache: torch.Tensor, num_blocks: int) -> None:
    if isinstance(spec, MambaSpec):
        if spec.mamba_cache_mode != "none":
            raise ConfigError(
                f"layer {layer} keeps recurrent state in cache mode {spec.mamba_cache_mode!r}, of "
                "which KVConnectNixl cannot tell which block is the last; set "
                "--no-enable-prefix-caching"
            )
        if cache.dim() != 4 or cache.shape[1:3] != (1, 1):
            raise ConfigError(
                f"layer {layer}: recurrent state of shape {list(cache.shape)}, expected "
                "[B, 1, 1, bytes]; this vLLM is of another version, see docs/compat.md"
            )
    elif not isinstance(spec, AttentionSpec) or not getattr(spec, "has_layer_views", True):
        raise ConfigError(
            f"layer {layer} keeps {type(spec).__name__} state, which KVConnectNixl cannot hand "
            "over yet; serve this model without a KV connector or with vLLM's own"
        )
    elif getattr(spec, "tokens_per_state", 1) != 1:
        raise ConfigError(
            f"layer {layer} stores {spec.tokens_per_state} tokens per state, expected 1"
        )
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
    index: int, layer: str, spec: Any, cells: _Cells, num_blocks: int, place: Place
) -> BlockView:
    """Recurrent state: convolution and SSM state behind one another, cut by TP in its own ways."""
    shapes = ", ".join(
        f"{_name(dtype)}{list(shape)}"
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
        parts=(_packed(cells),),
    )


# -- content ----------------------------------------------------------------------------------


def _cells(cache: torch.Tensor, num_blocks: int) -> _Cells:
    _, heads, tokens, content = cache.shape
    pieces = cache.shape[0] // num_blocks
    item = cache.element_size()
    return _Cells(cache.data_ptr(), item, pieces, heads, tokens, content, *cache.stride())


def _has_slots(spec: Any) -> bool:
    """Whether H of the tensor is not one KV head each: nvfp4, b12x, ROCm."""
    return getattr(spec, "num_head_slots", None) is not None or spec.num_heads != spec.num_kv_heads


def _dtype(spec: Any, module: Any) -> _Dtype:
    """Of a layer: some keep the model's in an engine whose others are fp8."""
    if spec.dtype in FLOATS:
        return _Dtype(_name(spec.dtype), True)
    named = getattr(module, "kv_cache_dtype", None)  # the DeepSeek indexer's cache has none
    if named not in FP8:
        return _Dtype(str(named or _name(spec.dtype)), False)
    from vllm.platforms import current_platform

    if current_platform.is_fp8_fnuz():
        return _Dtype(f"{FP8[named]}fnuz", True)
    scales = [getattr(module, name, None) for name in ("_k_scale", "_v_scale")]
    if any(isinstance(s, torch.Tensor) and s.numel() > 1 for s in scales):
        return _Dtype(f"{FP8[named]} with a scale per head", True)
    return _Dtype(FP8[named], True, scaled=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _content(
    cells: _Cells, spec: Any, module: Any, dtype: _Dtype, vllm_config: Any
) -> tuple[str, tuple[Part, ...]]:
    """Layout and parts of a layer."""
    k, v = spec.head_size, spec.head_size_v
    explained = (
        dtype.numbers
        and not _has_slots(spec)
        and getattr(spec, "state_content_bytes", None) is None
        and k + v == cells.content
        and cells.pieces * cells.tokens == spec.block_size
    )
    backend = _backend(module)
    if backend == "CPU_ATTN":
        kernel = _kernel(cells, spec, module, dtype, vllm_config)
        layout = f"cpu:{kernel.isa}"
        found = packings(kernel, cells.tokens, k) if explained and k == v else None
    else:
        layout = f"packed by {backend}"
        row = Axis(cells.token_stride, UNTILED), Axis(cells.element_stride, UNTILED)
        found = (Packing(0, *row), Packing(k * cells.element_stride, *row)) if explained else None
    if found is None:
        return layout, (_packed(cells),)
    names: tuple[tuple[_PartName, int], ...] = (("k", k), ("v", v)) if v else (("kv", k),)
    parts = []
    for (name, size), packing in zip(names, found, strict=False):
        part = _part(cells, packing, name, size)
        if part is None:
            return layout, (_packed(cells),)
        parts.append(replace(part, scale=_scale(module, name)) if dtype.scaled else part)
    return DENSE, tuple(parts)


def _part(cells: _Cells, packing: Packing, name: _PartName, size: int) -> Part | None:
    """A part as ``packing`` has it in each piece; None where pieces need a tile of tiles."""
    tile = packing.token.tile
    if cells.pieces > 1:
        # tokens of the next piece: on in the same step, or in a tile of their own
        if tile.cells:
            if cells.tokens // tile.cells * tile.stride != cells.piece_stride:
                return None
        elif cells.tokens * packing.token.stride != cells.piece_stride:
            tile = Tile(cells.tokens, cells.piece_stride)
    block_stride = cells.pieces * cells.piece_stride
    strides = (block_stride, cells.head_stride, packing.token.stride, packing.content.stride)
    block, head, token, content = (s * cells.item for s in strides)
    return Part(
        base=cells.base + packing.start * cells.item,
        strides=(block, head, token, content),
        shape=(cells.heads, cells.pieces * cells.tokens, size),
        itemsize=cells.item,
        name=name,
        tiles=(_in_bytes(tile, cells.item), _in_bytes(packing.content.tile, cells.item)),
    )


def _in_bytes(tile: Tile, item: int) -> Tile:
    return Tile(tile.cells, tile.stride * item)


def _packed(cells: _Cells) -> Part:
    """All bytes of a head, or of its tokens where heads lie between them."""
    row = cells.content * cells.item
    pieces, tokens, nbytes = cells.pieces, cells.tokens, row
    tile, step = UNTILED, cells.token_stride * cells.item
    if cells.token_stride * cells.item == row or tokens == 1:
        tokens, nbytes, step = 1, cells.tokens * row, cells.piece_stride * cells.item
        if pieces == 1 and nbytes > MOST_ROW_BYTES:  # a row has to fit a staging slot
            step = math.gcd(nbytes, MOST_ROW_BYTES)
            tokens, nbytes = nbytes // step, step
    elif pieces > 1:
        tile = Tile(tokens, cells.piece_stride * cells.item)
    return Part(
        base=cells.base,
        strides=(pieces * cells.piece_stride * cells.item, cells.head_stride * cells.item, step, 1),
        shape=(cells.heads, pieces * tokens, nbytes),
        itemsize=1,
        tiles=(tile, UNTILED),
    )


def _scale(module: Any, name: _PartName) -> float:
    """vLLM's static scale; set when weights were loaded, before caches are registered."""
    side = "v" if name == "v" else "k"  # MLA's vector has K's
    return float(getattr(module, f"_{side}_scale_float", None) or 1.0)


def _backend(module: Any) -> str:
    return str(module.get_attn_backend().get_name()) if hasattr(module, "get_attn_backend") else ""


def _kernel(cells: _Cells, spec: Any, module: Any, dtype: _Dtype, vllm_config: Any) -> Kernel:
    """How the CPU backend was told to store this layer."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model_dtype = vllm_config.model_config.dtype
    cache_dtype = module.kv_cache_dtype
    # the backend's own metadata builder leaves it there
    isa = getattr(module, "isa", None) or _get_attn_isa(
        model_dtype, cells.tokens, spec.head_size, vllm_config.cache_config.cache_dtype
    )
    return Kernel(isa, model_dtype, cache_dtype, STORED.get(dtype.name, spec.dtype))


# -- heads and memory -------------------------------------------------------------------------


def _heads(spec: Any, vllm_config: Any, place: Place) -> Heads:
    slots = spec.num_heads
    if getattr(spec, "max_tp_shards", None) == 1:  # MLA: every rank holds the same
        return Heads(0, slots, slots)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if slots == model.get_num_kv_heads(parallel) and not _has_slots(spec):
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
