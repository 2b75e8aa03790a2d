"""Stored KV on real engines: host memory, disk, a restart, damage, tensor parallelism."""

import re
import time

import pytest
import torch
from pair import eventually, in_parallel, words
from solo import Solo

from kvconnect.offload.store.runner import LOOK_AROUND_S

BLOCK = 128  # vLLM's default on CPU
LENGTHS = [1, 127, 128, 129, 300, 641]


def whole_blocks(prompts: list[list[int]]) -> int:
    """Tokens that can be had: of whole blocks, and never the last one of a prompt."""
    return sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


def test_prompts_come_back_from_host_memory_and_are_answered_the_same(keeper: Solo):
    prompts = [words(length, seed=length) for length in LENGTHS]
    alone = [keeper.tokens(prompt) for prompt in prompts]
    keeper.forget()
    loaded, computed = (
        keeper.tokens_from("external_kv_transfer"),
        keeper.tokens_from("local_compute"),
    )
    assert [keeper.tokens(prompt) for prompt in prompts] == alone
    most = whole_blocks(prompts)
    assert keeper.tokens_from("external_kv_transfer") - loaded == most
    rest = sum(map(len, prompts)) - most
    assert keeper.tokens_from("local_compute") - computed == rest
    assert keeper.offloaded("tokens_from_host") > 0
    assert keeper.offloaded("failed_chunks") == 0


def test_logprobs_equal_those_of_a_local_hit_of_the_same_length(keeper: Solo):
    """Equal hit length, so equal chunks, so equal to the last bit in float32."""
    for blocks in (1, 4):
        prompt = words(blocks * BLOCK + 1, seed=blocks + 7000)
        keeper.tokens(prompt, 1)
        keeper.forget()
        asked = {"max_tokens": 8, "logprobs": 3}
        before = keeper.tokens_from("external_kv_transfer")
        _, loaded = keeper.post(prompt, **asked)
        assert keeper.tokens_from("external_kv_transfer") - before == blocks * BLOCK
        _, local = keeper.post(prompt, **asked)
        ours, theirs = (answer["choices"][0]["logprobs"] for answer in (loaded, local))
        assert ours["token_logprobs"] == theirs["token_logprobs"]


def test_only_what_the_engine_does_not_have_is_loaded(keeper: Solo):
    first = words(2 * BLOCK, seed=71)
    longer = first + words(2 * BLOCK + 1, seed=72)
    alone = keeper.tokens(longer)
    keeper.forget()
    keeper.tokens([*first, 5])
    before = keeper.tokens_from("external_kv_transfer")
    assert keeper.tokens(longer) == alone
    assert keeper.tokens_from("external_kv_transfer") - before == 2 * BLOCK


def test_a_salt_sees_nothing_of_another(keeper: Solo):
    prompt = words(3 * BLOCK + 1, seed=81)
    alone = keeper.tokens(prompt, cache_salt="one")
    keeper.forget()
    before = keeper.tokens_from("external_kv_transfer")
    assert keeper.tokens(prompt, cache_salt="two") == alone
    assert keeper.tokens_from("external_kv_transfer") == before
    keeper.forget()
    assert keeper.tokens(prompt, cache_salt="one") == alone
    assert keeper.tokens_from("external_kv_transfer") - before == 3 * BLOCK


def test_a_client_limits_what_is_stored_and_cannot_do_harm(keeper: Solo):
    prompt = words(3 * BLOCK + 1, seed=91)
    limit = {"kv_transfer_params": {"max_offload_tokens": 2 * BLOCK}}
    alone = keeper.tokens(prompt, 4, **limit)
    keeper.forget()
    before = keeper.tokens_from("external_kv_transfer")
    assert keeper.tokens(prompt, 4, **limit) == alone
    assert keeper.tokens_from("external_kv_transfer") - before == 2 * BLOCK
    for odd in (-1, "many", [1], {"a": 1}, 1e300, True):
        assert keeper.tokens(words(5, seed=92), 1, kv_transfer_params={"max_offload_tokens": odd})


def test_after_kill_9_prompts_come_from_disk_and_damage_is_computed_again(keeper: Solo):
    """Memory has room for 10 chunks: of 3 × 5 some are on disk alone."""
    prompts = [words(5 * BLOCK + 1, seed=s) for s in (101, 102, 103)]
    alone = [keeper.tokens(prompt) for prompt in prompts]
    keeper.forget()  # which waits until all is saved; writing to disk follows
    keeper.wait_written()
    keeper.restart()
    assert [keeper.tokens(prompt) for prompt in prompts] == alone
    assert keeper.tokens_from("external_kv_transfer") == whole_blocks(prompts)
    assert keeper.offloaded("tokens_from_disk") >= 5 * BLOCK
    assert keeper.offloaded("failed_chunks") == 0
    keeper.forget()
    assert keeper.damage() == 2  # memory and disk
    assert [keeper.tokens(prompt) for prompt in prompts] == alone
    assert keeper.offloaded("digest_mismatches") > 0
    assert keeper.offloaded("failed_chunks") > 0
    keeper.forget()  # what was computed again was stored again
    before = keeper.tokens_from("external_kv_transfer")
    assert keeper.tokens(prompts[-1]) == alone[-1]
    assert keeper.tokens_from("external_kv_transfer") - before == 5 * BLOCK


def test_a_disk_that_is_cut_short_or_full_costs_time_and_nothing_else(keeper: Solo):
    """After it nothing is written any more until a restart, so it is the keeper's last."""
    prompts = [words(5 * BLOCK + 1, seed=s) for s in (201, 202, 203)]
    alone = [keeper.tokens(prompt) for prompt in prompts]
    keeper.forget()
    keeper.wait_written()
    keeper.empty_disk_files()
    failed = keeper.offloaded("read_failures")
    assert [keeper.tokens(prompt) for prompt in prompts] == alone
    assert keeper.offloaded("read_failures") > failed
    keeper.forget()
    keeper.limit_files(8 << 20)  # of a file of 1 GiB
    dropped, written = keeper.offloaded("dropped_writes"), keeper.offloaded("disk_writes")
    prompts = [words(5 * BLOCK + 1, seed=s) for s in (204, 205, 206)]
    alone = [keeper.tokens(prompt) for prompt in prompts]
    keeper.forget()
    eventually(lambda: keeper.offloaded("dropped_writes") - dropped >= 10, 60, "writes fail")
    assert keeper.offloaded("disk_writes") - written <= 2, "the disk was not full"
    before = keeper.tokens_from("external_kv_transfer")
    assert [keeper.tokens(prompt) for prompt in reversed(prompts)] == alone[::-1]
    assert keeper.tokens_from("external_kv_transfer") - before >= 5 * BLOCK, "memory serves on"


def test_what_one_engine_stores_another_loads_and_write_back_keeps_what_memory_evicts(
    sharers: tuple[Solo, Solo],
):
    """Write-back: what did not fit into the first one's memory is on its disk alone."""
    first, second = sharers
    prompts = [words(5 * BLOCK + 1, seed=s) for s in range(301, 307)]
    alone = [second.tokens(prompt, cache_salt="alone") for prompt in prompts]
    assert first.offloaded("disk_writes") == 0, "write-back writes what memory evicts"
    assert [first.tokens(prompt) for prompt in prompts] == alone
    first.forget()
    first.wait_written()
    assert first.offloaded("evictions") >= 3 * 5
    assert first.offloaded("disk_writes") >= 3 * 5
    time.sleep(5 * LOOK_AROUND_S)
    before = second.tokens_from("external_kv_transfer")
    assert [second.tokens(prompt) for prompt in prompts] == alone
    assert second.tokens_from("external_kv_transfer") - before == whole_blocks(prompts)
    assert second.offloaded("tokens_from_beside") >= 5 * 5 * BLOCK
    again = [first.tokens(prompt) for prompt in prompts]  # its own, from both tiers
    assert again == alone
    assert first.offloaded("tokens_from_disk") > 0
    for engine in sharers:
        assert engine.offloaded("failed_chunks") == 0


def test_what_is_damaged_at_a_neighbour_is_computed_and_a_dead_one_is_read_on(
    sharers: tuple[Solo, Solo],
):
    first, second = sharers
    prompts = [words(3 * BLOCK + 1, seed=s) for s in range(311, 314)]
    alone = [second.tokens(prompt, cache_salt="alone") for prompt in prompts]
    assert [first.tokens(prompt) for prompt in prompts] == alone
    first.forget()
    time.sleep(5 * LOOK_AROUND_S)
    first.server.kill()
    before = second.tokens_from("external_kv_transfer")
    assert second.tokens(prompts[0]) == alone[0]
    assert second.tokens_from("external_kv_transfer") - before == 3 * BLOCK
    second.damage()
    assert [second.tokens(prompt) for prompt in prompts[1:]] == alone[1:]
    assert second.offloaded("failed_chunks") > 0


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="without AMX vLLM has no prefix cache for MLA on CPUs",
)
def test_kv_that_both_ranks_hold_alike_is_stored_once(latent_keeper: Solo):
    """bf16: compared with a local hit of the same length."""
    prompt = words(4 * BLOCK + 1, seed=401)
    stored = latent_keeper.metric("vllm:kv_offload_store_bytes_total")
    latent_keeper.tokens(prompt, 1)
    local = latent_keeper.tokens(prompt)
    latent_keeper.forget()
    before = latent_keeper.tokens_from("external_kv_transfer")
    assert latent_keeper.tokens(prompt) == local
    assert latent_keeper.tokens_from("external_kv_transfer") - before == 4 * BLOCK
    assert latent_keeper.offloaded("failed_chunks") == 0
    chunk = 4 * BLOCK * 576 * 2  # 4 layers, a latent vector of 576 in bf16
    assert latent_keeper.metric("vllm:kv_offload_store_bytes_total") - stored == 4 * chunk


def test_tp_2_with_sliding_windows_few_blocks_preemption_and_eviction(crowded_keeper: Solo):
    """Under load, in parallel, twice; then one by one, all computed (another salt)."""
    prompts = [words(200 + 70 * i, seed=900 + i) for i in range(10)]

    def ask(prompt):
        return crowded_keeper.tokens(prompt, 48)

    first = in_parallel(ask, prompts, workers=10)
    crowded_keeper.forget()
    before = crowded_keeper.tokens_from("external_kv_transfer")
    again = in_parallel(ask, prompts, workers=10)
    loaded = crowded_keeper.tokens_from("external_kv_transfer") - before
    alone = [crowded_keeper.tokens(p, 48, cache_salt="alone") for p in prompts]
    assert first == alone
    assert again == alone
    assert loaded > 0
    assert crowded_keeper.offloaded("evictions") > 0
    assert crowded_keeper.offloaded("failed_chunks") == 0
    log = crowded_keeper.server.log.read_text()
    for rank in range(2):
        assert re.search(rf"rank {rank} of 2 .* \(0.01 GiB; all ranks together 0.02 GiB\)", log)
    preempted = crowded_keeper.metric("vllm:num_preemptions_total")
    assert preempted > 0, "the engine had room for all: the test shows nothing"
