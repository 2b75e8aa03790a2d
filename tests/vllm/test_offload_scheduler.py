"""The scheduler's half of offloading, with stand-ins for vLLM's requests, pool and workers."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.plan import NO_BLOCK
from kvconnect.tier.config import OffloadConfig
from kvconnect.tier.keys import Identity
from kvconnect.vllm.offload import scheduler as module
from kvconnect.vllm.offload.identity import cuts
from kvconnect.vllm.offload.messages import Done, Found
from kvconnect.vllm.offload.scheduler import OffloadScheduler

BLOCK = 4
IDENTITY = Identity(
    model="m",
    revision=None,
    config="",
    rope="",
    dtype="",
    kv_dtype="",
    quantization=None,
    speculative=None,
    block_tokens=BLOCK,
    chunk_blocks=1,
    hashing="",
)


class Pool:
    """Block 0 is null, as vLLM's; a block knows how often it is referenced."""

    def __init__(self, count=64):
        self.blocks = [
            SimpleNamespace(block_id=n, is_null=n == 0, block_hash=None, refs=0)
            for n in range(count)
        ]

    def touch(self, blocks):
        for block in blocks:
            assert not block.is_null
            block.refs += 1

    def free_blocks(self, blocks):
        for block in blocks:
            assert block.refs > 0
            block.refs -= 1

    def held(self):
        return [block.block_id for block in self.blocks if block.refs]


def spec(window=None, block=BLOCK):
    kind, more = (
        (SlidingWindowSpec, {"sliding_window": window}) if window else (FullAttentionSpec, {})
    )
    return kind(block_size=block, num_kv_heads=1, head_size=8, dtype=torch.float32, **more)


class Engine:
    """Steps a scheduler's half as vLLM would."""

    def __init__(
        self, monkeypatch, windows=(None,), ranks=1, slots=16, problem="", events=True, **options
    ):
        monkeypatch.setattr(module, "identity", lambda *_: IDENTITY)
        monkeypatch.setattr(module, "hash_tokens", lambda *_: BLOCK)
        groups = [SimpleNamespace(kv_cache_spec=spec(window)) for window in windows]
        config = parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")
        self.half = OffloadScheduler(
            SimpleNamespace(
                speculative_config=None,
                kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
            ),
            SimpleNamespace(kv_cache_groups=groups),
            config,
        )
        found = Found(slots, 0, [], [])
        last = Found(0, 0, [], [], problem) if problem else found
        self.half.named({(0, r): last if r == ranks - 1 else found for r in range(ranks)})
        self.pool = Pool()
        self.half.bind(self.pool)

    def step(self, request=None, tables=(), scheduled=0):
        """A step that computes ``scheduled`` tokens of a request; its work."""
        numbers = {request.request_id: scheduled} if request else {}
        state = SimpleNamespace(get_block_ids=lambda request_id: tables)
        work = self.half.take_work(
            SimpleNamespace(num_scheduled_tokens=numbers, kv_connector_block_state=state)
        )
        if request:
            request.num_computed_tokens += scheduled
        return work

    def answer(self, work, ranks=1, failures=0):
        """``ranks`` ranks answer a step's jobs, ``failures`` of them badly."""
        jobs = [job for job in [*work.jobs, *work.saves] if hasattr(job, "number")]
        self.half.received(Done({job.number: (ranks, failures) for job in jobs}))

    def stored(self, request, tables):
        """The whole request was computed and stored."""
        self.half.match(request, 0)
        work = self.step(request, tables, request.num_tokens)
        self.answer(work)
        return work

    def load(self, request, ids, local=0):
        """Admit a request for all that matches; the step's work."""
        tokens = self.half.match(request, local)
        blocks = [[self.pool.blocks[n] for n in table] for table in ids]
        self.half.admitted(request, SimpleNamespace(blocks=blocks), tokens)
        return self.step()


def request(name="r", blocks=3, seed=0, params=None, extra=1):
    """Of so many whole blocks and ``extra`` tokens more."""
    return SimpleNamespace(
        request_id=name,
        block_hashes=[bytes([seed, n]) * 16 for n in range(blocks)],
        num_tokens=blocks * BLOCK + extra,
        all_token_ids=list(range(blocks * BLOCK + extra)),
        num_computed_tokens=0,
        num_output_placeholders=0,
        skip_reading_prefix_cache=False,
        lora_request=None,
        mm_features=None,
        cache_salt=None,
        kv_transfer_params=params,
    )


@pytest.fixture
def make(monkeypatch):
    return lambda **options: Engine(monkeypatch, **options)


def test_blocks_are_referenced_until_every_rank_has_saved_them_whatever_becomes_of_the_request(
    make,
):
    engine = make(ranks=2)
    one = request()
    engine.half.match(one, 0)
    work = engine.step(one, ([5, 6, 7, 8],), 13)
    assert [save.blocks for save in work.saves] == [(5,), (6,), (7,)]
    assert engine.pool.held() == [5, 6, 7]
    engine.half.finished("r")
    engine.answer(work)
    assert engine.pool.held() == [5, 6, 7]
    assert engine.half.match(request("again"), 0) == 0  # one rank is not enough
    engine.answer(work)
    assert engine.pool.held() == []
    assert engine.half.match(request("again"), 0) == 12
    assert not engine.half.busy


def test_what_a_rank_could_not_save_is_not_there_and_its_blocks_are_free(make):
    engine = make(ranks=2)
    one = request()
    engine.half.match(one, 0)
    engine.answer(engine.step(one, ([5, 6, 7, 8],), 13), ranks=2, failures=1)
    assert engine.pool.held() == []
    assert engine.half.match(request("again"), 0) == 0


def test_only_what_the_step_completes_is_saved_and_nothing_twice(make):
    engine = make()
    one = request()
    engine.half.match(one, 0)
    assert [s.blocks for s in engine.step(one, ([5, 6],), 7).saves] == [(5,)]
    assert [s.blocks for s in engine.step(one, ([5, 6, 7],), 5).saves] == [(6,), (7,)]
    one.num_computed_tokens = 0  # preempted
    assert engine.step(one, ([8, 9, 10],), 12).saves == []


def test_asking_has_no_effect_and_leaves_a_token_to_compute(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    other = request("other", extra=0)
    assert [engine.half.match(other, 0) for _ in range(3)] == [8, 8, 8]
    assert engine.half.match(other, 8) == 0
    assert engine.step().empty
    other.skip_reading_prefix_cache = True
    assert engine.half.match(other, 0) == 0


def test_blocks_that_are_cached_or_null_are_not_filled(make):
    engine = make(block_size=2 * BLOCK)
    engine.stored(request(blocks=4), ([1, 2, 3, 4],))
    engine.pool.blocks[11].block_hash = b"cached"
    other = request("other", blocks=4)
    work = engine.load(other, ([11, 12, 13, 14, 15],), local=BLOCK)
    assert [fill.blocks for fill in work.jobs] == [(NO_BLOCK, 12), (13, 14)]
    assert work.loads["other"].fills == tuple(fill.number for fill in work.jobs)
    assert not work.loads["other"].failed


def test_a_failed_load_is_not_tried_again(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    other = request("other")
    work = engine.load(other, ([11, 12, 13, 14],))
    assert len(work.jobs) == 3
    engine.answer(work, failures=1)
    assert engine.half.match(other, 0) == 0
    assert engine.half.match(request("third"), 0) == 12  # a rank says what it lost, if it did


def test_a_load_of_what_went_meanwhile_is_asked_for_and_found_missing(make):
    """Between the answer and the admission another request's KV may take its room."""
    engine = make(slots=3)
    engine.stored(request(), ([1, 2, 3],))
    other = request("other")
    assert engine.half.match(other, 0) == 12
    engine.half.clear()
    blocks = SimpleNamespace(blocks=[[engine.pool.blocks[n] for n in (11, 12, 13, 14)]])
    engine.half.admitted(other, blocks, 12)
    loading = engine.step().loads["other"]
    assert len(loading.fills) == 3


def test_a_load_with_nothing_to_fill_still_ends_at_the_workers(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    work = engine.load(request("other"), ([0, 0, 0, 14],))
    assert work.loads["other"] == ((), False)


def test_blocks_out_of_the_window_are_neither_saved_nor_wanted(make):
    engine = make(windows=(None, 2 * BLOCK))
    one = request(blocks=5)
    work = engine.stored(one, ([1, 2, 3, 4, 5], [0, 0, 0, 14, 15]))
    assert [s.blocks for s in work.saves if s.group == 1] == [(14,), (15,)]
    assert len(work.saves) == 7
    fills = engine.load(request("other", blocks=5), ([21, 22, 23, 24, 25], [0, 0, 0, 34, 35])).jobs
    assert [fill.blocks for fill in fills if fill.group == 1] == [(34,), (35,)]


@pytest.mark.parametrize(
    ("limit", "saved"), [(0, 0), (8, 2), (11, 2), (-1, 3), ("8", 3), (8.0, 3), (True, 3), ([], 3)]
)
def test_a_client_says_how_much_may_be_stored(make, limit, saved):
    engine = make()
    one = request(params={"max_offload_tokens": limit})
    assert len(engine.stored(one, ([1, 2, 3],)).saves) == saved


def test_a_rank_without_room_turns_everything_off(make):
    engine = make(ranks=2, problem="no room")
    one = request()
    assert engine.half.match(one, 0) == 0
    assert engine.step(one, ([1, 2, 3],), 13).empty
    assert not engine.half.busy


def test_what_ranks_found_is_had_by_all_or_forgotten(make):
    engine = make()
    stored = engine.stored(request(), ([1, 2, 3],)).saves
    keys = [save.key for save in stored]
    engine.half.named({(0, 0): Found(8, 0, keys, []), (0, 1): Found(8, 0, keys[:2], [])})
    assert engine.half.match(request("other"), 0) == 8
    assert [job.key for job in engine.step().jobs] == [keys[2]]


def test_a_salt_has_keys_of_its_own(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    salted = request("salted")
    salted.cache_salt = "s"
    assert engine.half.match(salted, 0) == 0


def test_a_chunk_must_be_of_whole_blocks():
    config = parse({"cpu_bytes_to_use": 1 << 20, "block_size": 6}, OffloadConfig, "test")
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec())])
    with pytest.raises(ConfigError, match="block_size is 6, expected a multiple"):
        cuts(groups, config)


def test_events_tell_what_came_to_be_held_and_what_left(make):
    engine = make(slots=3, block_size=2 * BLOCK)
    first = request(blocks=4)
    hashes = [maybe_convert_block_hash(one) for one in first.block_hashes]
    engine.stored(first, ([1, 2, 3, 4],))
    events = engine.half.take_events()
    assert [type(event).__name__ for event in events] == ["BlockStored"] * 2
    assert events[1].block_hashes == hashes[2:]
    assert events[1].parent_block_hash == hashes[1]
    assert events[1].token_ids == list(range(8, 16))
    assert (events[1].block_size, events[1].medium) == (BLOCK, "CPU")
    engine.stored(request("other", blocks=4, seed=1), ([5, 6, 7, 8],))
    kinds = [(type(event).__name__, event.block_hashes) for event in engine.half.take_events()]
    assert kinds[0][0] == "BlockRemoved"
    assert kinds[0][1] in (hashes[:2], hashes[2:])
    assert [kind for kind, _ in kinds[1:]] == ["BlockStored"] * 2
    engine.half.clear()
    assert len(engine.half.take_events()) == 3


def test_without_events_nothing_is_kept_for_them(make):
    engine = make(events=False)
    engine.stored(request(), ([1, 2, 3],))
    assert engine.half.take_events() == []
