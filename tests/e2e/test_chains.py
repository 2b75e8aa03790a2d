"""Several connectors in one: KVConnectMulti, and vLLM's own MultiConnector with ours below it.

The model is a random one whose answers show wrong KV at once; the oracle is the prefill engine.
"""

from multi import BLOCK, MultiPair, forget, stored
from pair import in_parallel, words


def test_a_load_takes_its_head_from_memory_and_the_rest_from_the_peer(multi_pair: MultiPair):
    prompt = words(6 * BLOCK + 9, seed=1)
    stored(multi_pair.decode, prompt, 4)
    expected, before = multi_pair.prefill.tokens(prompt), multi_pair.seen()
    assert multi_pair.tokens(prompt) == expected
    assert multi_pair.since(before) == {
        "tokens_from_host": 4 * BLOCK,
        "tokens_from_peers": 2 * BLOCK + 9,
    }


def test_a_ticket_for_the_first_blocks_goes_on_with_what_memory_has(multi_pair: MultiPair):
    """The peer is preferred, and has blocks 0–2; memory has 0–5; the last token is computed."""
    prompt = words(6 * BLOCK + 1, seed=2)
    expected = multi_pair.prefill.tokens(prompt)
    stored(multi_pair.decode, prompt, 6)
    params = multi_pair.prefilled(prompt[: 3 * BLOCK])
    multi_pair.prefer("peers")
    before = multi_pair.seen()
    answer = multi_pair.decode.tokens(prompt, kv_transfer_params=params)
    assert answer == expected
    assert multi_pair.since(before) == {
        "tokens_from_peers": 3 * BLOCK,
        "tokens_from_host": 3 * BLOCK,
        "computed": 1,
    }
    multi_pair.prefer("stores")


def test_damaged_memory_is_made_up_for_by_the_peer_within_the_load(multi_pair: MultiPair):
    prompt = words(5 * BLOCK + 3, seed=3)
    stored(multi_pair.decode, prompt, 4)
    multi_pair.damage()
    expected, before = multi_pair.prefill.tokens(prompt), multi_pair.seen()
    assert multi_pair.tokens(prompt) == expected
    seen = multi_pair.since(before)
    assert seen == {"tokens_from_peers": 5 * BLOCK + 3, "fallbacks": 1}


def test_under_load_all_answers_are_right_and_nothing_is_held(multi_pair: MultiPair):
    prompts = [words(300 + 90 * n, seed=40 + n) for n in range(8)]
    expected = in_parallel(multi_pair.prefill.tokens, prompts)
    for n, prompt in enumerate(prompts):
        if n % 2:
            stored(multi_pair.decode, prompt, 1 + n // 3)
    assert in_parallel(multi_pair.tokens, prompts, 8) == expected
    assert in_parallel(multi_pair.decode.tokens, prompts, 8) == expected
    forget(multi_pair.prefill)  # which a block that is lent, or referenced, would refuse
    forget(multi_pair.decode)


def test_a_dead_peer_is_made_up_for_by_memory_and_the_rest_is_computed(multi_pair: MultiPair):
    """The last test of this pair. Memory has 4 of 6 blocks, which are not computed again."""
    prompts = [words(6 * BLOCK + 5, seed=s) for s in (5, 6, 7)]
    expected = [multi_pair.prefill.tokens(prompt) for prompt in prompts]
    for prompt in prompts[:2]:
        stored(multi_pair.decode, prompt, 4)
    tickets = [multi_pair.prefilled(prompt) for prompt in prompts]
    multi_pair.prefill.server.kill()

    def ask(number, prefer):
        multi_pair.prefer(prefer)
        before = multi_pair.seen()
        params = {"kv_transfer_params": tickets[number]}
        assert multi_pair.decode.tokens(prompts[number], **params) == expected[number]
        return multi_pair.since(before)

    kept = {"tokens_from_host": 4 * BLOCK, "tokens_lost": 2 * BLOCK + 5}
    assert ask(0, "stores") == kept
    assert ask(1, "peers") == kept | {"fallbacks": 1}
    log = multi_pair.decode.server.log.read_text()
    assert "4 from host that KVConnectNixl failed, 3 that nobody could give" in log
    # by vLLM's count these were loaded: only its log tells what it computed of them
    assert log.count(f"1 request(s) rescheduled ({2 * BLOCK + 5} tokens affected)") == 2
    everything = 6 * BLOCK + 5
    assert ask(2, "peers") == {"tokens_lost": everything, "computed": everything}


def test_ours_below_in_trees_multi_connector_hand_over_and_keep(in_tree_pair: MultiPair):
    """The first request of a fresh engine is handed over already; both families are counted."""
    prompts = [words(4 * BLOCK + 7, seed=s) for s in range(60, 64)]
    answers = in_parallel(in_tree_pair.tokens, prompts)
    assert in_tree_pair.computed_at_decode() == 0
    assert in_tree_pair.transferred() > 0
    expected = in_parallel(in_tree_pair.prefill.tokens, prompts)
    assert answers == expected
    for engine in (in_tree_pair.prefill, in_tree_pair.decode):
        forget(engine)
        assert in_parallel(engine.tokens, prompts) == expected
        from_host = engine.metric("vllm:kvconnect_offload_tokens_from_host_total")
        assert from_host == len(prompts) * 4 * BLOCK
