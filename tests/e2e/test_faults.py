"""What goes wrong: aborts, stale and hostile params, hostile frames, killed engines."""

import http.client
import json
import random
import socket
import threading
import time

import pytest
import zmq
from pair import PREFILL, Client, Pair, eventually, words

from kvconnect.cli.engines import START_TIMEOUT_S

USAGE = "vllm:kv_cache_usage_perc"
INVALID = "vllm:kvconnect_num_invalid_params_total"


def test_blocks_of_a_lease_that_nobody_reads_are_freed_when_it_expires(pair: Pair):
    pair.prefilled(words(700, seed=1))
    assert pair.prefill.metric(USAGE) > 0
    eventually(lambda: pair.prefill.metric(USAGE) == 0, 60, "the lease expires")
    assert pair.prefill.metric("vllm:nixl_num_kv_expired_reqs_total") >= 1


def test_an_abort_storm_leaves_no_block_held(pair: Pair):
    """Clients hang up at every stage: in prefill, between the legs, while loading, decoding."""
    chosen = random.Random(5)

    def hang_up(client: Client, body: dict, after_s: float) -> None:
        connection = http.client.HTTPConnection(client.netloc, timeout=60)
        text = json.dumps({"model": client.model, "temperature": 0, "stream": True} | body)
        connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})
        time.sleep(after_s)  # the client's patience, not the test's
        connection.close()

    def one(number: int) -> None:
        prompt = words(chosen.choice([50, 400, 1500]), seed=2000 + number)
        if number % 2:
            body = {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": PREFILL}
            hang_up(pair.prefill, body, chosen.random() * 0.5)
        else:
            params = pair.prefilled(prompt)
            body = {"prompt": prompt, "max_tokens": 300, "kv_transfer_params": params}
            hang_up(pair.decode, body, chosen.random() * 0.3)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in (pair.prefill, pair.decode):
        eventually(lambda c=client: c.metric(USAGE) == 0, 60, "all blocks are freed")
    prompt = words(300, seed=6)
    assert pair.tokens(prompt) == pair.prefill.tokens(prompt)


def hostile(good: dict) -> dict[str, object]:
    """Params that a client could send; ``good`` are real ones, for another prompt."""
    form = {
        "do_remote_prefill": True,
        "remote_engine_id": "e",
        "remote_request_id": "r",
        "remote_block_ids": [[1]],
        "remote_host": "127.0.0.1",
        "remote_port": 9,
    }
    return {
        "nothing else": {"do_remote_prefill": True},
        "all null": dict.fromkeys(form) | {"do_remote_prefill": True},
        "no request id": form | {"remote_request_id": None},
        "text as blocks": form | {"remote_block_ids": "[[1]]"},
        "negative block": form | {"remote_block_ids": [[-1]]},
        "no blocks": form | {"remote_block_ids": [[]]},
        "bool block": form | {"remote_block_ids": [[True]]},
        "port too high": form | {"remote_port": 70_000},
        "port as text": form | {"remote_port": "5600"},
        "huge port": form | {"remote_port": 2**62},
        "list as host": form | {"remote_host": ["127.0.0.1"]},
        "long host": form | {"remote_host": "h" * 100_000},
        "odd engine": form | {"remote_engine_id": {"a": 1}},
        "text tokens": form | {"remote_num_tokens": "many"},
        "garbage ticket": form | {"kvconnect": "x.y"},
        "no ascii ticket": form | {"kvconnect": "é☃"},
        "odd ticket": form | {"kvconnect": [1, 2, 3]},
        "empty ticket": form | {"kvconnect": {}, "remote_block_ids": None},
        "long ticket": form | {"kvconnect": "A" * 3_000_000},
        "another prompt's": good,
        "odd flags": {"do_remote_prefill": "yes", "do_remote_decode": [0]},
        "deep": {"do_remote_prefill": True, "remote_block_ids": json.loads("[" * 200 + "]" * 200)},
    }


def test_hostile_params_are_prefilled_locally_and_counted(pair: Pair):
    prompt = words(40, seed=11)
    right = pair.prefill.tokens(prompt)
    cases = hostile(pair.prefilled(words(40, seed=12)))
    before = pair.decode.metric(INVALID)
    for name, params in cases.items():
        status, answer = pair.decode.post(prompt, max_tokens=12, kv_transfer_params=params)
        assert status == 200, (name, answer)
        assert answer["choices"][0]["token_ids"] == right, name
    assert pair.decode.metric(INVALID) - before >= len(cases) - 1


def test_a_lease_is_read_once_and_its_params_are_stale_afterwards(pair: Pair):
    """Used to be another prompt's answer in-tree (vllm#52234); here it is computed again."""
    prompt = words(300, seed=13)
    params = pair.prefilled(prompt)
    right = pair.decode.tokens(prompt, kv_transfer_params=params)
    pair.decode.request("POST", "/reset_prefix_cache")
    for _ in range(2):
        assert pair.decode.tokens(prompt, kv_transfer_params=params) == right


def test_params_of_the_in_tree_form_without_our_ticket_work(pair: Pair):
    prompt = words(300, seed=14)
    params = pair.prefilled(prompt)
    del params["kvconnect"]
    params["remote_port"] = float(params["remote_port"])  # as after a router written in Go
    before, failed = pair.computed_at_decode(), pair.decode.metric(INVALID)
    answer = pair.decode.tokens(prompt, kv_transfer_params=params)
    assert answer == pair.prefill.tokens(prompt)
    assert pair.computed_at_decode() == before and pair.decode.metric(INVALID) == failed


def test_the_tickets_addresses_win_over_what_a_router_wrote(pair: Pair):
    prompt = words(300, seed=15)
    params = pair.prefilled(prompt) | {"remote_host": "203.0.113.1", "remote_port": 1}
    before = pair.computed_at_decode()
    assert pair.decode.tokens(prompt, kv_transfer_params=params) == pair.prefill.tokens(prompt)
    assert pair.computed_at_decode() == before


def test_garbage_on_the_side_channel_harms_nobody(pair: Pair):
    params = pair.prefilled(words(20, seed=16))
    host, port = params["remote_host"], params["remote_port"]
    chosen = random.Random(1)
    for size in (1, 10, 100, 65_536):
        with socket.create_connection((host, port)) as raw:
            raw.sendall(chosen.randbytes(size))
    context = zmq.Context()
    for _ in range(50):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://{host}:{port}")
        head = chosen.choice([b"", b"\x00", b"\x01", b"\x00\x81\xa4type\xa5Hello", b"\xff" * 40])
        dealer.send(head + chosen.randbytes(chosen.randrange(200)))
        dealer.send_multipart([b"", b"get_meta_msg", chosen.randbytes(20)])
        dealer.close(linger=200)
    context.term()
    prompt = words(300, seed=17)
    before = pair.computed_at_decode()
    assert pair.tokens(prompt) == pair.prefill.tokens(prompt)
    assert pair.computed_at_decode() == before


def test_with_a_secret_unsigned_and_altered_params_are_prefilled_locally(secret_pair: Pair):
    prompt = words(300, seed=18)
    right = secret_pair.prefill.tokens(prompt)
    before = secret_pair.decode.metric(INVALID)
    unsigned = secret_pair.prefilled(prompt)
    ticket = unsigned.pop("kvconnect")
    altered = unsigned | {
        "kvconnect": ticket[:20] + ("A" if ticket[20] != "A" else "B") + ticket[21:]
    }
    cut = unsigned | {"kvconnect": ticket.split(".")[0] + "."}
    for params in (unsigned, altered, cut):
        assert secret_pair.decode.tokens(prompt, kv_transfer_params=params) == right
    assert secret_pair.decode.metric(INVALID) - before == 3


def test_policy_fail_answers_a_stale_ticket_with_an_error_and_lives_on(secret_pair: Pair):
    prompt = words(300, seed=19)
    params = secret_pair.prefilled(prompt)
    right = secret_pair.decode.tokens(prompt, kv_transfer_params=params)
    secret_pair.decode.request("POST", "/reset_prefix_cache")
    status, answer = secret_pair.decode.post(words(300, 19), kv_transfer_params=params)
    assert status in (200, 500), answer  # 200 only where the blocks were still cached here
    other = words(301, seed=20)
    assert secret_pair.tokens(other) == secret_pair.prefill.tokens(other)
    assert secret_pair.decode.tokens(prompt) == right


@pytest.mark.slow
def test_a_killed_prefill_engine_costs_its_requests_nothing_but_time(pair: Pair):
    prompt, waiting = words(600, seed=21), words(601, seed=22)
    right = pair.prefill.tokens(prompt), pair.prefill.tokens(waiting)
    params = pair.prefilled(prompt), pair.prefilled(waiting)
    pair.prefill.server.kill()
    for asked, given, answer in zip((prompt, waiting), params, right, strict=True):
        started = time.monotonic()
        assert pair.decode.tokens(asked, kv_transfer_params=given) == answer
        assert time.monotonic() - started < 120
    eventually(lambda: pair.decode.metric(USAGE) == 0, 60, "all blocks are freed")
    again = pair.start("prefill")
    pair.fleet.wait_up([again], START_TIMEOUT_S)
    pair.prefill = Client(again, pair.prefill.model)
    before = pair.computed_at_decode()
    fresh = words(500, seed=23)
    assert pair.tokens(fresh) == pair.prefill.tokens(fresh)
    assert pair.computed_at_decode() == before


SPOILED = ["flipped", "swapped", "out of range", "truncated", "late"]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_chunk_is_noticed_and_its_request_recomputed(large_blocks_pair: Pair, kind: str):
    pair, failed = large_blocks_pair, "vllm:nixl_num_failed_transfers_total"
    prompt, after = (words(n, seed=100 * SPOILED.index(kind) + n) for n in (700, 701))
    right = pair.prefill.tokens(prompt), pair.prefill.tokens(after)
    computed, failures = pair.computed_at_decode(), pair.decode.metric(failed)
    pair.spoil(kind)
    try:
        params = pair.prefilled(prompt)
        assert pair.decode.tokens(prompt, 12, kv_transfer_params=params) == right[0]
        assert pair.decode.metric(failed) == failures + 1
        assert pair.computed_at_decode() - computed >= 600
    finally:
        pair.spoil("")
    computed = pair.computed_at_decode()
    assert pair.tokens(after) == right[1]
    assert pair.computed_at_decode() == computed, "the next one is transferred as ever"
