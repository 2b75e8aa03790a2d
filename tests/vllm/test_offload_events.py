"""KV events of the offloading connector: the same that vLLM's own block pool tells of the device.

A router hashes blocks itself, of tokens and of what else a block's hash is of (``extra_keys``).
"""

from types import SimpleNamespace

import pytest
from test_offload_scheduler import BLOCK, spec
from vllm.distributed.kv_events import BlockStored
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvconnect.config import parse
from kvconnect.offload.config import OffloadConfig
from kvconnect.vllm.offload.events import Events
from kvconnect.vllm.offload.identity import group_configs

BLOCKS = 6
OF_THE_PLACE = {"medium", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"}
"""Fields that say where a block is, and not what it is of."""


def asked_of_vllm(**more):
    init_none_hash(sha256)
    one = Request(
        request_id="r",
        prompt_token_ids=list(range(100, 100 + BLOCKS * BLOCK)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        **more,
    )
    one.session_id = "a session"
    return one


def image(name, offset, length):
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=name,
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


KINDS = {
    "plain": {},
    "salted": {"cache_salt": "salt"},
    "of an adapter": {"lora_request": LoRARequest("adapter", 3, "/adapter")},
    # the first image ends where the second chunk has begun; the second spans two blocks
    "of images": {"mm_features": [image("one", 2, 2 * BLOCK), image("two", 3 * BLOCK, BLOCK + 1)]},
    "of all": {
        "cache_salt": "salt",
        "lora_request": LoRARequest("adapter", 3, "/adapter"),
        "mm_features": [image("one", 2, 2 * BLOCK)],
    },
}


def of_the_device(one):
    """What vLLM's own block pool tells of the same request."""
    pool = BlockPool(
        num_gpu_blocks=BLOCKS + 1,
        enable_caching=True,
        hash_block_size=BLOCK,
        enable_kv_cache_events=True,
    )
    pool.cache_full_blocks(
        request=one,
        blocks=pool.get_new_blocks(BLOCKS),
        num_cached_blocks=0,
        num_full_blocks=BLOCKS,
        block_size=BLOCK,
        kv_cache_group_id=0,
    )
    (event,) = pool.take_events()
    return event


def of_ours(one, blocks_per_chunk, window=None):
    options = {"cpu_bytes_to_use": 1 << 20, "blocks_per_chunk": blocks_per_chunk}
    config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec(window))])
    chunking = group_configs(config, parse(options, OffloadConfig, "test"))
    events = Events(chunking, config, BLOCK)
    keys = list(range(BLOCKS // blocks_per_chunk))
    for key in keys:
        events.saving(one, key, 0, (key + 1) * blocks_per_chunk * BLOCK)
    return events.take({"host": [(key, True) for key in keys]})


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_chunk_is_told_as_vllm_tells_its_blocks_on_the_device(kind, blocks_per_chunk):
    one = asked_of_vllm(**KINDS[kind])
    device, found = of_the_device(one), of_ours(one, blocks_per_chunk)
    assert len(found) == BLOCKS // blocks_per_chunk
    for name in ("block_hashes", "token_ids", "extra_keys"):
        assert [v for event in found for v in getattr(event, name)] == list(getattr(device, name))
    listed = {"block_hashes", "token_ids", "extra_keys", "parent_block_hash"}
    for name in set(BlockStored.__struct_fields__) - listed - OF_THE_PLACE:
        assert {getattr(event, name) for event in found} == {getattr(device, name)}, name
    parents = [None, *(event.block_hashes[-1] for event in found)]
    assert [event.parent_block_hash for event in found] == parents[:-1]
    assert (device.extra_keys != [None] * BLOCKS) == (kind != "plain")


@pytest.mark.skipif(
    "kv_cache_spec_kind" not in BlockStored.__struct_fields__,
    reason="events of this vLLM do not say what kind of group they are of",
)
@pytest.mark.parametrize(
    ("window", "says"), [(None, ("full_attention", None)), (64, ("sliding_window", 64))]
)
def test_a_window_is_told_from_full_attention(window, says):
    (first, *_) = of_ours(asked_of_vllm(), 1, window)
    assert (first.kv_cache_spec_kind, first.kv_cache_spec_sliding_window) == says
