"""The scheduler's half of offloading, with stand-ins for vLLM's requests, pool and workers."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvconnect.config import parse
from kvconnect.errors import ConfigError
from kvconnect.geometry.intersect import NO_BLOCK
from kvconnect.offload.config import OffloadConfig
from kvconnect.offload.jobs import Forget, Loss, Spill
from kvconnect.offload.keys import Identity
from kvconnect.vllm.adapter_reports import AdapterReport, Loaded
from kvconnect.vllm.offload import scheduler as module
from kvconnect.vllm.offload.identity import group_configs
from kvconnect.vllm.offload.messages import StoreHandshake, WantedChunk, WorkerResults
from kvconnect.vllm.offload.scheduler import OffloadScheduler

BLOCK = 4
IDENTITY = Identity(
    model="m",
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
        self.freed = []

    def touch(self, blocks):
        for block in blocks:
            assert not block.is_null
            block.refs += 1

    def free_blocks(self, blocks):
        for block in blocks:
            assert block.refs > 0
            block.refs -= 1
            self.freed.append(block.block_id)

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
        self,
        monkeypatch,
        windows=(None,),
        ranks=1,
        slots=16,
        named=True,
        events=True,
        draft=0,
        transferred=None,
        lora=False,
        **options,
    ):
        speculative = SimpleNamespace(num_speculative_tokens=draft) if draft else None
        seeded = lambda config, groups, model_id, seed, unknown: replace(IDENTITY, hashing=seed)  # noqa: E731
        monkeypatch.setattr(module, "identity", seeded)
        monkeypatch.setattr(module, "hash_tokens", lambda *_: BLOCK)
        groups = [SimpleNamespace(kv_cache_spec=spec(window)) for window in windows]
        config = parse({"cpu_bytes_to_use": 1 << 20} | options, OffloadConfig, "test")
        self.half = OffloadScheduler(
            SimpleNamespace(
                speculative_config=speculative,
                lora_config=object() if lora else None,
                parallel_config=SimpleNamespace(world_size=ranks),
                kv_events_config=SimpleNamespace(enable_kv_cache_events=events),
            ),
            SimpleNamespace(
                kv_cache_groups=groups,
                transfer_group_ids=transferred or tuple(range(len(groups))),
            ),
            config,
        )
        found = StoreHandshake(slots, 0, [], [])
        if named:
            self.half.set_xfer_handshake_metadata({(0, r): found for r in range(ranks)})
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
        self.half.update_connector_output(
            WorkerResults({job.number: (ranks, failures) for job in jobs})
        )

    def loaded(self, digest, changes=0):
        """A step in which it was found that adapter 1 has been loaded."""
        report = AdapterReport(self.step().step, {1: {0: Loaded(digest, changes)}})
        self.half.update_connector_output(WorkerResults(adapters=report))

    def stored(self, request, tables):
        """The whole request was computed and stored."""
        self.half.get_num_new_matched_tokens(request, 0)
        work = self.step(request, tables, request.num_tokens)
        self.answer(work)
        return work

    def load(self, request, ids, local=0):
        """Admit a request for all that matches; the step's work."""
        tokens = self.half.get_num_new_matched_tokens(request, local)
        blocks = [[self.pool.blocks[n] for n in table] for table in ids]
        self.half.update_state_after_alloc(request, SimpleNamespace(blocks=blocks), tokens)
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
        prompt_embeds=None,
        cache_salt=None,
        kv_transfer_params=params,
    )


@pytest.fixture
def make(monkeypatch):
    return lambda **options: Engine(monkeypatch, **options)


def test_a_step_that_completes_no_chunk_looks_at_no_blocks(make):
    """As most steps of a decode: it costs a comparison, however long the request is."""
    engine, asked = make(), request(blocks=2)
    engine.stored(asked, ([1, 2],))

    class Tables:
        """Nobody is to look."""

        def __bool__(self):
            raise AssertionError("a block table was looked at")

    for _ in range(BLOCK - 2):
        assert not engine.step(asked, Tables(), 1).saves
    asked.block_hashes.append(b"\x09" * 16)
    assert [save.blocks for save in engine.step(asked, ([1, 2, 3],), 1).saves] == [(3,)]


def test_blocks_are_referenced_until_every_rank_has_saved_them_whatever_becomes_of_the_request(
    make,
):
    engine = make(ranks=2)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    work = engine.step(one, ([5, 6, 7, 8],), 13)
    assert [save.blocks for save in work.saves] == [(5,), (6,), (7,)]
    assert engine.pool.held() == [5, 6, 7]
    engine.half.request_finished("r")
    engine.answer(work)
    assert engine.pool.held() == [5, 6, 7]
    assert (
        engine.half.get_num_new_matched_tokens(request("again"), 0) == 0
    )  # one rank is not enough
    engine.answer(work)
    assert engine.pool.held() == []
    assert engine.half.get_num_new_matched_tokens(request("again"), 0) == 12
    assert not engine.half.busy


def test_what_a_rank_could_not_save_is_not_there_and_its_blocks_are_free(make):
    engine = make(ranks=2)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    engine.answer(engine.step(one, ([5, 6, 7, 8],), 13), ranks=2, failures=1)
    assert engine.pool.held() == []
    assert engine.half.get_num_new_matched_tokens(request("again"), 0) == 0


def test_only_what_the_step_completes_is_saved_and_nothing_twice(make):
    engine = make()
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    assert [s.blocks for s in engine.step(one, ([5, 6],), 7).saves] == [(5,)]
    assert [s.blocks for s in engine.step(one, ([5, 6, 7],), 5).saves] == [(6,), (7,)]
    one.num_computed_tokens = 0  # preempted
    assert engine.step(one, ([8, 9, 10],), 12).saves == []


def test_asking_has_no_effect_and_leaves_a_token_to_compute(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    other = request("other", extra=0)
    assert [engine.half.get_num_new_matched_tokens(other, 0) for _ in range(3)] == [8, 8, 8]
    assert engine.half.get_num_new_matched_tokens(other, 8) == 0
    assert engine.step().empty
    other.skip_reading_prefix_cache = True
    assert engine.half.get_num_new_matched_tokens(other, 0) == 0


def test_blocks_that_are_cached_or_null_are_not_filled(make):
    engine = make(block_size=2 * BLOCK)
    engine.stored(request(blocks=4), ([1, 2, 3, 4],))
    engine.pool.blocks[11].block_hash = b"cached"
    other = request("other", blocks=4)
    work = engine.load(other, ([11, 12, 13, 14, 15],), local=BLOCK)
    assert [fill.blocks for fill in work.jobs] == [(NO_BLOCK, 12), (13, 14)]
    assert work.loads["other"].fills == tuple(fill.number for fill in work.jobs)
    assert not work.loads["other"].problem


def test_a_failed_load_is_not_tried_again(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    other = request("other")
    work = engine.load(other, ([11, 12, 13, 14],))
    assert len(work.jobs) == 3
    engine.answer(work, failures=1)
    assert engine.half.get_num_new_matched_tokens(other, 0) == 0
    assert (
        engine.half.get_num_new_matched_tokens(request("third"), 0) == 12
    )  # a rank says what it lost, if it did


def test_a_load_of_what_went_meanwhile_is_asked_for_and_found_missing(make):
    """Between the answer and the admission another request's KV may take its room."""
    engine = make(slots=3)
    engine.stored(request(), ([1, 2, 3],))
    other = request("other")
    assert engine.half.get_num_new_matched_tokens(other, 0) == 12
    engine.half.clear()
    blocks = SimpleNamespace(blocks=[[engine.pool.blocks[n] for n in (11, 12, 13, 14)]])
    engine.half.update_state_after_alloc(other, blocks, 12)
    loading = engine.step().loads["other"]
    assert len(loading.fills) == 3


def test_a_load_with_nothing_to_fill_still_ends_at_the_workers(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    work = engine.load(request("other"), ([0, 0, 0, 14],))
    assert work.loads["other"] == ((), "")


def test_blocks_out_of_the_window_are_neither_saved_nor_wanted(make):
    engine = make(windows=(None, 2 * BLOCK))
    one = request(blocks=5)
    work = engine.stored(one, ([1, 2, 3, 4, 5], [0, 0, 0, 14, 15]))
    assert [s.blocks for s in work.saves if s.group == 1] == [(14,), (15,)]
    assert len(work.saves) == 7
    fills = engine.load(request("other", blocks=5), ([21, 22, 23, 24, 25], [0, 0, 0, 34, 35])).jobs
    assert [fill.blocks for fill in fills if fill.group == 1] == [(34,), (35,)]


@pytest.mark.parametrize(
    ("limit", "saved"),
    [(0, 0), (8, 2), (11, 2), (-1, 3), ("8", 3), (8.0, 2), (8.5, 3), (True, 3), ([], 3)],
)
def test_a_client_says_how_much_may_be_stored(make, limit, saved):
    engine = make()
    one = request(params={"max_offload_tokens": limit})
    assert len(engine.stored(one, ([1, 2, 3],)).saves) == saved


@pytest.mark.parametrize(
    ("limit", "loaded"), [(0, 0), (BLOCK, BLOCK), (BLOCK + 1, BLOCK), (2.0 * BLOCK, 2 * BLOCK)]
)
def test_a_client_says_how_much_may_be_loaded(make, limit, loaded):
    engine = make()
    engine.stored(request(blocks=5), ([1, 2, 3, 4, 5],))
    wanted = {"max_load_tokens": limit}
    assert (
        engine.half.get_num_new_matched_tokens(request("other", blocks=5, params=wanted), 0)
        == loaded
    )
    assert (
        engine.half.get_num_new_matched_tokens(request("another", blocks=5, params=wanted), BLOCK)
        == loaded
    )


def test_what_was_generated_is_not_stored_where_only_prompts_are(make):
    engine = make(offload_prompt_only=True)
    one = request(blocks=3)
    one.num_prompt_tokens = BLOCK + 1
    assert len(engine.stored(one, ([1, 2, 3],)).saves) == 1


def test_until_ranks_have_said_what_they_can_hold_nothing_is_kept(make):
    engine = make(ranks=2, named=False)
    one = request()
    assert engine.half.get_num_new_matched_tokens(one, 0) == 0
    assert engine.step(one, ([1, 2, 3],), 13).empty
    assert not engine.half.busy


def test_what_ranks_found_is_had_by_all_or_forgotten(make):
    engine = make()
    stored = engine.stored(request(), ([1, 2, 3],)).saves
    keys = [save.key for save in stored]
    engine.half.set_xfer_handshake_metadata(
        {(0, 0): StoreHandshake(8, 0, keys, []), (0, 1): StoreHandshake(8, 0, keys[:2], [])}
    )
    assert engine.half.get_num_new_matched_tokens(request("other"), 0) == 8
    assert [job.key for job in engine.step().jobs] == [keys[2]]


def test_a_salt_has_keys_of_its_own(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    salted = request("salted")
    salted.cache_salt = "s"
    assert engine.half.get_num_new_matched_tokens(salted, 0) == 0


def test_a_chunk_must_be_of_whole_blocks():
    config = parse({"cpu_bytes_to_use": 1 << 20, "block_size": 6}, OffloadConfig, "test")
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec())])
    with pytest.raises(ConfigError, match="block_size is 6, expected a multiple"):
        group_configs(groups, config)


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


def test_a_chunk_that_one_rank_failed_to_save_is_not_there_whoever_answers_last(make):
    engine = make(ranks=2)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    work = engine.step(one, ([5, 6, 7, 8],), 13)
    engine.answer(work, failures=1)
    engine.answer(work)
    assert engine.half.get_num_new_matched_tokens(request("again"), 0) == 0
    assert engine.pool.held() == []


def named(engine, *found):
    """The ranks say what they found, in place of what `make` gave."""
    engine.half.set_xfer_handshake_metadata({(0, rank): one for rank, one in enumerate(found)})


def test_the_rank_with_the_least_room_decides(make):
    engine = make()
    named(engine, StoreHandshake(2, 1, [], []), StoreHandshake(8, 4, [], []))
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    work = engine.step(one, ([1, 2, 3],), 13)
    assert len(work.saves) == 2
    engine.answer(work, ranks=2)
    assert [type(job) for job in engine.step().jobs] == [Spill]


def test_what_some_ranks_found_on_disk_is_forgotten_there(make):
    engine = make()
    engine.half.get_num_new_matched_tokens(request(), 0)
    a, b, _ = engine.half.keys_of("r")[0]
    named(engine, StoreHandshake(8, 8, [], [a, b]), StoreHandshake(8, 8, [], [a]))
    assert engine.step().jobs == [Forget(b, True)]
    assert engine.half.get_num_new_matched_tokens(request("other"), 0) == BLOCK


def test_with_write_back_the_disk_gets_what_memory_evicts(make):
    engine = make(disk_path="/d", disk_bytes=1 << 20, write_policy="write-back")
    named(engine, StoreHandshake(3, 8, [], []))
    engine.stored(request(), ([1, 2, 3],))
    assert engine.step().empty
    work = engine.stored(request("other", seed=1), ([4, 5, 6],))
    assert [type(job) for job in work.jobs] == [Spill, Forget] * 3


def test_what_is_offered_too_seldom_is_not_stored(make):
    engine = make(store_threshold=2)
    assert engine.stored(request(), ([1, 2, 3],)).saves == []
    assert len(engine.stored(request("again"), ([1, 2, 3],)).saves) == 3


def test_what_is_beside_is_loaded_once_every_rank_has_said_so(make):
    """Of an idle engine its workers are asked first; the answer may be as old as a request."""
    engine = make(ranks=2, share=True)
    one = request(blocks=2)
    assert engine.half.get_num_new_matched_tokens(one, 0) is None
    assert engine.half.get_num_new_matched_tokens(one, 0) == 0
    keys = engine.half.keys_of("r")[0]
    engine.half.update_connector_output(WorkerResults(gained=Counter(keys)))
    assert engine.half.get_num_new_matched_tokens(one, 0) == 0
    engine.half.update_connector_output(WorkerResults(gained=Counter(keys)))
    assert engine.half.get_num_new_matched_tokens(one, 0) == 2 * BLOCK
    engine.half.update_connector_output(WorkerResults(gone=Counter(2 * keys[1:])))
    assert engine.half.get_num_new_matched_tokens(one, 0) == BLOCK
    engine.half.update_connector_output(WorkerResults(gained=Counter(keys[1:])))
    assert engine.half.get_num_new_matched_tokens(one, 0) == BLOCK, "of two ranks one has it"


def test_what_is_cached_here_need_not_be_stored(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    engine.half.update_connector_output(
        WorkerResults(lost=[Loss(engine.half.keys_of("r")[0][0], False)])
    )
    assert engine.half.get_num_new_matched_tokens(request("other"), 0) == 0
    assert engine.half.get_num_new_matched_tokens(request("other"), BLOCK) == 2 * BLOCK


def test_where_nothing_is_loaded_workers_are_told_of_no_load(make):
    """An id that does not wait for a load ends the engine when it is reported."""
    engine = make()
    engine.half.update_state_after_alloc(request(), SimpleNamespace(blocks=[[]]), 0)
    assert engine.step().empty


def test_a_load_from_disk_that_has_no_room_fails_and_is_not_tried_again(make):
    engine = make(slots=1)
    engine.stored(request(), ([1],))
    keys = engine.half.keys_of("r")[0]
    named(engine, StoreHandshake(1, 8, [], keys))
    other = request("other")
    assert engine.half.get_num_new_matched_tokens(other, 0) == 12
    blocks = SimpleNamespace(blocks=[[engine.pool.blocks[n] for n in (11, 12, 13)]])
    engine.half.update_state_after_alloc(other, blocks, 12)
    work = engine.step()
    assert len(work.jobs) == 1
    problem = "memory has no room for 2 chunks on disk"
    assert work.loads["other"] == ((work.jobs[0].number,), problem)
    engine.answer(work)
    assert engine.half.get_num_new_matched_tokens(other, 0) == 0
    assert engine.half.spares(other, [WantedChunk(0, 0, (11,))]) == [(None, "")]


def test_tokens_are_counted_by_where_they_come_from_and_told_once(make):
    engine = make(block_size=2 * BLOCK, windows=(None, None))
    engine.stored(request(blocks=4), ([1, 2, 3, 4], [5, 6, 7, 8]))
    engine.half.take_stats()
    tables = ([11, 12, 13, 14], [21, 22, 23, 24])
    engine.pool.blocks[11].block_hash = b"cached"
    engine.load(request("other", blocks=4), tables, local=BLOCK)
    assert engine.half.take_stats()["tokens_from_host"] == 3 * BLOCK
    assert engine.half.take_stats() is None


def test_a_spare_from_disk_makes_room_in_memory(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    first, second, _ = engine.half.keys_of("r")[0]
    named(engine, StoreHandshake(1, 8, [first], [second]))
    ((fill, source_of),) = engine.half.spares(request(), [WantedChunk(0, 1, (11,))])
    assert (fill.blocks, source_of) == ((11,), "disk")
    assert engine.step().jobs == [Forget(first, False)]


def test_a_request_whose_blocks_are_not_told_is_left_alone(make):
    engine = make()
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    assert engine.step(one, None, 13).empty


def test_groups_that_are_not_transferred_are_not_touched(make):
    """vLLM's tables are of all groups; ours are of those that are transferred."""
    engine = make(windows=(None, None), transferred=(1,))
    saves = engine.stored(request(), ([1, 2, 3], [4, 5, 6])).saves
    assert [(save.group, save.blocks) for save in saves] == [(0, (4,)), (0, (5,)), (0, (6,))]
    fills = engine.load(request("other"), ([11, 12, 13, 14], [21, 22, 23, 24])).jobs
    assert [(fill.group, fill.blocks) for fill in fills] == [(0, (21,)), (0, (22,)), (0, (23,))]


def test_a_block_that_holds_local_tokens_is_not_filled_though_nothing_names_it(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    work = engine.load(request("other"), ([11, 12, 13, 14],), local=BLOCK)
    assert [fill.blocks for fill in work.jobs] == [(12,), (13,)]


def test_a_new_request_of_an_old_id_is_followed_by_its_own_tokens(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    assert engine.half.get_num_new_matched_tokens(request(seed=1), 0) == 0
    assert engine.half.get_num_new_matched_tokens(request(), 0) == 12


def test_drafted_tokens_are_stored_once_they_cannot_change(make):
    engine = make(draft=3)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    assert len(engine.step(one, ([5, 6, 7, 8],), 3 * BLOCK).saves) == 2
    assert len(engine.step(one, ([5, 6, 7, 8],), 4).saves) == 1


def test_tokens_that_were_scheduled_and_not_yet_sampled_are_not_stored(make):
    engine = make()
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    one.num_computed_tokens, one.num_output_placeholders = 3 * BLOCK - 1, 2
    assert len(engine.step(one, ([5, 6, 7, 8],), 1).saves) == 2


def test_a_table_may_be_shorter_than_what_is_computed_and_longer_than_what_is_hashed(make):
    engine = make()
    one = request(blocks=2, extra=BLOCK)
    engine.half.get_num_new_matched_tokens(one, 0)
    assert len(engine.step(one, ([5],), 12).saves) == 1
    assert len(engine.step(one, ([5, 6, 7, 8],), 4).saves) == 1


def test_blocks_beyond_what_vllm_takes_of_an_answer_are_not_filled(make):
    """It may take less: to compute a window again, it cuts the answer at a block of its own."""
    engine = make(block_size=2 * BLOCK)
    engine.stored(request(blocks=4), ([1, 2, 3, 4],))
    other = request("other", blocks=4)
    assert engine.half.get_num_new_matched_tokens(other, 0) == 4 * BLOCK
    blocks = SimpleNamespace(blocks=[[engine.pool.blocks[n] for n in (11, 12, 13, 14)]])
    engine.half.update_state_after_alloc(other, blocks, 3 * BLOCK)
    assert [fill.blocks for fill in engine.step().jobs] == [(11, 12), (13, NO_BLOCK)]


@pytest.mark.parametrize(("window", "matched"), [(2 * BLOCK + 1, 5), (2 * BLOCK + 2, 0)])
def test_a_window_holds_the_token_that_comes_next(make, window, matched):
    """Of 2 blocks that are stored it sees all that it needs, or it lacks one token."""
    engine = make(windows=(None, window))
    engine.stored(request(blocks=5), ([1, 2, 3, 4, 5], [0, 0, 0, 14, 15]))
    assert engine.half.get_num_new_matched_tokens(request("other", blocks=5), 0) == matched * BLOCK


def test_what_ranks_say_before_that_is_not_followed(make):
    engine = make(named=False)
    engine.half.update_connector_output(
        WorkerResults({1: (1, 0)}, gained=Counter([b"k"]), lost=[Loss(b"k", False)])
    )
    assert engine.half.take_stats() is None


def test_of_a_request_that_ended_the_last_chunk_makes_room_and_nothing_is_kept(make):
    engine = make(slots=3, ranks=2)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    work = engine.step(one, ([1, 2, 3],), one.num_tokens)
    engine.answer(work)
    engine.answer(work)
    engine.half.request_finished("r")
    half = engine.half
    assert {name: n for name, n in half.held().items() if n} == {"events": 3}
    half.get_num_new_matched_tokens(other := request("other", blocks=1, seed=1), 0)
    engine.answer(engine.step(other, ([4],), 5), ranks=2)
    assert half.get_num_new_matched_tokens(request("again"), 0) == 2 * BLOCK


def test_what_is_cleared_is_forgotten_by_the_ranks_in_a_step_of_its_own(make):
    engine = make()
    saves = engine.stored(request(), ([1, 2, 3],)).saves
    assert not engine.half.busy
    engine.half.clear()
    assert engine.half.busy, "an idle engine would not step"
    assert engine.step().jobs == [Forget(save.key, False) for save in saves]
    assert not engine.half.busy


def test_what_memory_does_with_keys_is_counted(make):
    engine = make(slots=1)
    engine.stored(request(blocks=1), ([1],))
    engine.stored(request("other", blocks=1, seed=1), ([2],))
    assert engine.half.take_stats()["host_keys_evicted"] == 1


def test_a_chunk_of_which_some_blocks_are_out_of_the_window_is_not_saved(make):
    engine = make(windows=(None, 2 * BLOCK), block_size=2 * BLOCK)
    saves = engine.stored(request(blocks=4), ([1, 2, 3, 4], [0, 12, 13, 14])).saves
    assert [(save.group, save.blocks) for save in saves] == [
        (0, (1, 2)),
        (0, (3, 4)),
        (1, (13, 14)),
    ]


def test_a_request_offers_a_chunk_once_however_often_it_is_computed(make):
    engine = make(store_threshold=2)
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    assert engine.step(one, ([5, 6],), 7).saves == []
    assert engine.step(one, ([5, 6, 7],), 5).saves == []
    one.num_computed_tokens = 0  # preempted
    assert engine.step(one, ([8],), 5).saves == []
    assert engine.step(one, ([8, 9, 10],), 7).saves == []


def test_chunks_of_all_groups_are_saved_as_they_end_and_their_blocks_freed_from_the_end(make):
    engine = make(windows=(None, None), block_size=2 * BLOCK)
    saves = engine.stored(request(blocks=4), ([1, 2, 3, 4], [5, 6, 7, 8])).saves
    assert [save.blocks for save in saves] == [(1, 2), (5, 6), (3, 4), (7, 8)]
    assert engine.pool.freed == [2, 1, 6, 5, 4, 3, 8, 7]


def test_who_loaded_well_may_load_again_after_preemption(make):
    engine = make()
    engine.stored(request(), ([1, 2, 3],))
    other = request("other")
    engine.answer(engine.load(other, ([11, 12, 13, 14],)))
    assert engine.half.get_num_new_matched_tokens(other, 0) == 12


def test_what_is_offered_again_is_still_told_when_it_leaves_the_disk(make):
    engine = make()
    named(engine, StoreHandshake(8, 8, [], []))
    engine.stored(request(), ([1, 2, 3],))
    engine.answer(engine.step())
    assert len(engine.half.take_events()) == 6
    engine.stored(request("again"), ([4, 5, 6],))
    engine.half.clear()
    left = [(type(event).__name__, event.medium) for event in engine.half.take_events()]
    assert left == [("BlockRemoved", "CPU")] * 3 + [("BlockRemoved", "STORAGE")] * 3


class Counting(list):
    """A list that counts how many of its items were taken out."""

    taken = 0

    def __getitem__(self, at):
        found = super().__getitem__(at)
        self.taken += len(found) if isinstance(at, slice) else 1
        return found


def test_what_events_cost_grows_with_what_is_saved_and_not_with_its_square(make):
    """128k tokens used to cost 8 s of the scheduler in each step."""
    engine = make(slots=256)
    one = request(blocks=128)
    engine.half.get_num_new_matched_tokens(one, 0)
    one.block_hashes = hashes = Counting(one.block_hashes)
    tables = (list(range(1, 129)),)
    table = [*engine.pool.blocks, *Pool(256).blocks[64:]]
    engine.pool.blocks = table
    engine.answer(engine.step(one, tables, one.num_tokens))
    events = engine.half.take_events()
    assert len(events) == 128
    assert events[0].parent_block_hash is None
    assert events[5].parent_block_hash == events[4].block_hashes[-1]
    assert hashes.taken <= 4 * 128


def test_nothing_is_kept_of_saves_that_came_to_nothing(make):
    """It used to keep their tokens and hashes for ever."""
    engine = make()
    one = request()
    engine.half.get_num_new_matched_tokens(one, 0)
    engine.answer(engine.step(one, ([1, 2, 3],), one.num_tokens), failures=1)
    assert engine.half.take_events() == []
    assert engine.half.held()["events"] == 0
    other = request("other", seed=7)
    engine.stored(other, ([4, 5, 6],))
    assert engine.half.held()["events"] == 3


# -- adapters --------------------------------------------------------------------------------------


def adapted(name="r", path="/a"):
    asked = request(name)
    asked.lora_request = SimpleNamespace(
        lora_name="a", lora_int_id=1, lora_path=path, load_inplace=False
    )
    return asked


def test_kv_of_an_adapter_is_found_by_its_weights_wherever_they_are(make):
    engine = make(lora=True)
    engine.loaded("x")
    engine.stored(adapted(), ([1, 2, 3],))
    assert engine.half.get_num_new_matched_tokens(adapted("again", path="/b"), 0) == 12
    assert engine.half.get_num_new_matched_tokens(request("without"), 0) == 0
    engine.loaded("y", 1)
    assert engine.half.get_num_new_matched_tokens(adapted("other"), 0) == 0


def test_an_adapter_is_not_guessed_at(make):
    engine = make(lora=True)
    asked = adapted()
    assert engine.half.get_num_new_matched_tokens(asked, 0) is None
    engine.loaded("")
    assert engine.half.get_num_new_matched_tokens(asked, 0) == 0
    assert engine.step(asked, ([1, 2, 3],), 13).saves == []
    engine.half.request_finished("r")


def test_what_an_adapter_becomes_while_a_request_runs_is_not_stored_under_what_it_was(make):
    engine = make(lora=True)
    engine.loaded("x")
    asked = adapted()
    engine.half.get_num_new_matched_tokens(asked, 0)
    work = engine.step(asked, ([1, 2, 3],), 4)
    assert len(work.saves) == 1
    engine.answer(work)
    engine.loaded("y", 1)
    assert engine.step(asked, ([1, 2, 3],), 9).saves == []
    assert engine.half.get_num_new_matched_tokens(asked, 0) == 0, (
        "preempted: it goes on as it is now"
    )


def test_what_the_prefix_cache_has_of_an_adapter_s_former_weights_is_not_stored(make):
    engine = make(lora=True)
    engine.loaded("x")
    engine.half.get_num_new_matched_tokens(adapted(), 0)
    engine.loaded("y", 1)
    hit = adapted("hit")
    engine.half.get_num_new_matched_tokens(hit, 4)
    assert engine.step(hit, ([1, 2, 3],), 13).saves == []
    clean = adapted("clean")
    engine.half.get_num_new_matched_tokens(clean, 0)
    assert len(engine.step(clean, ([4, 5, 6],), 13).saves) == 3
