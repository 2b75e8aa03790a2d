"""A next turn loads at prefill what decode holds: blocks of 128 tokens to 32, and TP 1 to 2."""

import itertools
from typing import Any

from pair import PREFILL, Client, Pair, eventually, proxied

numbers = itertools.count()
STAYS = {"do_remote_prefill": False, "do_remote_decode": False}


def user(seed: int, words: int = 400) -> dict[str, str]:
    return {"role": "user", "content": " ".join(str(seed * 1000 + n) for n in range(words))}


def chat(
    client: Client,
    messages: list[dict[str, str]],
    params: Any,
    max_tokens: int = 200,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """What a client is answered, and the params that come with it."""
    body = {"model": client.model, "messages": messages, "temperature": 0, "ignore_eos": True}
    body |= {"max_tokens": max_tokens, "kv_transfer_params": params, **options}
    status, answer = client.request("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer.get("kv_transfer_params")


def alone(client: Client, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The answer of an engine that has none of it cached."""
    return chat(client, messages, None, max_tokens, cache_salt=f"{next(numbers)}")[0]


def next_turn(
    pair: Pair, messages: list[dict[str, str]], held: Any, max_tokens: int = 24
) -> tuple[str, float]:
    """The answer, and how many tokens of the prompt prefill computed itself."""
    local = {"source": "local_compute"}
    before = pair.prefill.metric("vllm:prompt_tokens_by_source_total", **local)
    order = PREFILL if held is None else held | {"do_remote_decode": True}
    _, params = chat(pair.prefill, messages, order, max_tokens=1)
    computed = pair.prefill.metric("vllm:prompt_tokens_by_source_total", **local) - before
    return chat(pair.decode, messages, params, max_tokens)[0], computed


def test_prefill_computes_what_decode_has_not(small_blocks_pair: Pair):
    """A template that leaves reasoning out has the second prompt part from what was answered."""
    pair, first = small_blocks_pair, [user(1)]
    answer, held = chat(pair.decode, first, STAYS)
    assert held["do_remote_decode"] and held["remote_num_tokens"] > 400
    plain = [user(2)]
    said, _ = chat(pair.decode, plain, STAYS)

    whole = [*first, {"role": "assistant", "content": answer}, user(3, words=20)]
    expected = alone(pair.decode, whole, 24)
    found, computed = next_turn(pair, whole, held)
    assert found == expected

    without = [*plain, {"role": "assistant", "content": said}, user(3, words=20)]
    _, all_of_it = next_turn(pair, without, None)
    assert computed < all_of_it / 3, f"{computed:.0f} tokens, and {all_of_it:.0f} without reuse"


def test_a_turn_without_the_reasoning_loads_what_agrees(small_blocks_pair: Pair):
    pair, first = small_blocks_pair, [user(4)]
    answer, held = chat(pair.decode, first, STAYS)
    stripped = answer[len(answer) // 2 :]
    turn = [*first, {"role": "assistant", "content": stripped}, user(5, words=20)]
    expected = alone(pair.decode, turn, 24)
    found, computed = next_turn(pair, turn, held)
    assert found == expected
    _, all_of_it = next_turn(pair, [user(6), *turn[1:]], None)
    assert computed < all_of_it / 2, f"{computed:.0f} tokens, and {all_of_it:.0f} without reuse"


def test_params_that_do_not_fit_any_more_cost_nothing_but_time(small_blocks_pair: Pair):
    pair, first = small_blocks_pair, [user(7)]
    answer, held = chat(pair.decode, first, STAYS)
    turn = [*first, {"role": "assistant", "content": answer}, user(8, words=20)]
    others = [user(9), *turn[1:]]
    wrong = {"another conversation's": (others, held), "used already": (turn, held)}
    wrong["no ticket"] = (turn, held | {"kvconnect": "forged"})
    for what, (messages, params) in wrong.items():
        found, computed = next_turn(pair, messages, params)
        assert found == alone(pair.decode, messages, 24), what
        if what == "another conversation's":
            assert computed > 400


def test_a_turn_that_stays_at_decode_ends_what_decode_lent(small_blocks_pair: Pair):
    """Its blocks used to be held for as long as a next turn's prefill might have come for them."""
    pair, first = small_blocks_pair, [user(8)]

    def ended() -> float:
        return pair.decode.metric("vllm:kvconnect_leases_total", event="ended")

    with proxied(pair, "--min-prefill-tokens", "300") as client:
        said, held = chat(client, first, None)
        assert held["do_remote_decode"]
        turn = [*first, {"role": "assistant", "content": said}, user(9, words=20)]
        expected, before = alone(pair.decode, turn, 24), ended()
        assert chat(client, turn, None, 24)[0] == expected
        assert client.request("GET", "/health")[1]["counters"]["short"] == 1
        eventually(lambda: ended() > before, 60, "the lease on the first turn has ended")
