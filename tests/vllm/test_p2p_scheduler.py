"""The scheduler's half with ids that name engines, and no params at all."""

from types import SimpleNamespace

import pytest
from halves import Block, Engine
from vllm.v1.request import RequestStatus

from kvconnect.control.wire import Address
from kvconnect.orders import Fetch, Grant, Promise, RankAddress, Release, RenewLease
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.p2p.protocol import P2pProtocol

P, D = ("10.0.0.1", 21001), ("10.0.1.1", 22001)
NAMED = "cmpl-___prefill_addr_10.0.0.1:21001___decode_addr_10.0.1.1:22001_0123456789abcdef-0"


def engine(role, address, **options):
    return Engine(role, role, P2pNcclConfig(), P2pProtocol, address=address, **options)


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
    assert fetch.source.shards == (RankAddress(Address(*P), None),)
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
