"""The proxy reads the KV events that this version of vLLM publishes."""

from array import array

import msgspec
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from kvconnect.proxy.prompts.kv_events import RankBlocks

IDS = list(range(48))


def stored(first: int, parent: bytes | None, ids: list[int]) -> BlockStored:
    hashes = [b"%d" % number for number in range(first, first + len(ids) // 16)]
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=ids,
        block_size=16,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[None] * len(hashes),
        group_idx=0,
    )


def test_the_proxy_reads_vllms_events():
    rank = RankBlocks()

    def hear(number, *events):
        batch = KVEventBatch(ts=1.0, events=list(events), data_parallel_rank=0)
        rank.hear(number, msgspec.msgpack.encode(batch))
        return rank.held(array("I", IDS), None)

    assert hear(0, stored(0, None, IDS[:32]), stored(2, b"1", IDS[32:])) == 48
    assert hear(1, BlockRemoved(block_hashes=[b"1"], medium="GPU", group_idx=0)) == 16
    assert hear(2, AllBlocksCleared()) == 0
