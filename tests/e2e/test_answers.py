"""Right answers: through a transfer as from the engine's own prefix cache."""

import re
from typing import Any

import pytest
from pair import IPV6, Client, Pair, eventually, has_ipv6, in_parallel, words

BLOCK = 128  # vLLM's default on CPU
LENGTHS = [1, 2, 5, 31, 64, 127, 128, 129, 130, 200, 255, 256, 257, 300, 383, 384, 385, 500]
LENGTHS += [511, 513, 600, 640, 641, 700, 767, 769, 800, 900, 1000, 1023, 1025, 1500, 2048, 4000]


def test_every_prompt_of_1_to_4000_tokens_is_answered_as_by_the_engine_alone(pair: Pair):
    failures = "vllm:nixl_num_failed_transfers_total"
    before, read_before = pair.computed_at_decode(), pair.transferred()
    failed_before = pair.decode.metric(failures)
    prompts = [words(length, seed=length) for length in LENGTHS]
    through, alone = both_ways(pair, prompts)
    assert pair.computed_at_decode() - before <= 1  # the prompt of one token
    assert pair.transferred() > read_before
    wrong = [n for n, a, b in zip(LENGTHS, through, alone, strict=True) if a != b]
    assert not wrong, f"prompts of {wrong} tokens got other answers"
    assert pair.decode.metric(failures) == failed_before


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_logprobs_equal_those_of_a_local_hit_of_the_same_length(pair: Pair, blocks: int):
    """Equal hit length, so equal chunks, so equal to the last bit in float32."""
    prompt = words(blocks * BLOCK + 1, seed=blocks + 7000)
    params = pair.prefilled(prompt)
    asked = {"max_tokens": 8, "logprobs": 3}
    _, loaded = pair.decode.post(prompt, kv_transfer_params=params, **asked)
    _, local = pair.decode.post(prompt, **asked)
    assert loaded["choices"][0]["token_ids"] == local["choices"][0]["token_ids"]
    ours = loaded["choices"][0]["logprobs"]["token_logprobs"]
    assert ours == local["choices"][0]["logprobs"]["token_logprobs"]


def test_only_what_is_not_cached_at_decode_is_fetched(pair: Pair):
    first = words(4 * BLOCK, seed=1)
    longer = first + words(2 * BLOCK, seed=2)
    one_block = pair.transferred()
    pair.tokens(words(BLOCK, seed=3))
    one_block = pair.transferred() - one_block
    pair.tokens(first)
    before = pair.transferred()
    pair.tokens(longer)
    assert pair.transferred() - before == 2 * one_block


def test_a_prompt_that_decode_has_already_is_not_fetched_and_its_lease_is_released(pair: Pair):
    prompt = words(3 * BLOCK + 1, seed=4)
    answer = pair.tokens(prompt)
    before = pair.transferred()
    again = pair.tokens(prompt)
    one_block = 1 * pair.transferred() - before  # the last, partial one is never cached
    assert again == answer
    assert 0 < one_block < 10e6
    assert pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 0


def test_tp_1_to_2_with_a_secret_under_vllms_name(secret_pair: Pair):
    check_some_prompts(secret_pair, longest=1025)


def test_tp_2_to_1(crowded_pair: Pair):
    check_some_prompts(crowded_pair, longest=1500)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_samples_of_one_prompt_load_it_once_and_end_its_lease(pair: Pair, count: int):
    """Used to be: 10 of 120 failed, and 91 leases were left to expire."""
    used, expired = "vllm:kv_cache_usage_perc", "vllm:nixl_num_kv_expired_reqs_total"
    eventually(lambda: pair.prefill.metric(used) == 0, 40, "leases of other tests have ended")
    before = pair.prefill.metric(expired)
    prompts = [words(3 * BLOCK + 7, seed=8800 + 10 * count + i) for i in range(6)]
    params = [pair.prefilled(prompt) for prompt in prompts]
    asked = {"max_tokens": 4, "n": count, "temperature": 1.0, "top_k": 1}  # greedy may not have n

    def through(at: int) -> list[list[int]]:
        status, body = pair.decode.post(prompts[at], kv_transfer_params=params[at], **asked)
        assert status == 200, body
        return [choice["token_ids"] for choice in body["choices"]]

    answers = in_parallel(through, list(range(6)))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == [pair.prefill.tokens(prompt, 4)] * count
    eventually(lambda: pair.prefill.metric(used) == 0, 60, "leases ended")
    assert pair.prefill.metric(expired) == before


def test_sliding_window_and_full_attention_groups(hybrid_pair: Pair):
    """The last token is left to decode: its window starts before what a full hit would keep.

    With a window of 256 and blocks of 128 that shows at prompts of 128 k + 127 tokens.
    """
    check_windows(hybrid_pair)


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback address")
def test_kv_goes_over_ipv6_whose_addresses_are_in_brackets_in_logs(hybrid_pair: Pair):
    prompt = words(500, seed=71)
    lent = hybrid_pair.prefilled(prompt)
    assert lent["remote_host"] == IPV6
    answer = hybrid_pair.decode.tokens(prompt, 8, kv_transfer_params=lent)
    assert answer == hybrid_pair.prefill.tokens(prompt, 8)
    for client in (hybrid_pair.prefill, hybrid_pair.decode):
        assert re.search(rf"offers .* at \[{IPV6}\]:\d+", client.server.log.read_text())
    assert hybrid_pair.decode.metric("vllm:nixl_num_failed_transfers_total") == 0


def test_sliding_windows_with_blocks_of_32_to_128_tokens(hybrid_blocks_pair: Pair):
    """Prefill has let go of the first tokens of the first block that decode's window is in."""
    check_windows(hybrid_blocks_pair)
    # what begins alike and ends earlier sees tokens that were not handed over
    for whole, length in ((3000, 2950), (1151, 1030), (700, 650)):
        prompt = words(whole, seed=whole + 300)[:length]
        alone = hybrid_blocks_pair.prefill.tokens(prompt, 8)
        assert hybrid_blocks_pair.decode.tokens(prompt, 8) == alone, length


def check_windows(pair: Pair) -> None:
    lengths = [1, 2, 100, 255, 256, 257, 383, 384, 511, 639, 700, 1025, 1151, 2049, 3000]
    prompts = [words(n, seed=n + 300) for n in lengths]
    before = pair.computed_at_decode()
    asked = {"max_tokens": 8, "logprobs": 1}

    def through(prompt):
        params = pair.prefilled(prompt)
        return pair.decode.post(prompt, kv_transfer_params=params, **asked)[1]

    loaded = in_parallel(through, prompts)
    assert pair.computed_at_decode() - before <= len(prompts)
    for length, prompt, ours in zip(lengths, prompts, loaded, strict=True):
        alone = pair.prefill.post(prompt, **asked)[1]["choices"][0]
        ours = ours["choices"][0]
        assert ours["token_ids"] == alone["token_ids"], length
        assert ours["logprobs"]["token_logprobs"] == pytest.approx(
            alone["logprobs"]["token_logprobs"], abs=1e-3
        ), length


def test_pipeline_parallel_prefill(pipeline_pair: Pair):
    check_some_prompts(pipeline_pair)


def test_requests_preempted_for_want_of_blocks_are_answered_right(crowded_pair: Pair):
    prompts = [words(300 + 40 * i, seed=900 + i) for i in range(12)]
    through = in_parallel(lambda p: crowded_pair.tokens(p, 200), prompts, workers=12)
    alone = in_parallel(lambda p: crowded_pair.prefill.tokens(p, 200), prompts)
    assert through == alone
    preempted = crowded_pair.decode.metric("vllm:num_preemptions_total")
    assert preempted > 0, "the engine had room for all: the test shows nothing"


def test_blocks_of_32_to_128_tokens_and_tp_2_to_1(small_blocks_pair: Pair):
    check_some_prompts(small_blocks_pair, longest=1500)


def test_blocks_of_128_to_32_tokens_through_staging_memory_alone(large_blocks_pair: Pair):
    check_some_prompts(large_blocks_pair)


def test_blocks_of_32_to_128_tokens_and_tp_1_to_2_over_mooncake(mooncake_pair: Pair):
    check_some_prompts(mooncake_pair, longest=1500)


def test_blocks_of_32_to_128_tokens_and_tp_1_to_2_over_ucx(ucx_pair: Pair):
    check_some_prompts(ucx_pair, longest=1500)


def test_attention_beside_recurrent_state(recurrent_pair: Pair):
    """State cannot step back: prefill leaves the last token of each prompt to decode."""
    check_some_prompts(recurrent_pair, longest=1500, left=1)


def test_bf16_prefill_to_fp8_decode_loses_no_more_than_an_fp8_engine_by_itself(
    quantizing_pair: Pair,
):
    """KV rounded once, on its way, is nearer to bf16 than KV that every layer computes from fp8."""
    pair = quantizing_pair
    prompts = [words(n, seed=n) for n in (64, 129, 300, 700, 1500)]
    single = words(1, seed=1)
    ours = first_token(pair.decode, single, kv_transfer_params=pair.prefilled(single))
    assert ours == first_token(pair.decode, single, cache_salt="alone"), "only its own KV matters"
    before = pair.computed_at_decode()
    ours = [first_token(pair.decode, p, kv_transfer_params=pair.prefilled(p)) for p in prompts]
    assert pair.computed_at_decode() == before
    bf16 = [first_token(pair.prefill, p) for p in prompts]
    alone = [first_token(pair.decode, p, cache_salt="alone") for p in prompts]
    lost, lost_alone = (mean_distance(bf16, other) for other in (ours, alone))
    assert 0 < lost <= lost_alone, (lost, lost_alone)


def first_token(engine: Client, prompt: list[int], **options: Any) -> dict[str, float]:
    """Log probabilities of the 20 likeliest first tokens."""
    status, answer = engine.post(prompt, max_tokens=1, logprobs=20, **options)
    assert status == 200, answer
    return answer["choices"][0]["logprobs"]["top_logprobs"][0]


def mean_distance(reference: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Of the log probabilities of each reference's five likeliest tokens."""
    found = []
    for a, b in zip(reference, other, strict=True):
        for token in sorted(a, key=a.__getitem__)[-5:]:
            found.append(abs(a[token] - b.get(token, min(b.values()))))
    return sum(found) / len(found)


def check_some_prompts(pair: Pair, longest: int = 3000, left: int = 0) -> None:
    """``left``: tokens of each prompt that decode computes anyway."""
    lengths = [1, 64, 127, 128, 129, 257, 512, 700, 1025, 1500, 2049, 3000]
    prompts = [words(n, seed=n + 500) for n in lengths if n <= longest]
    before = pair.computed_at_decode()
    through = in_parallel(pair.tokens, prompts)
    assert pair.computed_at_decode() - before <= max(1, left * len(prompts))
    assert through == in_parallel(pair.prefill.tokens, prompts)


def both_ways(pair: Pair, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Answers through a transfer, and of the prefill engine alone; neither engine waits idle."""
    answers = in_parallel(
        lambda prompt: (pair.tokens(prompt), pair.prefill.tokens(prompt)), prompts
    )
    return [one for one, _ in answers], [one for _, one in answers]
