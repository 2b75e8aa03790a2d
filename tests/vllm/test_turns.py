"""Decode's blocks, lent to a conversation's next turn, with vLLM's own scheduler at both ends."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from halves import Request as Plain
from test_multi import child
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm_scheduler import EngineCore

from kvconnect.orders import Fetch, Grant, Release, RenewLease, Revoke
from kvconnect.vllm import leaving
from kvconnect.vllm.params import Prompt, open_ticket, seal_ticket
from kvconnect.vllm.turns import LentTurns

HERE = {"do_remote_prefill": False, "do_remote_decode": False}
ANSWERED = 16
"""Tokens of an answer; the scheduler's tests sample a 7 each time."""


class Request(Plain):
    """One whose tokens are known as vLLM's are."""

    @property
    def all_token_ids(self):
        return self._all_token_ids


def core(**options):
    both = {"bidirectional_kv_xfer": True, "kv_recompute_threshold": 0}
    return EngineCore(**both | options)


def orders_of(metadata, kind):
    return [order for order in metadata.take() if isinstance(order, kind)]


class Decode:
    """A decode engine that answers prompts."""

    def __init__(self, **options):
        self.core = core(**options)
        self.orders = []

    def answer(self, request_id="at D", params=HERE, **asked):
        """The whole sequence, and the params that the client got."""
        request = self.core.add(request_id, params, max_tokens=ANSWERED, **asked)
        for _ in range(60):
            if request.is_finished():
                break
            self.step()
        assert request.is_finished()
        self.step()
        return list(request.all_token_ids), self.core.answers[request_id]

    def step(self, **told):
        self.orders += self.core.step(**told).take()

    def taken(self, kind):
        found = [one for one in self.orders if isinstance(one, kind)]
        self.orders = [one for one in self.orders if not isinstance(one, kind)]
        return found


@pytest.fixture
def d():
    return Decode()


@pytest.fixture
def p():
    return core()


def goes_on(p, ids, params, request_id="at P"):
    """A prompt of these tokens at prefill, with what decode answered; the orders of its step."""
    params = json.loads(json.dumps(params)) | {"do_remote_decode": True, "do_remote_prefill": False}
    request = p.add(request_id, params, ids=ids)
    return request, p.step().take()


def fetched(orders):
    (fetch,) = [order for order in orders if isinstance(order, Fetch)]
    return fetch


def test_decode_answers_with_params_of_all_that_it_has_computed(d):
    ids, params = d.answer()
    assert params["do_remote_decode"] and not params["do_remote_prefill"]
    (grant,) = d.taken(Grant)
    # the last token was sampled and never computed with: 55 of 56, in steps of 16
    assert (len(ids), grant.terms.tokens, len(grant.terms.tables[0])) == (56, 48, 3)
    assert grant.terms.ttl_s == 480


@pytest.mark.parametrize(("prompt", "lent"), [(32, 32), (33, 48)])
def test_the_last_token_is_never_lent(d, prompt, lent):
    ids, params = d.answer(tokens=prompt)
    assert (len(ids), params["remote_num_tokens"]) == (prompt + ANSWERED, lent)


def test_what_was_computed_in_vain_is_not_lent(d):
    """Async scheduling computes on before it knows that an answer has ended."""
    turns, request = d.core.connector.scheduler.turns, Request("r", HERE, tokens=32)
    request.num_computed_tokens = 40
    terms = turns.lend(request, [[1, 2, 3]], None)
    assert (terms.tokens, terms.tables) == (16, ((1,),))


def lending(drafts=None, kind=FullAttentionSpec, **also):
    """What an engine of these drafts and one group of these layers lends to next turns."""
    spec = kind(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32, **also)
    group = KVCacheGroupSpec(["layer"], spec)
    config = KVCacheConfig(num_blocks=9, kv_cache_tensors=[], kv_cache_groups=[group])
    turns = LentTurns(480, SimpleNamespace(speculative_config=drafts), config)
    turns.bind(SimpleNamespace(get_num_free_blocks=lambda: 8))
    return turns


@pytest.mark.parametrize(
    ("options", "lends"),
    [
        ({}, True),
        ({"drafts": object()}, False),
        ({"kind": SlidingWindowSpec, "sliding_window": 32}, False),
    ],
)
def test_who_drafts_or_lets_go_of_what_shorter_beginnings_need_lends_nothing(options, lends):
    """A window's blocks are those of the end, whatever the lease says of the beginning."""
    terms = lending(**options).lend(Request("r", HERE), [[1, 2, 3]], None)
    assert bool(terms) is lends


def test_more_blocks_than_are_free_besides_are_not_lent():
    d = Decode(num_blocks=17)  # 16
    _, answered = d.answer(tokens=130)  # 10
    assert answered is None and d.core.blocks_in_use == 0


def test_the_next_turn_loads_what_decode_has(p, d):
    ids, params = d.answer()
    _, orders = goes_on(p, [*ids, *range(200, 220)], params)
    fetch = fetched(orders)
    assert fetch.tokens == 48
    assert [place for place, _ in fetch.blocks[0]] == [0, 1, 2]
    (grant,) = d.taken(Grant)
    assert fetch.source.lease_id == grant.terms.lease_id
    assert grant.terms.digest_of(48) == fetch.digest
    p.step(finished_recving={"at P"})
    made = p.scheduler.schedule()
    assert made.num_scheduled_tokens == {"at P": len(ids) + 20 - 48}


def test_and_is_lent_to_decode_as_every_prompt_is(p, d):
    ids, params = d.answer()
    request, _ = goes_on(p, [*ids, *range(200, 220)], params)
    p.step(finished_recving={"at P"})
    p.step()
    assert request.is_finished()
    answer = p.answers["at P"]
    assert answer["do_remote_prefill"] and answer["remote_num_tokens"] == len(ids) + 20
    (grant,) = orders_of(p.step(), Grant)
    assert grant.terms.tokens == len(ids) + 20


@pytest.mark.parametrize("agreed", [16, 33, 40, 47])
def test_a_prompt_that_leaves_out_what_was_answered_loads_what_agrees(p, d, agreed):
    """A chat template that drops the reasoning of earlier turns."""
    ids, params = d.answer()
    (grant,) = d.taken(Grant)
    _, orders = goes_on(p, [*ids[:agreed], *range(300, 340)], params)
    fetch = fetched(orders)
    assert fetch.tokens == agreed // 16 * 16
    assert grant.terms.digest_of(fetch.tokens) == fetch.digest


def test_a_prompt_of_another_conversation_loads_nothing_and_lets_the_lease_go(p, d):
    _, params = d.answer()
    _, orders = goes_on(p, list(range(500, 560)), params)
    assert not [one for one in orders if isinstance(one, Fetch)]
    assert [type(one) for one in orders if isinstance(one, RenewLease | Release)] == [
        RenewLease,
        Release,
    ]


def test_what_prefill_has_itself_is_not_loaded(p, d):
    ids, params = d.answer()
    p.lend("before", tokens=40)
    p.step()
    _, orders = goes_on(p, [*ids, *range(200, 220)], params)
    fetch = fetched(orders)
    assert [place for place, _ in fetch.blocks[0]] == [2]


def test_few_tokens_are_computed_rather_than_loaded(d):
    p = core(kv_recompute_threshold=49)
    ids, params = d.answer()
    _, orders = goes_on(p, [*ids, *range(200, 220)], params)
    assert [type(one) for one in orders if isinstance(one, Fetch | Release)] == [Release]


@pytest.mark.parametrize("change", [{"salt": "x"}, {"step": 1}, {"prefixes": b""}])
def test_a_forged_ticket_loads_nothing(p, d, change):
    ids, params = d.answer()
    if "step" in change:  # and the digests to it: that many are work
        digests = Prompt(Request("r", HERE)).prefixes(1, ids)
        change = change | {"prefixes": b"".join(one[:8] for one in digests)}
    ticket = open_ticket(params["kvconnect"], None)
    salt = change.pop("salt", None)
    params["kvconnect"] = seal_ticket(
        type(ticket)(**{f: getattr(ticket, f) for f in ticket.__struct_fields__} | change), None
    )
    prompt = [*ids, *range(200, 220)]
    params = params | {"do_remote_decode": True}
    p.add("at P", params, ids=prompt, cache_salt=salt)
    assert not orders_of(p.step(), Fetch)


def test_a_lease_answers_for_its_own_beginnings_alone(d):
    """Whatever a ticket says: who reads has to show a digest that the lease itself has."""
    d.answer()
    (grant,) = d.taken(Grant)
    terms = grant.terms
    assert sorted(terms.prefixes) == [16, 32, 48]
    assert len({*terms.prefixes.values()}) == 3
    assert [terms.digest_of(n) for n in (0, 15, 17, 49, 64)] == [None] * 5


def test_without_the_option_decode_lends_nothing_and_prefill_loads_nothing(d):
    plain = EngineCore()
    request = plain.add("r", HERE, max_tokens=4)
    for _ in range(5):
        plain.step()
    assert request.is_finished() and plain.answers["r"] is None and not plain.blocks_in_use
    ids, params = d.answer()
    _, orders = goes_on(plain, [*ids, *range(200, 220)], params)
    assert not [one for one in orders if isinstance(one, Fetch | RenewLease)]


@pytest.mark.parametrize("params", [None, {}])
def test_who_names_no_router_has_nothing_lent(d, params):
    _, answered = d.answer(params=params)
    assert answered is None and d.core.blocks_in_use == 0


def test_a_sample_of_several_is_not_lent(d):
    _, answered = d.answer(request_id="0_cmpl-1")
    assert answered is None


def test_an_aborted_answer_is_not_lent(d):
    from vllm.v1.request import RequestStatus

    d.core.add("r", HERE, max_tokens=ANSWERED)
    d.step()
    d.core.scheduler.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    d.step()
    assert not d.taken(Grant) and d.core.blocks_in_use == 0


def test_leases_keep_no_more_blocks_than_are_free(d):
    """39 blocks, 4 each: the fifth is lent while 19 are free, the next ones cost the oldest."""
    for i in range(8):
        d.answer(f"r{i}", first=100 * i)
        d.step(finished_sending=sent(d))
    assert list(d.core.scheduler.requests) == ["r4", "r5", "r6", "r7"]
    assert d.core.blocks_in_use == 16


def sent(d):
    """What the workers say of leases that were revoked."""
    revoked = {lease_id for one in d.taken(Revoke) for lease_id in one.lease_ids}
    names = {g.terms.lease_id: g.terms.request_id for g in d.orders if isinstance(g, Grant)}
    return {names[one] for one in revoked}


def test_a_prompt_that_gets_no_blocks_takes_those_of_turns_that_never_came():
    d = Decode(num_blocks=17)  # 16
    d.answer("old", tokens=20)
    d.answer("new", first=300, tokens=20)
    assert d.core.blocks_in_use == 6
    wants = d.core.add(
        "wants", HERE, first=600, tokens=200, max_tokens=4
    )  # 13, of 10 that are free
    d.step()
    assert not wants.num_computed_tokens
    assert sent(d) == {"old"}, "13 are free then"
    d.step(finished_sending={"old"})
    d.step()
    assert wants.num_computed_tokens
    assert list(d.core.scheduler.requests) == ["new", "wants"]


def test_who_waits_for_its_prefill_wants_no_blocks_yet(d):
    d.answer()
    d.core.connector.scheduler.early_loads.most = 0
    early = {"do_remote_prefill": True, "transfer_id": "x", "remote_engine_id": "P"}
    d.core.add("early", early | {"remote_host": "p", "remote_port": 1}, first=300)
    for _ in range(3):
        d.step()
    assert not d.taken(Revoke)


def test_who_wants_much_gets_several_leases_at_once(d):
    for i in range(4):
        d.answer(f"r{i}", first=100 * i)
    turns = d.core.connector.scheduler.turns
    asks = d.core.add("asks", HERE, first=900, tokens=250)  # 16, and then 31; 23 are free
    turns.asked(asks)
    assert turns.to_revoke() == ["r0"]
    turns.over(["r0"])
    turns.asked(d.core.add("more", HERE, first=900, tokens=496))
    assert turns.to_revoke() == ["r1", "r2"]


def test_who_is_refused_whatever_we_count_gets_one_lease_after_the_other(d):
    for i in range(3):
        d.answer(f"r{i}", first=100 * i)
    turns = d.core.connector.scheduler.turns
    asks, given = d.core.add("asks", HERE, first=900), []
    for _ in range(4):
        turns.asked(asks)
        given.append(turns.to_revoke())
        turns.over(given[-1])
    assert given == [["r0"], ["r1"], ["r2"], []]


def test_answered_requests_are_no_work_for_the_engine(d):
    """They may be kept for minutes, in which vLLM would step every millisecond."""
    d.answer()
    assert not d.core.scheduler.has_finished_requests()
    assert not d.core.scheduler.has_requests()
    d.core.lend("a prompt", first=300)
    d.step()
    assert d.core.scheduler.has_finished_requests(), "whose lease is over soon"


def test_an_engine_that_ends_waits_for_no_next_turn(d, monkeypatch):
    d.answer()
    monkeypatch.setattr(leaving, "asked_at", time.monotonic())
    d.step()
    assert sent(d) == {"at D"}
    _, answered = d.answer("another", first=300)
    assert answered is None


def test_a_failed_load_of_a_turn_is_computed(p, d):
    """vLLM's default would answer the client with an error."""
    ids, params = d.answer()
    request, _ = goes_on(p, [*ids, *range(200, 220)], params)
    p.step(finished_recving={"at P"}, failed_recving={"at P"})
    p.step()
    assert request.num_computed_tokens >= len(ids) + 20
    assert p.answers["at P"]["do_remote_prefill"]


def test_a_turn_of_our_own_engine_is_in_its_prefix_cache_already(d):
    ids, params = d.answer()
    request = d.core.add("again", params, ids=[*ids, *range(200, 220)])
    d.step()
    assert request.is_finished()
    assert not d.taken(Fetch)


def at_prefill(ids):
    """What a request is told whose prompt an older prefill engine has computed."""
    there = {"remote_engine_id": "P", "remote_host": "10.0.0.1", "remote_port": 7777}
    blocks = {"remote_request_id": "at P", "remote_block_ids": [[1]], "remote_num_tokens": ids}
    return {"do_remote_prefill": True} | there | blocks


def several(*others):
    """Options of KVConnectMulti whose first child lends to next turns."""
    both = {"bidirectional_kv_xfer": True, "kv_recompute_threshold": 0}
    ours = {"kv_connector_module_path": "kvconnect.vllm"}
    children = [child("KVConnectNixl", **both) | ours, *others]
    return {"connector": "KVConnectMulti", "connectors": children}


@pytest.mark.parametrize("chained", [False, True])
def test_a_load_that_has_its_blocks_wants_none_of_a_next_turn(chained):
    """In a chain, too, where a connector is not told of blocks but asked for its offer."""
    ours = {"kv_connector_module_path": "kvconnect.vllm"}
    d = core(**several(child("KVConnectNixl") | ours) if chained else {})
    answered = d.add("answered", HERE)
    d.step()
    assert answered.is_finished() and list(d.connector.next_turns()) == ["answered"]
    d.add("loads", at_prefill(40), first=300)
    made = d.step()
    assert d.scheduler.requests["loads"].status.name == "WAITING_FOR_REMOTE_KVS"
    orders = [order for one in getattr(made, "metadata", [made]) for order in one.take()]
    assert [type(one) for one in orders if isinstance(one, Grant | Revoke)] == [Grant]


def test_a_failed_load_of_a_turn_is_computed_beside_a_child_of_another_maker():
    assert core(**several(child())).scheduler.recompute_kv_load_failures


def test_who_has_loaded_a_part_takes_the_blocks_for_the_rest():
    """vLLM does not ask about it again, and lets nobody pass it: the engine would stand still."""
    d = Decode(num_blocks=25)
    answered = d.core.add("answered", HERE, tokens=150, max_tokens=ANSWERED)
    d.step()
    asks = d.core.add("asks", at_prefill(32), first=300, tokens=210)
    while not answered.is_finished():
        d.step()
    d.step(finished_recving={"asks"})  # 2 blocks of 14; 11 are lent, 11 free
    for _ in range(3):
        d.step()
    assert not asks.num_output_tokens
    assert sent(d) == {"answered"}
    d.step(finished_sending={"answered"})
    d.step()
    assert asks.num_output_tokens


@pytest.mark.parametrize("loaded", [True, False])
def test_who_ends_before_it_computes_wants_nothing_any_more(loaded):
    from vllm.v1.request import RequestStatus

    d = Decode()
    d.core.add("asks", at_prefill(32), first=300, tokens=250)
    d.step()
    turns = d.core.connector.scheduler.turns
    if loaded:
        turns.received("asks")
    assert turns.uncomputed == {"asks": loaded}
    d.core.scheduler.finish_requests("asks", RequestStatus.FINISHED_ABORTED)
    d.step(finished_recving={"asks"})
    assert not turns.uncomputed


def test_who_has_loaded_all_takes_nothing_from_a_next_turn():
    d = Decode(num_blocks=29)
    d.answer()  # 4 blocks are lent, and 13 loaded: of the 11 that are free none is wanted
    asks = d.core.add("asks", at_prefill(200), first=300, tokens=200, max_tokens=4)
    d.step()
    turns = d.core.connector.scheduler.turns
    turns.received("asks")  # by now; vLLM hears of it later
    d.step()
    assert turns.uncomputed == {"asks": True} and not d.taken(Revoke)
    d.step(finished_recving={"asks"})
    d.step()
    assert asks.num_output_tokens and not turns.uncomputed
