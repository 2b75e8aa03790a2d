"""The scheduler's half with in-tree NIXL's params: offers that come to nothing, and samples."""

from types import SimpleNamespace

import pytest
from halves import Block, Engine
from vllm.v1.request import RequestStatus

from kvconnect.config import NixlConfig
from kvconnect.orders import Fetch, Grant, Promise, Release, ReleaseOwn, RenewLease
from kvconnect.vllm.protocol import RouterProtocol

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
TOKENS = 40


@pytest.fixture
def p():
    return Engine("P", "kv_both", NixlConfig(), RouterProtocol)


@pytest.fixture
def d():
    return Engine("D", "kv_both", NixlConfig(), RouterProtocol)


def prefilled(p, request_id="at P"):
    """Params of a prompt that ``p`` has computed, and its lease."""
    request = p.arrives(PREFILL, request_id)
    lent, params = p.finishes(request)
    assert lent
    expect, grant = p.steps([Promise, Grant])
    assert grant.terms.lease_id == expect.lease_id
    return params, grant.terms


def blocks(*ids):
    return SimpleNamespace(blocks=[[Block(i) for i in ids]])


def test_an_offer_of_another_prompt_is_let_go_at_once(p, d):
    """Used to be: it was renewed until the request had ended, its whole generation long."""
    params, terms = prefilled(p)
    request = d.arrives(params, prompt_token_ids=list(range(1, TOKENS + 1)))
    watch, release = d.steps([RenewLease, Release])
    assert watch.source == release.source
    assert release.source.lease_id == terms.lease_id
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 0
    d.scheduler.update_state_after_alloc(request, blocks(7, 8, 9), 0)
    d.finishes(request, RequestStatus.FINISHED_STOPPED)
    assert d.scheduler.take_orders() == [], "and is let go once"


def test_samples_load_their_prompt_once(p, d):
    params, terms = prefilled(p)
    first, second, third = (d.arrives(params, f"{i}_cmpl-1") for i in range(3))
    orders = d.steps([RenewLease, RenewLease, RenewLease])
    assert all(order.source.samples for order in orders)
    assert d.scheduler.get_num_new_matched_tokens(first, 0) == TOKENS
    d.scheduler.update_state_after_alloc(first, blocks(7, 8, 9), TOKENS)
    assert d.scheduler.get_num_new_matched_tokens(second, 0) is None, (
        "it is in the prefix cache soon"
    )
    (fetch,) = d.steps([Fetch])
    assert fetch.source.lease_id == terms.lease_id
    assert d.scheduler.get_num_new_matched_tokens(third, 0) is None
    d.scheduler.update_connector_output([first.request_id])
    assert d.scheduler.get_num_new_matched_tokens(second, 32) == TOKENS - 32


def test_samples_of_an_aborted_one_do_not_wait_for_it(p, d):
    params, _ = prefilled(p)
    first, second = (d.arrives(params, f"{i}_cmpl-1") for i in range(2))
    d.scheduler.update_state_after_alloc(first, blocks(7, 8, 9), TOKENS)
    assert d.scheduler.get_num_new_matched_tokens(second, 0) is None
    d.finishes(first, RequestStatus.FINISHED_ABORTED)
    assert d.scheduler.get_num_new_matched_tokens(second, 0) == TOKENS


@pytest.mark.parametrize("request_id", ["cmpl-0_1", "r", "1-a"])
def test_what_is_no_sample_shares_no_lease(p, d, request_id):
    params, _ = prefilled(p)
    d.arrives(params, request_id)
    (watch,) = d.steps([RenewLease])
    assert not watch.source.samples


@pytest.mark.parametrize("ticket", [True, False])
@pytest.mark.parametrize("runs", [True, False])
def test_a_lease_that_is_offered_to_its_own_engine_ends(p, ticket, runs):
    """Used to be: one engine in both roles behind a proxy kept each prompt until it expired."""
    params, terms = prefilled(p)
    if not ticket:
        del params["kvconnect"]
    request = p.arrives(params, "the decode leg")
    assert p.scheduler.get_num_new_matched_tokens(request, 32) == 0
    assert p.scheduler.take_orders() == [], "its blocks may still be evicted"
    if runs:
        p.scheduler.update_state_after_alloc(request, blocks(1, 2, 3), 0)
    else:
        p.finishes(request, RequestStatus.FINISHED_ABORTED)
    (end,) = p.steps([ReleaseOwn])
    assert end == ReleaseOwn(terms.lease_id if ticket else None, terms.request_id)
