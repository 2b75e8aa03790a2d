"""What `describe` says of vLLM's caches is where vLLM puts K and V."""

import platform
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1 import kv_cache_interface as kvi
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvconnect.errors import ConfigError, GeometryError
from kvconnect.geometry.blocks import DENSE, UNTILED, Heads, Part, Tile, check_views, part_extent
from kvconnect.geometry.intersect import assign
from kvconnect.vllm import probe
from kvconnect.vllm.content import Cells, packed
from kvconnect.vllm.layout import TpRank, describe

BLOCKS, LAYERS = 3, ("model.layers.0.attn", "model.layers.1.attn")
ALONE = TpRank(0, 1)
FULL = kvi.FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
REPLICATED = {"max_tp_shards": 1} if hasattr(kvi.AttentionSpec, "max_tp_shards") else {}  # 0.31
MLA = kvi.MLAAttentionSpec(
    block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, **REPLICATED
)


def module(backend="FLASH_ATTN", **attributes):
    """An attention layer, as far as it says how it stores."""
    attributes = {"kv_cache_dtype": "auto"} | attributes
    named = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(get_attn_backend=lambda: named, **attributes)


def caches(spec, layout=KVCacheLayout.LBHNC, kernel_tokens=None):
    """vLLM's own views of one allocation of random bytes."""
    strides = kvi.compute_layout_strides(spec, BLOCKS, len(LAYERS), layout, None)
    size = BLOCKS * len(LAYERS) * spec.page_size_bytes
    raw = torch.randint(-128, 128, (size,), dtype=torch.int8)
    tensor = kvi.KVCacheTensor(size, list(LAYERS), strides[0], strides[1])
    views = kvi.create_kv_cache_views(raw, spec, BLOCKS, layout, tensor, kernel_tokens)
    return dict(zip(LAYERS, views, strict=True))


def views_of(tensors, spec, layer=None, *, heads=2, place=ALONE, dtype=torch.bfloat16, total=None):
    layer = layer or module()
    config = SimpleNamespace(
        num_blocks=BLOCKS,
        kv_cache_groups=[SimpleNamespace(layer_names=list(LAYERS), kv_cache_spec=spec)],
    )
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(LAYERS, layer)),
        model_config=SimpleNamespace(
            dtype=dtype,
            get_num_kv_heads=lambda _: heads,
            get_total_num_kv_heads=lambda: total or heads * place.tp_size,
        ),
        cache_config=SimpleNamespace(cache_dtype=layer.kv_cache_dtype),
        parallel_config=None,
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
    )
    shard = describe(tensors, config, vllm_config, place)
    check_views(shard.views, shard.regions)
    return shard.views


def addresses(part: Part) -> np.ndarray:
    """Of all cells ``[block, head, token, content]``."""
    found = np.array(part.base)
    axes = [(BLOCKS, part.strides[0], UNTILED), (part.shape[0], part.strides[1], UNTILED)]
    axes += list(zip(part.shape[1:], part.strides[2:], part.tiles, strict=True))
    for count, stride, tile in axes:
        cell = np.arange(count)
        at = cell * stride
        if tile.cells:
            at = cell // tile.cells * tile.stride + cell % tile.cells * stride
        found = found[..., None] + at
    return found


def held(part: Part, cache: torch.Tensor) -> torch.Tensor:
    """All cells ``[block, head, token, content]``, as bytes of the cache's allocation."""
    storage = cache.untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)
    start = torch.from_numpy(addresses(part) - storage.data_ptr())
    return raw[start[..., None] + torch.arange(part.itemsize)]


def as_bytes(cells: torch.Tensor) -> torch.Tensor:
    cells = cells.contiguous()
    return cells.view(torch.uint8).reshape(*cells.shape, cells.element_size())


def in_blocks(cache: torch.Tensor) -> torch.Tensor:
    """The cache ``[block, head, token, content]``, its kernel blocks joined."""
    pieces = cache.unflatten(0, (BLOCKS, -1))
    return pieces.permute(0, 2, 1, 3, 4).flatten(2, 3)


# -- rows of tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda x: x.name)
@pytest.mark.parametrize("values", [32, 16], ids=lambda n: f"V of {n}")
def test_k_and_v_are_two_parts_of_a_tokens_row(layout, values):
    spec = replace(FULL, head_size_v=values)
    tensors = caches(spec, layout)
    for view in views_of(tensors, spec):
        k, v = view.parts
        assert view.layout == DENSE and view.dtype == "bfloat16" and view.block_tokens == 64
        assert (k.name, v.name) == ("k", "v")
        cache = tensors[view.layer]
        assert torch.equal(held(k, cache), as_bytes(cache[..., :32]))
        assert torch.equal(held(v, cache), as_bytes(cache[..., 32:]))


def test_heads_are_those_of_the_rank_where_neighbours_hold_the_same_too():
    tensors = caches(FULL)
    (view, _) = views_of(tensors, FULL, place=TpRank(1, 2))
    assert view.heads == Heads(2, 2, 4)
    one = replace(FULL, num_kv_heads=1)
    (view, _) = views_of(caches(one), one, heads=1, total=2, place=TpRank(3, 4))
    assert view.heads == Heads(1, 1, 2)


def test_heads_of_a_layer_that_has_others_than_the_model_are_its_own():
    """As a draft's."""
    (view, _) = views_of(caches(FULL), FULL, heads=1, total=2, place=TpRank(1, 2))
    assert view.heads == Heads(2, 2, 4)


class WithoutViews(kvi.FullAttentionSpec):
    """As those of vLLM whose tensors are of more than one layer."""

    has_layer_views = False


def test_caches_that_are_no_layers_own_are_refused():
    fields = {"block_size": 64, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    with pytest.raises(ConfigError, match="WithoutViews state"):
        views_of(caches(FULL), WithoutViews(**fields))
    with pytest.raises(ConfigError, match="4 tokens per state"):
        views_of(caches(FULL), replace(FULL, tokens_per_state=4))


def test_caches_of_another_vllm_are_refused():
    flat = {name: cache.flatten(2) for name, cache in caches(FULL).items()}
    with pytest.raises(ConfigError, match=r"of 3 dimensions, expected \[B, H, N, C\]"):
        views_of(flat, FULL)
    fewer = {name: cache[1:] for name, cache in caches(FULL, kernel_tokens=16).items()}
    with pytest.raises(ConfigError, match="11 kernel blocks for 3 blocks; set --block-size"):
        views_of(fewer, FULL)


def test_latent_attention_is_one_part_that_all_ranks_hold():
    tensors = caches(MLA)
    (view, _) = views_of(tensors, MLA, heads=1, place=TpRank(3, 4))
    (part,) = view.parts
    assert part.name == "kv" and part.shape == (1, 16, 576) and view.heads == Heads(0, 1, 1)
    assert torch.equal(held(part, tensors[view.layer]), as_bytes(tensors[view.layer]))


def test_groups_are_counted_as_they_are_transferred_and_other_stages_layers_are_left_out():
    """A layer may have a spec of its own in its group."""
    names = [f"model.layers.{i}.attn" for i in range(8)]
    other = replace(FULL, head_size=64, head_size_v=64, block_size=32)
    of_each = dict(zip(names[4:6], (FULL, other), strict=True))
    groups = [
        SimpleNamespace(layer_names=names[:2], kv_cache_spec=FULL),
        SimpleNamespace(layer_names=names[2:4], kv_cache_spec=FULL),
        SimpleNamespace(
            layer_names=names[4:6],
            kv_cache_spec=SimpleNamespace(kv_cache_specs=of_each, block_size=64),
        ),
        SimpleNamespace(layer_names=names[6:], kv_cache_spec=FULL),
    ]
    config = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=groups, transfer_group_ids=(1, 2))
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(names, module())),
        model_config=SimpleNamespace(
            get_num_kv_heads=lambda _: 2, get_total_num_kv_heads=lambda: 2
        ),
        parallel_config=None,
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
    )
    tensors = dict(zip(names[:2], caches(FULL).values(), strict=True))
    tensors[names[3]] = caches(FULL)[LAYERS[0]]
    tensors[names[4]] = caches(FULL)[LAYERS[1]]
    tensors[names[5]] = caches(other)[LAYERS[0]]
    shard = describe(tensors, config, vllm_config, ALONE)
    check_views(shard.views, shard.regions)
    found = [
        (view.layer, view.group, view.block_tokens, view.parts[0].shape) for view in shard.views
    ]
    assert found == [
        (names[3], 0, 64, (2, 64, 32)),
        (names[4], 1, 64, (2, 64, 32)),
        (names[5], 1, 32, (2, 32, 64)),
    ]
    held_by = [cache.untyped_storage() for name, cache in tensors.items() if name in names[3:6]]
    assert [(one.address, one.nbytes) for one in shard.regions] == [
        (storage.data_ptr(), storage.nbytes()) for storage in held_by
    ]
    assert [view.data_ptr() for view in shard.memory] == [tensors[n].data_ptr() for n in names[3:6]]


def test_layers_of_one_allocation_are_one_region_of_it_all():
    tensors = caches(FULL, KVCacheLayout.LBNHC)
    config = SimpleNamespace(
        num_blocks=BLOCKS,
        kv_cache_groups=[SimpleNamespace(layer_names=LAYERS, kv_cache_spec=FULL)],
    )
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        model_config=SimpleNamespace(
            get_num_kv_heads=lambda _: 2, get_total_num_kv_heads=lambda: 2
        ),
        parallel_config=None,
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
    )
    (region,) = describe(tensors, config, vllm_config, ALONE).regions
    assert region.nbytes == BLOCKS * len(LAYERS) * FULL.page_size_bytes
    with pytest.raises(ConfigError, match="no KV cache that could be transferred"):
        describe({}, config, vllm_config, ALONE)


def test_kernel_blocks_become_tiles_of_tokens():
    tensors = caches(FULL, kernel_tokens=16)
    assert tensors[LAYERS[0]].shape[0] == 4 * BLOCKS
    for view in views_of(tensors, FULL):
        whole = in_blocks(tensors[view.layer])
        for part, cells in zip(view.parts, (whole[..., :32], whole[..., 32:]), strict=True):
            assert part.tiles == (Tile(16, 16 * 2 * 64 * 2), UNTILED) and part.shape[1] == 64
            assert torch.equal(held(part, tensors[view.layer]), as_bytes(cells))


def test_kernel_blocks_whose_tokens_go_on_are_not_tiled():
    tensors = caches(FULL, KVCacheLayout.LBNHC, kernel_tokens=16)
    for view in views_of(tensors, FULL):
        assert [part.tiles for part in view.parts] == [(UNTILED, UNTILED)] * 2
        whole = in_blocks(tensors[view.layer])
        assert torch.equal(held(view.parts[1], tensors[view.layer]), as_bytes(whole[..., 32:]))


# -- dtypes and scales ------------------------------------------------------------------------

FP8 = replace(FULL, dtype=torch.uint8, kv_quant_mode=kvi.KVQuantMode.FP8_PER_TENSOR)


@pytest.mark.parametrize(
    ("named", "ours"),
    [("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2")],
)
def test_fp8_has_its_format_and_the_layers_scales(named, ours):
    layer = module(kv_cache_dtype=named, _k_scale_float=0.5, _v_scale_float=0.25)
    view, _ = views_of(caches(FP8), FP8, layer)
    assert view.dtype == ours
    assert [part.scale for part in view.parts] == [0.5, 0.25]


def test_latent_attentions_vector_has_the_scale_of_k():
    spec = replace(MLA, dtype=torch.uint8)
    layer = module(kv_cache_dtype="fp8", _k_scale_float=0.5, _v_scale_float=0.25)
    view, _ = views_of(caches(spec), spec, layer)
    assert [(part.name, part.scale) for part in view.parts] == [("kv", 0.5)]


def test_a_layer_that_keeps_the_models_dtype_among_fp8_ones_says_so():
    layer = module(_k_scale_float=0.5)
    view, _ = views_of(caches(FULL), FULL, layer)
    assert (view.dtype, view.parts[0].scale) == ("bfloat16", 1.0)


def test_scales_of_single_heads_are_not_converted():
    for name in ("_k_scale", "_v_scale"):
        layer = module(kv_cache_dtype="fp8", _k_scale_float=1.0, **{name: torch.ones(2)})
        view, _ = views_of(caches(FP8), FP8, layer)
        assert view.layout == DENSE and view.dtype == "fp8_e4m3 with a scale per head"


# -- packed -----------------------------------------------------------------------------------

PACKED = {
    # K heads, then V heads; the heads of the tensor are no KV heads, even where they are as many
    "slots": (replace(FP8, num_head_slots=4, state_content_bytes=20), "nvfp4", ", TP 2", "nvfp4"),
    "as many slots": (replace(FULL, num_head_slots=2), "auto", ", TP 2", "bfloat16"),
    "scales inside": (replace(FP8, state_content_bytes=72), "fp8_per_token_head", "", None),
    "indexer": (replace(MLA, dtype=torch.uint8, head_size=132), None, "", "uint8"),
    "fp8_ds_mla": (
        replace(MLA, dtype=torch.uint8, state_content_bytes=656),
        "fp8_ds_mla",
        "",
        None,
    ),
    "Gaudi": (replace(FP8, dtype=torch.float8_e4m3fn), "fp8_inc", "", None),
}


@pytest.mark.parametrize("case", PACKED, ids=PACKED)
def test_content_that_no_spec_explains_moves_whole(case):
    spec, named, suffix, dtype = PACKED[case]
    layer = module("OWN", kv_cache_dtype=named)
    tensors = caches(spec)
    for view in views_of(tensors, spec, layer, place=TpRank(1, 2)):
        (part,) = view.parts
        assert view.layout == f"packed by OWN{suffix}" and view.dtype == (dtype or named)
        assert part.itemsize == 1 and part.shape[1] == 1 and part.name == "kv"
        if suffix:  # slots, of which each rank has its own
            slots = part.shape[0]
            assert view.heads == Heads(slots, slots, 2 * slots)
        # every byte of the block, in order
        cache = tensors[view.layer]
        assert torch.equal(held(part, cache).flatten(), as_bytes(cache).flatten())


def test_packed_kernel_blocks_are_all_moved():
    spec = replace(FP8, state_content_bytes=72)
    tensors = caches(spec, kernel_tokens=16)
    layer = module(kv_cache_dtype="fp8_per_token_head")
    for view in views_of(tensors, spec, layer):
        (part,) = view.parts
        assert part.shape == (2, 4, 16 * 72)
        cache = tensors[view.layer]
        assert torch.equal(held(part, cache).flatten(1), as_bytes(in_blocks(cache)).flatten(1))


def test_packed_tokens_between_which_other_heads_lie_are_all_moved():
    spec = replace(FP8, state_content_bytes=72)
    tensors = caches(spec, KVCacheLayout.LBNHC, kernel_tokens=16)
    layer = module(kv_cache_dtype="fp8_per_token_head")
    for view in views_of(tensors, spec, layer):
        (part,) = view.parts
        assert part.shape == (2, 64, 72)
        cache = tensors[view.layer]
        assert torch.equal(held(part, cache)[..., 0], in_blocks(cache).view(torch.uint8))


def test_packed_fp8_of_other_scales_is_another_layout():
    spec = replace(FP8, num_head_slots=2)
    layer = module("OWN", kv_cache_dtype="fp8", _k_scale_float=0.5, _v_scale_float=0.25)
    view, _ = views_of(caches(spec), spec, layer)
    assert view.layout == "packed by OWN, scales 0.5 0.25, TP 1"


# -- recurrent state --------------------------------------------------------------------------


def state(mode="none", conv=(3, 1024), page=None, **options):
    """Spec and caches."""
    shapes, dtypes = (conv, (16, 32)), (torch.float16, torch.float32)
    spec = kvi.MambaSpec(
        block_size=2048,
        shapes=shapes,
        dtypes=dtypes,
        page_size_padded=page,
        mamba_cache_mode=mode,
        **options,
    )
    return spec, caches(spec)


def of_state(place=ALONE, **options):
    spec, tensors = state(**options)
    return views_of(tensors, spec, place=place)


@pytest.mark.parametrize("page", [None, 12_288, 3 << 20, (3 << 20) + 192])
def test_recurrent_state_moves_whole(page):
    spec, tensors = state(page=page)
    for view in views_of(tensors, spec):
        (part,) = view.parts
        assert view.layout == "state float16[3, 1024], float32[16, 32]"
        assert view.block_tokens >= 1 << 20, "one block is all of a request"
        assert view.heads == Heads(0, 1, 1)
        assert part.shape[2] <= 1 << 16, "a row has to fit a staging slot"
        cells = held(part, tensors[view.layer]).reshape(BLOCKS, -1)
        assert torch.equal(cells, tensors[view.layer].reshape(BLOCKS, -1).view(torch.uint8))


def test_recurrent_state_is_cut_by_tp_unless_replicated():
    (view, _) = of_state(place=TpRank(1, 2))
    assert view.heads == Heads(1, 1, 2)
    (view, _) = of_state(tp_replicated=True, place=TpRank(1, 2))
    assert view.heads == Heads(0, 1, 1)


def test_another_shape_of_the_state_is_refused():
    (ours, *_), (theirs, *_) = of_state(), of_state(conv=(1024, 3))
    assert assign([ours], [[ours]], 0)
    with pytest.raises(GeometryError, match=r"layout state float16\[1024, 3\].*we have state"):
        assign([ours], [[theirs]], 0)


def test_state_of_several_blocks_a_request_is_refused():
    with pytest.raises(ConfigError, match=r"mode 'align'.*set --no-enable-prefix-caching"):
        of_state(mode="align")


def test_state_of_another_shape_is_refused():
    spec, tensors = state()
    with pytest.raises(ConfigError, match=r"state of shape \[3, 8192\], expected \[B, 1, 1"):
        views_of({name: cache[:, 0, 0] for name, cache in tensors.items()}, spec)
    with pytest.raises(ConfigError, match=r"state of shape \[3, 2, 1, 4096\], expected"):
        views_of({name: cache.reshape(3, 2, 1, -1) for name, cache in tensors.items()}, spec)


def test_content_that_is_neither_attention_nor_state_is_refused():
    spec = kvi.KVCacheSpec(block_size=16)
    with pytest.raises(ConfigError, match="KVCacheSpec state, which NixlConnector cannot"):
        views_of(caches(FULL), spec)


# -- the CPU backend --------------------------------------------------------------------------

ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86")
CPU = [
    ("vec", torch.float32, "auto"),
    ("vec", torch.bfloat16, "auto"),
    ("vec", torch.float16, "auto"),
    ("vec16", torch.bfloat16, "auto"),
    ("amx", torch.bfloat16, "auto"),
    ("vec", torch.float32, "fp8"),
    ("vec", torch.bfloat16, "fp8_e5m2"),
    ("amx", torch.bfloat16, "fp8_e4m3"),
    ("amx", torch.bfloat16, "fp8_e5m2"),
]
STORED = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
STORED["fp8_e5m2"] = torch.float8_e5m2


def written(cache, isa, dtype, named, scales=(1.0, 1.0)):
    """K and V of some tokens in all blocks, ``[block, token, head, D]``, put there by vLLM."""
    pieces, heads, tokens, content = cache.shape
    shape = (2, pieces * tokens, heads, content // 2)
    # numbers that every format holds exactly
    values = (
        torch.randint(4, 8, shape)
        * 2.0 ** torch.randint(-3, 3, shape)
        * (-1) ** torch.randint(2, shape)
    )
    key, value = (values * torch.tensor(scales).reshape(2, 1, 1, 1)).to(dtype).unbind()
    kv = cache.view(pieces, heads, 2 * tokens, -1).chunk(2, dim=2)
    slots = torch.arange(pieces * tokens)
    ops.cpu_attn_reshape_and_cache(key, value, *kv, slots, isa, *scales, named)
    return values.reshape(2, BLOCKS, -1, heads, content // 2).permute(0, 1, 3, 2, 4)


@ON_X86
@pytest.mark.parametrize(("isa", "dtype", "named"), CPU, ids=lambda x: str(x).split(".")[-1])
@pytest.mark.parametrize(("tokens", "size"), [(32, 32), (128, 64), (96, 96)])
def test_each_cell_is_where_the_cpus_kernel_wrote_it(isa, dtype, named, tokens, size):
    stored = STORED.get(named, dtype)
    spec = replace(
        FULL,
        block_size=tokens,
        head_size=size,
        head_size_v=size,
        dtype=torch.uint8 if named in STORED else dtype,
    )
    tensors = caches(spec)
    scales = (0.5, 4.0) if named in STORED else (1.0, 1.0)
    layer = module(
        "CPU_ATTN",
        kv_cache_dtype=named,
        isa=isa,
        _k_scale_float=scales[0],
        _v_scale_float=scales[1],
    )
    view, _ = views_of(tensors, spec, layer, dtype=dtype)
    cache = tensors[view.layer]
    values = written(cache, isa, dtype, named, scales)
    assert view.layout == DENSE
    assert view.dtype == str(stored).removeprefix("torch.").replace("float8", "fp8").removesuffix(
        "fn"
    )
    for part, cells, scale in zip(view.parts, values, scales, strict=True):
        assert part.scale == scale
        assert torch.equal(held(part, cache).view(stored)[..., 0].float(), cells)


@ON_X86
def test_the_smallest_description_is_chosen():
    amx = probe.Kernel("amx", torch.bfloat16, "auto", torch.bfloat16)
    k, v = probe.cell_layouts(amx, 64, 32)
    assert k == (0, (2, Tile(16, 512)), (1, Tile(2, 32)))
    assert v == (64 * 32, (1, Tile(2, 32)), (2, Tile(16, 1024)))
    k, v = probe.cell_layouts(amx._replace(isa="vec"), 64, 32)
    assert k == (0, (1, UNTILED), (64, UNTILED))
    assert v == (64 * 32, (32, UNTILED), (1, UNTILED))


def test_a_packing_that_is_not_understood_moves_whole():
    layer = module("CPU_ATTN", isa="abacus")
    tensors = caches(FULL)
    for view in views_of(tensors, FULL, layer):
        (part,) = view.parts
        assert view.layout == "cpu:abacus" and part.shape == (2, 1, 64 * 64 * 2)
        assert part_extent(part, BLOCKS)[1] <= part.base + tensors[view.layer].nbytes


@ON_X86
def test_kernel_blocks_of_the_cpu_are_tiles_or_move_whole():
    """A tile of tiles cannot be said; used to be cut where no kernel cuts."""
    tensors = caches(FULL, kernel_tokens=32)
    view, _ = views_of(tensors, FULL, module("CPU_ATTN", isa="vec"))
    values = written(tensors[view.layer], "vec", torch.bfloat16, "auto")
    assert view.layout == DENSE
    for part, cells in zip(view.parts, values, strict=True):
        found = held(part, tensors[view.layer]).view(torch.bfloat16)[..., 0]
        assert torch.equal(found.float(), cells)
    for view in views_of(tensors, FULL, module("CPU_ATTN", isa="amx")):
        assert view.layout == "cpu:amx" and view.parts[0].shape == (2, 2, 32 * 64 * 2)


SQUARE = np.arange(64).reshape(8, 8)
NO_FIT = {
    "token and content depend on each other": np.where(SQUARE % 9 == 0, SQUARE[::-1, ::-1], SQUARE),
    "backwards": SQUARE[:, ::-1],
    "no tile": SQUARE[:, [0, 1, 3, 2, 4, 5, 7, 6]],
}


@pytest.mark.parametrize("place", NO_FIT.values(), ids=NO_FIT)
def test_what_strides_and_tiles_cannot_say_is_not_guessed(place):
    assert probe.fit(place) is None


def test_packed_content_is_moved_as_the_runs_that_its_docstring_shows():
    heads_first = Cells(0, 1, 1, 2, 16, 80, 2560, 1280, 80, 1)
    assert packed(heads_first).shape == (2, 1, 1280)
    long = Cells(0, 1, 1, 2, 2048, 80, 327680, 163840, 80, 1)
    assert packed(long).shape == (2, 5, 32768)
    tokens_first = Cells(0, 1, 1, 2, 16, 80, 2560, 80, 160, 1)
    assert packed(tokens_first).shape == (2, 16, 80)
    assert packed(tokens_first).strides == (2560, 80, 160, 1)
    two_pieces = packed(tokens_first._replace(pieces=2))
    assert two_pieces.shape == (2, 32, 80)
    assert two_pieces.tiles[0] == Tile(16, 2560)
