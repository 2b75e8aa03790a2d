"""Routers that speak Mooncake's contract, unmodified, in front of real engines.

They ask prefill and decode at once, and tell both one transfer id.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pair import Client, Pair, eventually, in_parallel, words

from kvconnect.cli.engines import engine_env
from kvconnect.cli.processes import HOST, Server, ServerError

EXAMPLE = "examples/disaggregated/mooncake_connector/mooncake_connector_proxy.py"
LENGTHS = [2, 31, 64, 127, 128, 129, 255, 257, 400, 511, 513, 640, 700, 1000, 1023, 1025, 1500]
SEEDS = itertools.count(10_000, 10_000)
INVALID = "vllm:kvconnect_num_invalid_params_total"
FAILED = "vllm:nixl_num_failed_transfers_total"


def bootstrap(pair: Pair) -> str:
    return pair.setup.env["VLLM_MOONCAKE_BOOTSTRAP_PORT"]


def vllms_example(pair: Pair) -> Callable[[int], list[str]]:
    """vLLM's own proxy, from its source distribution."""
    script = Path(os.environ.get("KVCONNECT_VLLM_SRC", ""), EXAMPLE)
    assert script.is_file(), f"{script} is missing: run `make setup`"
    engines = ["--prefill", pair.prefill.server.url, bootstrap(pair)]
    engines += ["--decode", pair.decode.server.url]
    return lambda port: [sys.executable, str(script), "--port", str(port), *engines]


def vllm_router(pair: Pair) -> Callable[[int], list[str]]:
    """github.com/vllm-project/router, from its wheel."""
    engines = ["--prefill", pair.prefill.server.url, bootstrap(pair)]
    engines += ["--decode", pair.decode.server.url, "--policy", "round_robin"]
    mode = ["--vllm-pd-disaggregation", "--kv-connector", "mooncake"]
    start = [sys.executable, "-P", "-m", "vllm_router.launch_router", *mode, *engines]
    with socket.create_server((HOST, 0)) as taken:
        metrics = str(taken.getsockname()[1])
    end = ["--host", HOST, "--prometheus-port", metrics]
    return lambda port: [*start, "--port", str(port), *end]


@pytest.fixture(params=[vllms_example, vllm_router], ids=lambda f: f.__name__)
def router(request: pytest.FixtureRequest, routed_pair: Pair) -> Iterator[Client]:
    """A client of the router."""
    name, command = request.param.__name__, request.param(routed_pair)
    server = routed_pair.fleet.start(name, command, engine_env())
    client = Client(server, routed_pair.prefill.model)
    eventually(lambda: answers(client, server), 60, "the router serves")
    yield client
    server.kill()
    routed_pair.fleet.servers.remove(server)


def answers(client: Client, server: Server) -> bool:
    """Whether requests go through; the example has no health endpoint."""
    try:
        return client.post(words(40, seed=1), max_tokens=1)[0] == 200
    except OSError:
        try:
            server.is_up()
        except ServerError as e:
            pytest.fail(str(e))
        return False


def loaded(pair: Pair) -> float:
    """Prompt tokens that decode did not compute, since it was started."""
    return pair.decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


def test_all_prompt_tokens_come_through_behind_unmodified_routers(
    routed_pair: Pair, router: Client
):
    pair, seed = routed_pair, next(SEEDS)  # nothing is cached
    prompts = [words(length, seed + length) for length in LENGTHS]
    before, failed = (loaded(pair), pair.computed_at_decode()), pair.decode.metric(FAILED)
    through = in_parallel(router.tokens, prompts)
    transferred, computed = loaded(pair) - before[0], pair.computed_at_decode() - before[1]
    print(f"{transferred:.0f} of {sum(LENGTHS)} prompt tokens transferred")
    assert (transferred, computed) == (sum(LENGTHS), 0)
    assert pair.decode.metric(FAILED) == failed
    assert through == [pair.prefill.tokens(prompt) for prompt in prompts]


class Legs:
    """What a router sends, one leg at a time."""

    def __init__(self, pair: Pair, prompt: list[int]) -> None:
        self.pair, self.prompt = pair, prompt
        self.transfer_id = f"xfer-{uuid.uuid4()}"
        self.endpoint = f"http://{HOST}:{bootstrap(pair)}"
        with urllib.request.urlopen(f"{self.endpoint}/query", timeout=10) as answer:
            self.engine_id = json.load(answer)["0"]["engine_id"]
        self.answer: list[int] = []

    def prefill(self) -> dict[str, Any]:
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        params["transfer_id"] = self.transfer_id
        _, answer = self.pair.prefill.post(self.prompt, max_tokens=1, kv_transfer_params=params)
        return answer

    def decode(self, **changed: Any) -> list[int]:
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": self.endpoint,
            "remote_engine_id": self.engine_id,
            "transfer_id": self.transfer_id,
        }
        return self.pair.decode.tokens(self.prompt, kv_transfer_params=params | changed)

    def start_decode(self) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.answer.extend(self.decode()))
        thread.start()
        return thread


def test_either_leg_may_come_first(routed_pair: Pair):
    pair, computed = routed_pair, routed_pair.computed_at_decode()
    legs = Legs(pair, words(700, seed=71))
    waiting = legs.start_decode()
    time.sleep(2.5)  # it asks, repeats, and waits
    assert not legs.answer
    assert legs.prefill()["kv_transfer_params"] is None
    waiting.join(60)
    assert legs.answer == pair.prefill.tokens(legs.prompt)
    legs = Legs(pair, words(700, seed=72))
    legs.prefill()
    assert legs.decode() == pair.prefill.tokens(legs.prompt)
    assert pair.computed_at_decode() == computed


def test_a_prefill_leg_that_never_comes_is_recomputed_in_time(routed_pair: Pair):
    pair, failed = routed_pair, routed_pair.decode.metric(FAILED)
    legs = Legs(pair, words(300, seed=73))
    began = time.monotonic()
    assert legs.decode() == pair.prefill.tokens(legs.prompt)
    assert time.monotonic() - began < pair.setup.extra["prefill_timeout"] + 60
    assert pair.decode.metric(FAILED) == failed + 1
    legs.prefill()  # late: nobody reads it, and its blocks are freed when the lease is over
    eventually(
        lambda: pair.prefill.metric("vllm:kv_cache_usage_perc") < 0.01, 90, "blocks are freed"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"remote_engine_id": "of an engine that was restarted since"},
        {"remote_bootstrap_addr": "http://169.254.169.254:80"},
        {"remote_bootstrap_addr": "http://127.0.0.1:1"},
        {"remote_bootstrap_addr": ["http://127.0.0.1:1"]},
        {"transfer_id": {"a": 1}},
    ],
    ids=["engine", "not allowed", "nobody there", "no URL", "no id"],
)
def test_what_cannot_be_found_is_prefilled_here(routed_pair: Pair, changed: dict[str, Any]):
    pair, invalid = routed_pair, routed_pair.decode.metric(INVALID)
    legs = Legs(pair, words(200, seed=74 + len(str(changed))))
    began = time.monotonic()
    assert legs.decode(**changed) == pair.prefill.tokens(legs.prompt)
    assert time.monotonic() - began < 60
    assert pair.decode.metric(INVALID) == invalid + 1


def test_params_of_the_nixl_form_work_as_well(routed_pair: Pair):
    pair, computed = routed_pair, routed_pair.computed_at_decode()
    prompt = words(513, seed=75)
    assert pair.tokens(prompt) == pair.prefill.tokens(prompt)
    assert pair.computed_at_decode() == computed
