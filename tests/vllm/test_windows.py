"""Sliding windows between blocks of two sizes, with vLLM's own cache manager at the decode side."""

from types import SimpleNamespace

import pytest
import torch
from halves import Engine
from halves import Request as Asks
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from kvconnect.config import NixlConfig
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.orders import Offer, Source
from kvconnect.vllm.protocol import RouterProtocol
from kvconnect.vllm.windows import Windows, held_from

BLOCK, WINDOW = 16, 16


def spec(window=WINDOW, block=BLOCK):
    return SlidingWindowSpec(
        block_size=block,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.bfloat16,
        sliding_window=window,
    )


def config(**options):
    return KVCacheConfig(64, [], [KVCacheGroupSpec(["l"], spec(**options))])


def request(request_id, tokens):
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(request_id, list(range(tokens)), SamplingParams(), None, block_hasher=hasher)


class Decode:
    """vLLM's cache manager, asked as its scheduler asks it, and what we make of it."""

    def __init__(self):
        init_none_hash(sha256)
        self.manager = KVCacheManager(config(), 1024, BLOCK, BLOCK)
        self.windows = Windows(self.manager.kv_cache_config, [0])
        self.windows.bind(self.manager.block_pool)

    def loads(self, one, tokens, held_from):
        """Admits a request of which ``tokens`` are loaded; returns from which on."""
        assert self.manager.allocate_slots(
            one, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True
        )
        needed = self.windows.needed_from(tokens, held_from)
        blocks = [
            (place, block.block_id)
            for place, block in enumerate(self.manager.get_blocks(one.request_id).blocks[0])
            if not block.is_null
        ]
        self.windows.load(one.request_id, [blocks], needed)
        return needed[0], blocks

    def runs(self, one, tokens):
        """Its load has ended, and vLLM schedules it."""
        self.windows.received(one.request_id)
        self.manager.cache_blocks(one, tokens)

    def hit(self, tokens):
        """Tokens that another request with the same beginning finds in the prefix cache."""
        return self.manager.get_computed_blocks(request(f"other {tokens}", tokens))[1]


@pytest.mark.parametrize("tokens", range(20, 60))
def test_no_other_request_finds_a_block_without_its_first_tokens(tokens):
    """A request that ends within the first one's prompt sees further back than that one did."""
    d = Decode()
    one = request("r", tokens + 1)
    first = tokens - WINDOW + 1  # as prefill keeps it, with blocks of one token
    needed, blocks = d.loads(one, tokens, held_from=first)
    assert needed == first and blocks[0][0] == first // BLOCK
    d.runs(one, tokens)
    whole = first % BLOCK == 0
    assert d.windows.holds_back("another") is not whole, "until the partial block is evicted"
    assert not d.windows.holds_back("r")
    d.windows.done("r")
    assert not d.windows.holds_back("another")
    found = d.hit(tokens)
    assert found - WINDOW + 1 >= first or found == 0


def test_what_a_source_of_equal_blocks_holds_is_loaded_whole_and_found_again():
    d = Decode()
    one = request("r", 41)
    needed, _ = d.loads(one, 40, held_from=16)
    assert needed == 16
    d.runs(one, 40)
    assert not d.windows.holds_back("another")
    assert d.hit(41) == 32


def test_a_request_that_ends_before_it_runs_leaves_no_partial_block():
    d = Decode()
    one = request("r", 41)
    d.loads(one, 40, held_from=None)
    d.runs(one, 40)
    assert d.hit(41) == 32, "so it has to be evicted"
    d.windows.done("r")
    assert d.hit(41) == 0


def test_without_the_block_pool_blocks_are_loaded_whole():
    windows = Windows(config(), [0])
    assert windows.needed_from(40, held_from=25) == (0,)


def test_a_full_group_needs_all_from_the_first_token_on():
    full = SimpleNamespace(block_size=16)
    windows = Windows(
        SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in (full, spec())]),
        [0, 1],
    )
    windows.bind(object())
    assert windows.needed_from(40, held_from=None) == (0, 25)


@pytest.mark.parametrize(("held_from", "asked"), [(None, 25), (20, 20)])
def test_a_scheduler_asks_for_what_its_source_has_and_caches_no_block_without_the_rest(
    held_from, asked
):
    evicted = []
    scheduler = Engine("D", "kv_both", NixlConfig(), RouterProtocol, spec=spec()).scheduler
    scheduler.bind(SimpleNamespace(evict_blocks=evicted.append))
    source, blocks = Source((), "p", None, 1.0), (((1, 31), (2, 32)),)
    short, offer = Offer(source, WINDOW - 1, b""), Offer(source, 40, b"", held_from=held_from)
    assert scheduler.needed_from("short", (((0, 30),),), short) == (), "all of it"
    assert scheduler.needed_from("r", blocks, offer) == (asked,)
    scheduler.update_connector_output(["short", "r"])
    for name in ("short", "r"):
        scheduler.request_finished(Asks(name, {}), ([],))
    assert evicted == [{31}]


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        (((1, 2, 3),), 0),
        (((1, 2), (NO_BLOCK, 4)), 4),
        (((NO_BLOCK, 1), (NO_BLOCK, NO_BLOCK, 4)), 8),
    ],
)
def test_all_is_held_from_the_last_missing_block_on(tables, wanted):
    assert held_from(tables, [4] * len(tables), NO_BLOCK) == wanted
