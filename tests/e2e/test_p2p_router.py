"""Two prefill and two decode engines behind a router that names them in request ids."""

import sys
from collections.abc import Iterator

import pytest
from pair import Client, eventually, in_parallel, words
from xpyd import Xpyd, free_port

from kvconnect.cli.processes import HOST

USAGE = "vllm:kv_cache_usage_perc"
FAILED = "vllm:nixl_num_failed_transfers_total"
INVALID = "vllm:kvconnect_num_invalid_params_total"
TRANSFERRED, COMPUTED = "external_kv_transfer", "local_compute"


def test_40_prompts_are_handed_over_and_answered_as_by_an_engine_alone(xpyd: Xpyd):
    """Between TP 1 and TP 1 and 2, of a model with sliding windows: the old one did neither.

    The last token of a prompt is decode's own to compute, see test_answers.
    """
    transferred, computed = xpyd.at_decode(TRANSFERRED), xpyd.at_decode(COMPUTED)
    failed = sum(client.metric(FAILED) for client in xpyd.decodes)
    prompts = [words(20 + 17 * n, seed=4000 + n) for n in range(40)]
    through = in_parallel(xpyd.router.tokens, prompts)
    assert xpyd.at_decode(TRANSFERRED) - transferred == sum(map(len, prompts)) - len(prompts)
    assert xpyd.at_decode(COMPUTED) - computed == len(prompts)
    assert sum(client.metric(FAILED) for client in xpyd.decodes) == failed
    alone = in_parallel(xpyd.prefills[0].tokens, prompts)
    wrong = [len(p) for p, a, b in zip(prompts, through, alone, strict=True) if a != b]
    assert not wrong, f"prompts of {wrong} tokens got other answers"
    check_leases_were_closed(xpyd)


def check_leases_were_closed(xpyd: Xpyd) -> None:
    for client in xpyd.prefills:  # within less than the 90 s after which they expire
        eventually(lambda c=client: c.metric(USAGE) == 0, 60, "all blocks are freed")


def test_what_decode_has_already_is_not_fetched_and_its_lease_is_released(xpyd: Xpyd):
    prompt = words(700, seed=4050)
    answers = [xpyd.router.tokens(prompt) for _ in range(8)]  # each pair of engines twice
    assert answers == [answers[0]] * 8
    check_leases_were_closed(xpyd)


def test_several_prompts_and_answers_of_one_request_are_told_apart(xpyd: Xpyd):
    prompts = [words(300, seed=4100), words(200, seed=4101)]
    computed = xpyd.at_decode(COMPUTED)
    # vLLM gives greedy requests one answer only; of one candidate there is no choice either
    status, answer = xpyd.router.post(prompts, max_tokens=8, n=2, temperature=1, top_k=1)
    assert status == 200, answer
    # of two answers of one prompt the second may find the first one's blocks
    assert xpyd.at_decode(COMPUTED) - computed <= 4
    expected = [xpyd.prefills[0].tokens(prompt, 8) for prompt in prompts]
    given = [choice["token_ids"] for choice in answer["choices"]]
    assert given == [expected[0], expected[0], expected[1], expected[1]]


NOBODYS = "___prefill_addr_127.0.0.1:{}___decode_addr_127.0.0.1:1_0123456789abcdef"


def test_ids_that_name_no_prefill_engine_do_no_harm(xpyd: Xpyd):
    """The old one waited for ever, or ended."""
    decode, prefill = xpyd.decodes[0], xpyd.prefills[0]
    ids = {
        "nobody is there": NOBODYS.format(free_port()),
        "no control channel": NOBODYS.format(prefill.netloc.rpartition(":")[2]),
        "no address": NOBODYS.format(99999),
        "long": NOBODYS.format(1) + "0" * 4000,
        "stale": NOBODYS.format(xpyd.kv_ports[0]),
    }
    prompts = {name: words(150, seed=4200 + n) for n, name in enumerate(ids)}

    def ask(name: str) -> list[int]:
        headers = {"X-Request-Id": ids[name]}
        return decode.tokens(prompts[name], 8, headers=headers)

    unusable = decode.metric(FAILED) + decode.metric(INVALID)
    answers = dict(zip(ids, in_parallel(ask, list(ids), workers=len(ids)), strict=True))
    for name, answer in answers.items():
        assert answer == prefill.tokens(prompts[name], 8), name
    assert decode.metric(FAILED) + decode.metric(INVALID) - unusable == len(ids)


@pytest.fixture
def vllm_router(xpyd: Xpyd) -> Iterator[Client]:
    """github.com/vllm-project/router in the place of ours, told of engines by pings alone."""
    xpyd.end(xpyd.router)
    mode = ["--vllm-pd-disaggregation", "--policy", "round_robin", "--host", HOST]
    told = ["--vllm-discovery-address", f"{HOST}:{xpyd.discovery_port}"]
    metrics = ["--prometheus-port", str(free_port())]
    start = [sys.executable, "-P", "-m", "vllm_router.launch_router", *mode, *told, *metrics]
    router = xpyd.start("vllm-router", lambda port: [*start, "--port", str(port)])

    def answers() -> bool:
        try:
            return router.post(words(40, seed=1), max_tokens=1)[0] == 200
        except OSError:
            return False

    eventually(answers, 60, "vllm-router has heard of engines")
    yield router
    xpyd.end(router)
    xpyd.router = xpyd.start_router()
    eventually(xpyd.router.server.is_up, 60, "our router has heard of all engines again")


def test_behind_vllms_own_router_params_go_before_ids(xpyd: Xpyd, vllm_router: Client):
    """It names engines in ids and passes params on."""
    transferred = xpyd.at_decode(TRANSFERRED)
    prompts = [words(100 + 50 * n, seed=4300 + n) for n in range(8)]
    through = in_parallel(vllm_router.tokens, prompts)
    assert xpyd.at_decode(TRANSFERRED) - transferred == sum(map(len, prompts)) - len(prompts)
    assert through == in_parallel(xpyd.prefills[0].tokens, prompts)
    check_leases_were_closed(xpyd)
