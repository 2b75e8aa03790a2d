"""Several connectors in one: KVConnectMulti, and vLLM's own MultiConnector with ours below it.

The model is a random one whose answers show wrong KV at once; the oracle is the prefill engine.
"""

import itertools
import socket
from typing import Any

from multi import BLOCK, MultiPair, forget, stored
from pair import in_parallel, words

from kvconnect.vllm.multi.params import APART
from kvconnect.vllm.params import TICKET_KEY

PEERS = "KVConnectNixl", "KVConnectMooncake"


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


def with_dead_peer(params: dict[str, Any], label: str) -> dict[str, Any]:
    """``params`` of two children, that say of one's engine that it is where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = {"remote_port": gone.getsockname()[1], TICKET_KEY: None}
    apart = params[APART]
    if apart["first"] == label:
        return params | dead
    others = apart["others"] | {label: apart["others"][label] | dead}
    return params | {APART: apart | {"others": others}}


def test_two_prefill_decode_children_hand_over_by_params_of_their_own(coexisting_pair: MultiPair):
    """The second one's travel beside; the leases of both end with the load, read or not."""
    for seed, label in enumerate(PEERS):
        coexisting_pair.prefer(label)
        prompt = words(5 * BLOCK + 9, seed=seed + 80)
        before = coexisting_pair.seen()
        params = coexisting_pair.prefilled(prompt)
        assert params[APART]["first"] == "KVConnectNixl"
        assert params[APART]["others"].keys() == {"KVConnectMooncake"}
        answer = coexisting_pair.decode.tokens(prompt, kv_transfer_params=params)
        assert answer == coexisting_pair.prefill.tokens(prompt)
        assert coexisting_pair.since(before) == {"tokens_from_peers": len(prompt)}
    coexisting_pair.prefer("peers")
    prompts = [words(200 + 90 * n, seed=90 + n) for n in range(6)]
    before = coexisting_pair.seen()
    answers = in_parallel(coexisting_pair.tokens, prompts)
    assert coexisting_pair.since(before) == {"tokens_from_peers": sum(map(len, prompts))}
    assert answers == in_parallel(coexisting_pair.prefill.tokens, prompts)
    forget(coexisting_pair.prefill)  # which a block that is lent would refuse


def test_of_two_peers_one_stands_in_for_the_other_that_is_dead(coexisting_pair: MultiPair):
    for seed, (dead, other) in enumerate([PEERS, PEERS[::-1]]):
        coexisting_pair.prefer(dead)
        prompt = words(5 * BLOCK + 9, seed=seed + 100)
        params = with_dead_peer(coexisting_pair.prefilled(prompt), dead)
        before = coexisting_pair.seen()
        answer = coexisting_pair.decode.tokens(prompt, kv_transfer_params=params)
        assert answer == coexisting_pair.prefill.tokens(prompt)
        seen = coexisting_pair.since(before)
        assert seen == {"tokens_from_peers": len(prompt), "fallbacks": 1}
        log = coexisting_pair.decode.server.log.read_text()
        assert f"of 6 chunks 6 from {other} that {dead} failed" in log


def test_params_of_one_child_alone_are_seen_by_both_and_only_its_like_can_use_them(
    coexisting_pair: MultiPair,
):
    """As from a prefill engine with one of the two. The other kind's is refused by greeting."""
    for seed, (label, preferred) in enumerate(itertools.product(PEERS, PEERS)):
        coexisting_pair.prefer(preferred)
        prompt = words(3 * BLOCK + 9, seed=seed + 120)
        params = coexisting_pair.prefilled(prompt)
        apart = params.pop(APART)
        own = apart["others"].get(label, params)
        before = coexisting_pair.seen()
        answer = coexisting_pair.decode.tokens(prompt, kv_transfer_params=own)
        assert answer == coexisting_pair.prefill.tokens(prompt)
        seen = coexisting_pair.since(before)
        assert seen.pop("fallbacks", 0) == (preferred != label)
        assert seen == {"tokens_from_peers": len(prompt)}


def test_of_two_peers_that_are_dead_nothing_is_had_and_all_is_computed(coexisting_pair: MultiPair):
    """The last test of this pair."""
    prompt = words(5 * BLOCK + 9, seed=110)
    expected = coexisting_pair.prefill.tokens(prompt)
    params = coexisting_pair.prefilled(prompt)
    coexisting_pair.prefill.server.kill()
    before = coexisting_pair.seen()
    assert coexisting_pair.decode.tokens(prompt, kv_transfer_params=params) == expected
    lost = {"tokens_lost": len(prompt), "computed": len(prompt), "fallbacks": 1}
    assert coexisting_pair.since(before) == lost


def test_with_tp_2_and_sliding_windows_memory_and_the_peer_make_one_load(windowed_pair: MultiPair):
    """Sliding windows end within the peer's part of the first load, in memory's of the second.

    The last token is left to decode.
    """
    prompt = words(6 * BLOCK + 9, seed=121)
    stored(windowed_pair.decode, prompt, 4)
    expected, before = windowed_pair.prefill.tokens(prompt), windowed_pair.seen()
    assert windowed_pair.tokens(prompt) == expected
    assert windowed_pair.since(before) == {
        "tokens_from_host": 4 * BLOCK,
        "tokens_from_peers": 2 * BLOCK + 8,
        "computed": 1,
    }
    prompt = words(7 * BLOCK + 2, seed=122)
    expected = windowed_pair.prefill.tokens(prompt)
    stored(windowed_pair.decode, prompt, 7)
    params = windowed_pair.prefilled(prompt[: 3 * BLOCK + 1])
    windowed_pair.prefer("peers")
    before = windowed_pair.seen()
    assert windowed_pair.decode.tokens(prompt, kv_transfer_params=params) == expected
    assert windowed_pair.since(before) == {
        "tokens_from_peers": 3 * BLOCK,
        "tokens_from_host": 4 * BLOCK,
        "computed": 2,
    }
    windowed_pair.prefer("stores")
    forget(windowed_pair.prefill)
    forget(windowed_pair.decode)


def test_with_tp_2_a_rank_whose_memory_is_damaged_is_helped_by_the_peer(windowed_pair: MultiPair):
    """The other one takes its own. Tokens are counted by the first rank, whichever that is."""
    prompt = words(5 * BLOCK + 3, seed=123)
    stored(windowed_pair.decode, prompt, 5)
    windowed_pair.damage(ranks=1)
    expected, before = windowed_pair.prefill.tokens(prompt), windowed_pair.seen()
    assert windowed_pair.tokens(prompt) == expected
    seen = windowed_pair.since(before)
    assert (seen.pop("fallbacks"), seen.pop("computed")) == (1, 1)
    assert sum(seen.values()) == 5 * BLOCK + 2
    assert "tokens_lost" not in seen


def test_with_tp_2_and_sliding_windows_a_load_whose_peer_is_dead_starts_over(
    windowed_pair: MultiPair,
):
    """The last test of this pair. Memory has 4 of 6 blocks of both prompts.

    Those of the second are damaged at one rank, which then has nothing at all.
    """
    prompts = [words(6 * BLOCK + 5, seed=s) for s in (124, 125)]
    expected = [windowed_pair.prefill.tokens(prompt) for prompt in prompts]
    stored(windowed_pair.decode, prompts[1], 4)
    windowed_pair.damage(ranks=1)
    stored(windowed_pair.decode, prompts[0], 4)
    tickets = [windowed_pair.prefilled(prompt) for prompt in prompts]
    windowed_pair.prefill.server.kill()
    before = windowed_pair.seen()

    def ask(prompt, ticket):
        return windowed_pair.decode.tokens(prompt, kv_transfer_params=ticket)

    answers = in_parallel(lambda asked: ask(*asked), list(zip(prompts, tickets, strict=True)))
    assert answers == expected
    seen = windowed_pair.since(before)
    assert seen["fallbacks"] == 1
    assert seen["computed"] == 2 * BLOCK + 5 + len(prompts[1])


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
