"""Loads that may wait for prefill hold at most half of decode's blocks: vLLM's own schedulers."""

import pytest
from vllm.v1.request import RequestStatus
from vllm_scheduler import EngineCore

from kvconnect.orders import Fetch, Grant, RenewLease
from kvconnect.vllm.early_loads import EarlyLoads
from kvconnect.vllm.worker import WorkerMetadata

TOKENS = 96  # six blocks
AT_P = {"remote_engine_id": "P", "remote_host": "10.0.0.1", "remote_port": 7777}


def named(request_id, role):
    return {f"do_remote_{role}": True, "transfer_id": request_id}


class Decode(EngineCore):
    """A decode engine; which loads have ended, and what is computed at prefill, the test says."""

    def __init__(self, num_blocks):
        self.loading, self.reports = [], []
        super().__init__(num_blocks=num_blocks)

    def asked(self, request_id, **asked):
        params = named(request_id, "prefill") | AT_P
        return self.add(request_id, params, max_tokens=2, **{"tokens": TOKENS, **asked})

    def step(self, ended=(), computed=()):
        told = {"finished_recving": set(ended)}
        if computed:
            told["kv_connector_worker_meta"] = WorkerMetadata({}, None, frozenset(computed))
        for order in super().step(**told).take():
            if isinstance(order, Fetch):
                self.loading.append(order.request_id)
            elif isinstance(order, RenewLease) and order.reports:
                self.reports.append(order.request_id)
        self.loading = [one for one in self.loading if one not in ended]


def both_run(p, d):
    """Steps of prefill and decode; what prefill has computed is loaded, and computed is told."""
    granted, sent = {}, set()
    for _ in range(40):
        for order in p.step(finished_sending=sent).take():
            if isinstance(order, Grant):
                granted[order.terms.request_id] = order.terms
        sent = {name for name in d.loading if name in granted}
        d.step(ended=sent, computed=granted.keys() & set(d.reports))


@pytest.fixture
def decode():
    return Decode(num_blocks=41)  # one of them vLLM keeps


def test_early_loads_hold_at_most_half_and_others_pass_those_that_wait(decode):
    for number, name in enumerate(("a", "b", "c", "d")):
        decode.asked(name, first=number * 1000)
    decode.asked("small", first=5000, tokens=32)
    decode.add("alone", first=6000, tokens=TOKENS, max_tokens=9)
    decode.step()
    assert decode.loading == ["a", "b", "c", "small"], "of 20 blocks"
    assert decode.reports == ["d"]
    assert decode.blocks_in_use == 3 * 6 + 2 + 6
    decode.step()
    assert decode.reports == ["d"], "that is asked for once"
    decode.step(ended=["a"])
    decode.step()
    assert decode.loading == ["b", "c", "small", "d"]


def test_what_prefill_has_computed_is_loaded_whoever_holds_that_half(decode):
    for number, name in enumerate(("a", "b", "c", "d", "e")):
        decode.asked(name, first=number * 1000)
    decode.step()
    decode.step(computed=["e", "nobody"])
    decode.step()
    assert decode.loading == ["a", "b", "c", "e"]
    decode.step(ended=["e"])
    decode.step()
    assert decode.loading == ["a", "b", "c"], "it was none of those"


def test_who_ends_while_it_waits_or_loads_leaves_nothing(decode):
    for number, name in enumerate(("a", "b", "c", "d")):
        decode.asked(name, first=number * 1000)
    decode.step()
    finish = decode.scheduler.finish_requests
    finish(["c", "d"], RequestStatus.FINISHED_ABORTED)
    decode.asked("e", first=7000)
    decode.step()
    assert decode.loading == ["a", "b", "c"], "c holds its blocks until its read has ended"
    decode.step(ended=["c"])
    decode.step()
    assert decode.loading == ["a", "b", "e"]


def test_who_ended_while_it_waited_is_forgotten(decode):
    """Else another request of that id would not be asked about."""
    for number, name in enumerate(("a", "b", "c", "d")):
        decode.asked(name, first=number * 1000)
    decode.step()
    decode.scheduler.finish_requests(["d"], RequestStatus.FINISHED_ABORTED)
    decode.step()
    decode.asked("d", first=3000)
    decode.step()
    assert decode.reports == ["d", "d"]


def test_other_movers_are_asked_again(decode):
    for number, name in enumerate(("a", "b", "c", "d")):
        decode.asked(name, first=number * 1000)
    decode.step()
    decode.connector.scheduler.early_loads.ask_again()
    decode.step()
    assert decode.reports == ["d", "d"]


def test_a_prompt_that_is_larger_than_half_waits_until_it_is_computed(decode):
    decode.asked("a", tokens=250)
    decode.asked("b", first=1000, tokens=250)
    decode.step()
    assert decode.loading == ["a"] and decode.reports == ["b"]


@pytest.mark.parametrize("rule", [True, False])
def test_full_engines_that_have_their_requests_in_opposite_orders_do_not_wait_for_each_other(
    rule, monkeypatch
):
    """Each has blocks for three of six prompts."""
    if not rule:
        monkeypatch.setattr(EarlyLoads, "may_begin", lambda *_: True)
    p, d = EngineCore(num_blocks=21), Decode(num_blocks=21)
    names = ["a", "b", "c", "d", "e", "f"]
    for number, name in enumerate(names):
        d.asked(name, first=number * 1000)
    for name in ("d", "e", "f", "a", "b", "c"):
        p.add(name, named(name, "decode"), first=names.index(name) * 1000, tokens=TOKENS)
    both_run(p, d)
    assert (d.answers.keys() == set(names)) is rule, "without the rule each waits for the other"
    assert (p.blocks_in_use == d.blocks_in_use == 0) is rule


@pytest.mark.parametrize("rule", [True, False])
def test_a_long_prompt_behind_early_loads_finds_blocks_once_it_is_computed(rule, monkeypatch):
    """Prefill has blocks for the long prompt alone; those that load early are behind it there."""
    if not rule:
        monkeypatch.setattr(EarlyLoads, "may_begin", lambda *_: True)
    p, d = EngineCore(num_blocks=21), Decode(num_blocks=21)
    d.asked("short", tokens=160)  # half of decode's blocks
    d.asked("long", first=1000, tokens=224)  # more than the other half
    p.add("long", named("long", "decode"), first=1000, tokens=224)
    p.add("short", named("short", "decode"), tokens=160)
    both_run(p, d)
    assert (d.answers.keys() == {"short", "long"}) is rule, "each waits for the other"
    assert (p.blocks_in_use == d.blocks_in_use == 0) is rule
