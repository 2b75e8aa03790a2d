"""Reset and pause of real engines while leases are out; `lifecycle.py` does more, and takes longer.

Each used to last until the leases were over (10 s here), or to fail.
"""

import concurrent.futures
import time

from pair import Client, Pair, eventually, words

LEASE_S = 10  # of `pair`
FREE, EXPIRED = "vllm:kv_cache_usage_perc", "vllm:nixl_num_kv_expired_reqs_total"


def post(client: Client, path: str) -> dict:
    """What it answers."""
    status, answer = client.request("POST", path)
    assert status == 200, answer
    return answer


def test_a_reset_revokes_leases_and_what_they_held_is_computed_at_decode(pair: Pair):
    prompt = words(700, seed=71)
    params, expired = pair.prefilled(prompt), pair.prefill.metric(EXPIRED)
    answer = post(pair.prefill, "/reset_prefix_cache?reset_running_requests=true")
    assert answer == {"success": True}
    eventually(lambda: pair.prefill.metric(FREE) == 0, 60, "all are free")
    assert pair.prefill.metric(EXPIRED) == expired, "it waited until the lease was over"
    computed = pair.computed_at_decode()
    answer = pair.decode.tokens(prompt, 12, kv_transfer_params=params)
    assert pair.computed_at_decode() - computed >= 700
    assert answer == pair.prefill.tokens(prompt)


def test_a_pause_waits_for_no_lease_and_leases_are_read_during_it(pair: Pair):
    prompt = words(700, seed=72)
    params, computed = pair.prefilled(prompt), pair.computed_at_decode()
    post(pair.prefill, "/pause?mode=keep&clear_cache=false")
    try:  # what can be read did not have to be over for the pause
        answer = pair.decode.tokens(prompt, 12, kv_transfer_params=params)
        assert pair.computed_at_decode() - computed < 128
    finally:
        post(pair.prefill, "/resume")
    assert answer == pair.prefill.tokens(prompt)
    eventually(lambda: pair.prefill.metric(FREE) == 0, 60, "all are free")


def test_who_waits_at_a_paused_decode_engine_keeps_its_lease(pair: Pair):
    prompts = [words(700, seed=73 + i) for i in range(4)]
    params, computed = [pair.prefilled(p) for p in prompts], pair.computed_at_decode()
    post(pair.decode, "/pause?mode=keep")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(pair.decode.tokens, p, 12, kv_transfer_params=one)
            for p, one in zip(prompts, params, strict=True)
        ]
        time.sleep(LEASE_S * 1.5)
        assert not any(one.done() for one in waiting)
        post(pair.decode, "/resume")
        answers = [one.result(60) for one in waiting]
    assert pair.computed_at_decode() - computed < 4 * 128, "all were loaded"
    assert answers == [pair.prefill.tokens(p) for p in prompts]
