"""The scheduler's half with Mooncake's contract: what it answers while decode looks prefill up."""

import re
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from halves import Block, Engine
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.request import RequestStatus

from kvconnect.config import MooncakeConfig
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError
from kvconnect.orders import Fetch, Grant, Promise, Release, RenewLease, Withdraw
from kvconnect.vllm.mooncake import place, protocol
from kvconnect.vllm.mooncake.protocol import MooncakeProtocol

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "xfer-1"}


@pytest.fixture
def make(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", str(port))
    made = []

    def make(engine_id, role, mamba=False):
        made.append(Engine(engine_id, role, MooncakeConfig(), MooncakeProtocol, mamba))
        made[-1].port = port
        return made[-1]

    yield make
    for engine in made:
        engine.scheduler.close()


@pytest.fixture
def p(make):
    return make("P", "kv_producer")


@pytest.fixture
def d(make):
    return make("D", "kv_consumer")


def decode(p, **changed):
    return {
        "do_remote_prefill": True,
        "remote_bootstrap_addr": f"http://127.0.0.1:{p.port}",
        "remote_engine_id": "P",
        "transfer_id": "xfer-1",
        **changed,
    }


@pytest.mark.parametrize(("mamba", "tokens"), [(False, 40), (True, 39)])
def test_both_legs_agree_on_a_lease(make, mamba, tokens):
    """Recurrent state cannot step back a token, so prefill leaves the last one to decode."""
    p, d = make("P", "kv_producer", mamba), make("D", "kv_consumer", mamba)
    prefill = p.arrives(PREFILL, "at P")
    (expect,) = p.steps([Promise])
    prefill.num_computed_tokens = prefill.num_prompt_tokens
    assert p.finishes(prefill) == (True, None), "lent, and nothing is answered"
    (grant,) = p.steps([Grant])
    request = d.arrives(decode(p), "at D")
    d.steps([RenewLease])
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == tokens
    d.scheduler.update_state_after_alloc(
        request, SimpleNamespace(blocks=[[Block(b) for b in (7, 8, 9)]]), tokens
    )
    (fetch,) = d.steps([Fetch])
    assert fetch.source.request_id == expect.name == grant.terms.name
    assert fetch.tokens == grant.terms.tokens == tokens
    assert fetch.digest == grant.terms.digest
    assert fetch.source.wait_s == 480


def test_a_prompt_is_shortened_once_however_many_connectors_see_it(make, monkeypatch):
    one = make("P", "kv_producer", mamba=True)
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", "0")
    other = make("P", "kv_producer", mamba=True)
    request = one.arrives(PREFILL)
    other.scheduler.on_new_request(request)
    assert request.num_prompt_tokens == len(request.prompt_token_ids) == 39


@pytest.mark.parametrize("ids", [True, False], ids=["of both", "of embeddings"])
def test_a_prompt_of_embeddings_is_shortened_in_all_its_parts(make, ids):
    """Used to be: its embeddings were not, of a prompt of both, and vLLM's worker ended by it."""
    kinds = {"prompt_is_token_ids": [True] * 20 + [False] * 20} if ids else {}
    tokens = {} if ids else {"prompt_token_ids": None}
    request = make("P", "kv_producer", mamba=True).arrives(
        PREFILL, prompt_embeds=torch.zeros(40, 2), **kinds, **tokens
    )
    assert (
        length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        == len(request._all_token_ids)
        == request.num_prompt_tokens
        == 39
    )
    assert not ids or len(request.prompt_is_token_ids) == 39


@pytest.mark.parametrize("replicas", [1, 2])
def test_who_registers_at_its_endpoint_makes_it_a_groups(replicas):
    parallel = SimpleNamespace(
        local_engines_only=False,
        data_parallel_index=0,
        data_parallel_size=replicas,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
    )
    assert place.place_of(parallel, None).in_group == (replicas > 1)


@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
def test_a_bootstrap_port_that_nobody_chose_may_be_taken(p, make, monkeypatch, caplog, role):
    """Used to be: a second prefill engine on a host did not start."""
    with pytest.raises(ConfigError, match=str(p.port)):
        make("Q", role)
    monkeypatch.delenv("VLLM_MOONCAKE_BOOTSTRAP_PORT")
    monkeypatch.setattr(place, "DEFAULT_PORT", str(p.port))
    make("Q", role)
    assert re.search(rf"bootstrap endpoint is on port (?!{p.port})\d+", caplog.text)
    place_of = place.place_of  # others of its group would look for it there
    monkeypatch.setattr(protocol, "place_of", lambda *a: place_of(*a)._replace(in_group=True))
    with pytest.raises(ConfigError, match=str(p.port)):
        make("Q", role)


def test_a_request_waits_in_the_queue_while_prefill_is_looked_up(p, d):
    request = d.arrives(decode(p))
    assert d.scheduler.get_num_new_matched_tokens(request, 0) is None
    d.steps([RenewLease])
    assert d.scheduler.get_num_new_matched_tokens(request, 16) == 24
    again = d.arrives(decode(p, transfer_id="xfer-2"), "r2")
    assert d.scheduler.get_num_new_matched_tokens(again, 0) == 40, "at once: it is known by now"


def test_requests_that_wait_for_one_endpoint_are_one_look(d, monkeypatch):
    """Used to be: 2,000 that wait took 11 ms of each step, and 12 s while they arrived."""
    looks, answers = [], []
    monkeypatch.setattr(
        "kvconnect.vllm.mooncake.resolver.Resolver.find",
        lambda self, endpoint, engine_id: looks.append(endpoint) or (answers or [None])[-1],
    )

    def waits(number, endpoint):
        params = {
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://10.0.0.{endpoint}:8998",
            "remote_engine_id": f"P{number % 7}",
            "transfer_id": f"xfer-{number}",
        }
        return d.arrives(params, f"r{number}")

    requests = [waits(number, number % 2) for number in range(2000)]
    assert len(looks) == 2
    del looks[:]
    assert d.scheduler.take_orders() == []
    assert len(looks) == 2
    assert d.scheduler.get_num_new_matched_tokens(requests[-1], 0) is None
    answers.append((Address("10.0.0.1", 7000),))
    orders = d.scheduler.take_orders()
    assert [type(order) for order in orders] == [RenewLease] * 2000
    assert {order.request_id for order in orders} == {r.request_id for r in requests}
    assert d.scheduler.get_num_new_matched_tokens(requests[-1], 0) == 40


def test_requests_that_wait_to_be_looked_up_are_bounded(d, monkeypatch):
    monkeypatch.setattr("kvconnect.vllm.mooncake.resolver.Resolver.find", lambda *_: None)
    monkeypatch.setattr("kvconnect.vllm.scheduler.MAX_UNDECIDED", 3)
    params = {
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://10.0.0.1:8998",
        "remote_engine_id": "P",
        "transfer_id": "xfer",
    }
    found = [
        d.scheduler.get_num_new_matched_tokens(d.arrives(params, f"r{n}"), 0) for n in range(5)
    ]
    assert found == [None, None, None, 0, 0], "the others are prefilled here"


def test_what_cannot_be_found_is_prefilled_here(p, d):
    request = d.arrives(decode(p, remote_engine_id="another"))
    until = time.monotonic() + 60
    while (tokens := d.scheduler.get_num_new_matched_tokens(request, 0)) is None:
        d.scheduler.take_orders()
        assert time.monotonic() < until
    assert tokens == 0
    assert d.scheduler.take_stats()["num_invalid_params"] == 1


def test_a_request_aborted_while_prefill_is_looked_up_lets_its_lease_go(p, d):
    request = d.arrives(decode(p))
    assert d.finishes(request, RequestStatus.FINISHED_ABORTED) == (False, None)
    d.steps([RenewLease, Release])
    assert d.scheduler.take_orders() == []


def test_a_request_that_the_api_server_rejected_lets_its_lease_go(p, d):
    request = d.arrives(decode(p), abort_immediately=True)
    d.finishes(request, RequestStatus.FINISHED_ABORTED)
    d.steps([RenewLease, Release])


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_prefill_that_ends_otherwise_lends_nothing(p, status):
    prefill = p.arrives(PREFILL)
    p.steps([Promise])
    assert p.finishes(prefill, status) == (False, None)
    p.steps([Withdraw])
