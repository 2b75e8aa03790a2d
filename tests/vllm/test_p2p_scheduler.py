"""The scheduler's half with ids that name engines, and no params at all."""

from types import SimpleNamespace

import pytest
from halves import Block, Engine
from vllm.v1.request import RequestStatus

from kvconnect.config import parse
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError
from kvconnect.orders import Fetch, Grant, Promise, Release, RenewLease
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.p2p.protocol import P2pProtocol
from kvconnect.vllm.protocol import EngineInfo

P, D = ("10.0.0.1", 21001), ("10.0.1.1", 22001)
NAMED = "cmpl-___prefill_addr_10.0.0.1:21001___decode_addr_10.0.1.1:22001_0123456789abcdef-0"


def engine(role, address, config=P2pNcclConfig(), **options):  # noqa: B008 - frozen
    return Engine(role, role, config, P2pProtocol, address=address, **options)


@pytest.mark.parametrize(("mamba", "tokens"), [(False, 40), (True, 39)])
@pytest.mark.parametrize("roles", [("kv_producer", "kv_consumer"), ("kv_both", "kv_both")])
def test_both_engines_agree_on_a_lease(roles, mamba, tokens):
    """Recurrent state cannot step back a token, so prefill leaves the last one to decode."""
    p, d = engine(roles[0], P, mamba=mamba), engine(roles[1], D, mamba=mamba)
    prefill = p.arrives(None, f"{NAMED}-01234567")
    (expect,) = p.steps([Promise])
    prefill.num_computed_tokens = prefill.num_prompt_tokens
    lent, _ = p.finishes(prefill)
    (grant,) = p.steps([Grant])
    assert lent
    assert expect.name == grant.terms.name == NAMED
    request = d.arrives(None, f"{NAMED}-fedcba98")
    d.steps([RenewLease])
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == tokens
    d.scheduler.update_state_after_alloc(
        request, SimpleNamespace(blocks=[[Block(b) for b in (7, 8, 9)]]), tokens
    )
    (fetch,) = d.steps([Fetch])
    assert fetch.source.shards == (Address(*P),)
    assert fetch.source.request_id == NAMED
    assert (fetch.tokens, fetch.digest) == (grant.terms.tokens, grant.terms.digest)


@pytest.mark.parametrize("end", ["", "-01234567", ":0"])
def test_an_id_that_names_nobody_is_prefilled_here(end):
    d = engine("kv_consumer", D)
    request = d.arrives(None, "cmpl-___prefill_addr_10.0.0.1" + end)
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 0
    assert d.scheduler.take_stats()["num_invalid_params"] == 1
    assert d.finishes(request, RequestStatus.FINISHED_STOPPED) == (False, None)
    assert d.scheduler.take_orders() == []


def test_a_request_that_the_api_server_rejected_lets_its_lease_go():
    d = engine("kv_consumer", D)
    request = d.arrives(None, f"{NAMED}-fedcba98", abort_immediately=True)
    d.finishes(request, RequestStatus.FINISHED_ABORTED)
    _, release = d.steps([RenewLease, Release])
    assert release.source.request_id == NAMED


AT = {"prefill_address": "prefill.svc:21001"}
SHARED = "cmpl-0b5f9c2e-71aa-4a6f-9d6d-1f0e6f1f1a11-0"


def test_engines_that_are_configured_for_each_other_pair_by_the_id_alone():
    """production-stack's ``disaggregated_prefill`` sends one X-Request-Id and nothing else."""
    p = engine("kv_producer", P, config=P2pNcclConfig(**AT))
    d = engine("kv_consumer", D, config=P2pNcclConfig(**AT))
    prefill = p.arrives(None, f"{SHARED}-01234567", max_tokens=1)
    (promised,) = p.steps([Promise])
    prefill.num_computed_tokens = prefill.num_prompt_tokens
    lent, _ = p.finishes(prefill)
    (grant,) = p.steps([Grant])
    assert lent
    assert promised.name == grant.terms.name == SHARED
    request = d.arrives(None, f"{SHARED}-fedcba98")
    d.steps([RenewLease])
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 40
    d.scheduler.update_state_after_alloc(
        request, SimpleNamespace(blocks=[[Block(b) for b in (7, 8, 9)]]), 40
    )
    (fetch,) = d.steps([Fetch])
    assert fetch.source.shards == (Address("prefill.svc", 21001),)
    assert fetch.source.request_id == SHARED
    assert fetch.source.wait_s == 0, "prefill has answered before decode is asked"
    assert fetch.digest == grant.terms.digest


@pytest.mark.parametrize(
    ("role", "max_tokens", "request_id"),
    [
        ("kv_producer", 16, SHARED),  # not a router's prefill: nobody will come for it
        ("kv_producer", 1, "x" * 2000),
        ("kv_consumer", 16, "x" * 2000),
        ("kv_consumer", 16, ""),  # the wire carries no empty name
    ],
)
def test_what_no_router_sent_is_computed_and_not_lent(role, max_tokens, request_id):
    e = engine(role, P, config=P2pNcclConfig(**AT))
    request = e.arrives(None, f"{request_id}-01234567", max_tokens=max_tokens)
    assert e.scheduler.get_num_new_matched_tokens(request, 0) == 0
    assert e.finishes(request) == (False, None)
    assert e.scheduler.take_orders() == []


def test_params_and_addresses_in_ids_go_before_the_configured_engine():
    d = engine("kv_consumer", D, config=P2pNcclConfig(**AT))
    request = d.arrives(None, f"{NAMED}-fedcba98")
    (renew,) = d.steps([RenewLease])
    assert renew.source.shards == (Address(*P),)
    assert d.finishes(request, RequestStatus.FINISHED_ABORTED) == (False, None)


@pytest.mark.parametrize(
    ("role", "options", "why"),
    [
        ("kv_both", {}, "kv_both"),
        ("kv_consumer", {"secret": b"s" * 16}, "auth_secret_file"),
    ],
)
def test_a_pairing_that_cannot_work_is_refused_at_the_start(role, options, why):
    us = EngineInfo("engine", options.get("secret"), 30.0, role)
    with pytest.raises(ConfigError, match=why):
        P2pProtocol(us, P2pNcclConfig(**AT), None)


@pytest.mark.parametrize("text", ["prefill", "prefill:0", ":21001", "prefill:70000", "a b:1"])
def test_an_address_that_is_none_is_refused_at_the_start(text):
    with pytest.raises(ConfigError, match=r"prefill_address .* expected host:port"):
        parse({"prefill_address": text}, P2pNcclConfig, "KVConnectP2pNccl")
