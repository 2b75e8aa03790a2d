"""What the prefill scheduler's half tells of requests that are read while they are computed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from halves import BLOCK, Block, Engine
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import RequestStatus

from kvconnect.config import MooncakeConfig, NixlConfig
from kvconnect.orders import Fetch, Grant, Promise, Release, RenewLease, Withdraw
from kvconnect.vllm import _compat, prefill_progress
from kvconnect.vllm.mooncake.protocol import MooncakeProtocol
from kvconnect.vllm.nixl import PushProtocol
from kvconnect.vllm.prefill_progress import step_tokens
from kvconnect.vllm.protocol import RouterProtocol

TOKENS = 40
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=32
)
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "x"}
DECODE = {
    "do_remote_prefill": True,
    "transfer_id": "x",
    "remote_engine_id": "P",
    "remote_host": "10.0.0.1",
    "remote_port": 7777,
}


@pytest.fixture(autouse=True)
def every_block_is_worth_telling(monkeypatch):
    monkeypatch.setattr(prefill_progress, "WORTH_TELLING_BYTES", 1)


def blocks(*ids):
    return SimpleNamespace(blocks=[[Block(i) for i in ids]])


class Prefill:
    """An engine whose test says what vLLM schedules."""

    def __init__(self, spec=FULL, drafts=None, config=None, protocol=RouterProtocol):
        options = {"spec": spec, "drafts": drafts}
        self.engine = Engine("P", "kv_both", config or NixlConfig(), protocol, **options)
        self.tables = {}

    def arrives(self, params=PREFILL, request_id="r", **fields):
        request = self.engine.arrives(params, request_id, num_computed_tokens=0, **fields)
        (promise,) = self.engine.steps([Promise])
        return request, promise

    def step(self, request, tokens, new=False, resumed=False, preempted=()):
        """Schedule so many tokens of a request; returns the orders that go with the step."""
        count = -(-(request.num_computed_tokens + tokens) // BLOCK)
        table = self.tables.setdefault(request.request_id, [])
        table += range(100 + len(table), 100 + count)
        rid = request.request_id
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=rid)] if new else [],
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={rid} if resumed else set()),
            preempted_req_ids=set(preempted),
            num_scheduled_tokens={rid: tokens} if tokens else {},
            kv_connector_block_state=SimpleNamespace(
                get_block_ids=lambda r: (self.tables[r],) if tokens else None
            ),
        )
        self.engine.scheduler.progress.step(output)
        orders = self.engine.scheduler.take_orders()
        request.num_computed_tokens += tokens
        return orders

    def answers(self):
        """A request that was computed in one step: what is given back with its answer."""
        request, _ = self.arrives(request_id="before")
        request.status, request.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, TOKENS
        _, said = self.engine.scheduler.request_finished(request, ([1, 2, 3],))
        self.engine.scheduler.take_orders()
        return said

    def finishes(self, request):
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        self.engine.scheduler.request_finished(request, (self.tables[request.request_id],))
        return self.engine.scheduler.take_orders()


def test_each_step_tells_what_those_before_it_completed():
    p = Prefill()
    request, promise = p.arrives()
    assert promise.name == "transfer x"
    assert p.step(request, 10, new=True) == []
    assert p.step(request, 10) == [], "no block was complete"
    (first,) = p.step(request, 18)
    assert (first.lease_id, first.blocks, first.tokens) == (promise.lease_id, ((100,),), TOKENS)
    (second,) = p.step(request, 2)
    assert second.blocks == ((101,),)
    (grant,) = p.finishes(request)
    assert isinstance(grant, Grant)
    assert (grant.terms.lease_id, grant.terms.digest) == (promise.lease_id, first.digest)
    assert grant.terms.tables == ((100, 101, 102),)


def told_by_step(p, prompt_tokens, step_tokens):
    """How many blocks are told with each step of a prompt."""
    ids = list(range(prompt_tokens))
    prompt = {"prompt_token_ids": ids, "_all_token_ids": ids, "num_prompt_tokens": prompt_tokens}
    request, _ = p.arrives(**prompt)
    counts = []
    for done in range(0, prompt_tokens, step_tokens):
        orders = p.step(request, min(step_tokens, prompt_tokens - done), new=not done)
        counts.append(sum(len(order.blocks[0]) for order in orders))
    (grant,) = p.finishes(request)
    assert grant.terms.tables == (tuple(p.tables["r"]),)
    return counts


def test_a_little_is_told_with_what_follows(monkeypatch):
    """Used to be told with every step, however little it was: four messages and a read each."""
    block_bytes = FULL.page_size_bytes
    monkeypatch.setattr(prefill_progress, "WORTH_TELLING_BYTES", 4 * block_bytes)
    assert told_by_step(Prefill(), 12 * BLOCK, BLOCK) == [0, 0, 0, 0, 4, 0, 0, 0, 4, 0, 2, 0]
    assert told_by_step(Prefill(), 12 * BLOCK, 4 * BLOCK) == [0, 4, 4]
    assert told_by_step(Prefill(), 3 * BLOCK, BLOCK) == [0, 1, 0]


def test_what_a_prompt_of_two_small_steps_completed_comes_with_the_grant(monkeypatch):
    monkeypatch.setattr(prefill_progress, "WORTH_TELLING_BYTES", 2 * FULL.page_size_bytes)
    assert told_by_step(Prefill(), 2 * BLOCK, BLOCK) == [0, 0]
    assert told_by_step(Prefill(), 4 * BLOCK, 2 * BLOCK) == [0, 2]


def test_a_little_is_told_with_the_first_token_after_the_prompt(monkeypatch):
    monkeypatch.setattr(prefill_progress, "WORTH_TELLING_BYTES", 1 << 30)
    p = Prefill()
    request, _ = p.arrives()
    assert p.step(request, TOKENS, new=True) == []
    (told,) = p.step(request, 1)
    assert told.blocks == ((100, 101),)


def test_a_block_of_a_group_is_as_large_as_those_of_all_its_layers():
    layers = {"a": FULL, "b": replace(FULL, num_kv_heads=2 * FULL.num_kv_heads)}
    of_each = UniformTypeKVCacheSpecs(BLOCK, layers)
    for spec, blocks_of_a in ((FULL, 2), (of_each, 3)):
        group = KVCacheGroupSpec(list(layers), spec)
        assert _compat.block_bytes(group) == blocks_of_a * FULL.page_size_bytes


def test_a_prefix_hit_is_told_with_the_step_after_its_first():
    """The blocks that it hit may be computed by the same step: vLLM caches what it schedules."""
    p = Prefill()
    request, _ = p.arrives()
    request.num_computed_tokens = 32
    assert p.step(request, 4, new=True) == []
    (order,) = p.step(request, 4)
    assert order.blocks == ((100, 101),)


def test_a_preempted_request_is_promised_anew():
    p = Prefill()
    request, promise = p.arrives()
    p.step(request, 16, new=True)
    assert len(p.step(request, 16)) == 1
    request.num_computed_tokens, p.tables = 0, {"other": []}
    again, withdraw = p.step(request, 0, preempted=["r"])
    assert (type(again), type(withdraw)) == (Promise, Withdraw)
    assert (again.name, withdraw.lease_id) == ("transfer x", promise.lease_id)
    assert withdraw.successor == again.lease_id != promise.lease_id
    p.tables["r"] = [7, 8]
    assert p.step(request, 20, resumed=True) == []
    (order,) = p.step(request, 16)
    assert (order.lease_id, order.blocks) == (again.lease_id, ((7,),))


@pytest.mark.parametrize("how", ["new", "resumed"])
def test_one_that_is_admitted_again_without_a_word_is_promised_anew(how):
    p = Prefill()
    request, promise = p.arrives()
    p.step(request, 16, new=True)
    p.step(request, 16)
    request.num_computed_tokens = 0
    orders = p.step(request, 16, **{how: True})
    assert [type(o) for o in orders] == [Promise, Withdraw]
    assert orders[1].lease_id == promise.lease_id


def test_one_whose_tokens_are_taken_back_is_promised_anew():
    """As vLLM does with blocks of a load that has failed."""
    p = Prefill()
    request, _ = p.arrives()
    p.step(request, 16, new=True)
    p.step(request, 16)
    request.num_computed_tokens = 0
    assert [type(o) for o in p.step(request, 16)] == [Promise, Withdraw]
    (order,) = p.step(request, 16)
    assert order.blocks == ((100,),)


def test_tokens_that_are_taken_back_within_a_block_count_too():
    """As vLLM does with a request that hit a block which another's load failed to fill."""
    p = Prefill()
    request, promise = p.arrives()
    request.num_computed_tokens = 16
    p.step(request, 4, new=True)
    (told,) = p.step(request, 8)
    assert told.blocks == ((100,),)
    request.num_computed_tokens = 16
    orders = p.step(request, 4)
    assert [type(o) for o in orders] == [Promise, Withdraw]
    assert orders[1].lease_id == promise.lease_id


def test_tokens_that_the_first_step_has_not_left_are_taken_back_too():
    """vLLM lets a request hit a block again while another's load of it is made good: only then."""
    p = Prefill()
    request, _ = p.arrives()
    request.num_computed_tokens = 16
    p.step(request, 4, new=True)
    request.num_computed_tokens = 16
    assert p.step(request, 4) == [], "the block is computed in this step"
    (told,) = p.step(request, 4)
    assert told.blocks == ((100,),)


def test_a_step_costs_nothing_for_requests_that_are_not_in_it():
    class Id(str):
        looked_at = 0

        def __hash__(self):
            Id.looked_at += 1
            return super().__hash__()

    p = Prefill()
    for number in range(10):
        p.arrives(PREFILL | {"transfer_id": f"x{number}"}, Id(number))
    request, _ = p.arrives()
    Id.looked_at = 0
    p.step(request, 16, new=True)
    (told,) = p.step(request, 16)
    assert told.blocks == ((100,),)
    assert Id.looked_at == 0


def test_blocks_that_vllm_changed_are_another_lease():
    p = Prefill()
    request, promise = p.arrives()
    p.step(request, 16, new=True)
    p.step(request, 24)
    p.tables["r"][0] = 55
    again, withdraw, grant = p.finishes(request)
    assert withdraw.lease_id == promise.lease_id
    assert grant.terms.lease_id == again.lease_id == withdraw.successor


@pytest.mark.parametrize("case", ["no name", "window", "drafts", "adapter"])
def test_nothing_is_told_where_nobody_reads_early_or_blocks_are_let_go(case):
    p = Prefill(WINDOW if case == "window" else FULL, drafts=object() if case == "drafts" else None)
    params = {k: v for k, v in PREFILL.items() if case != "no name" or k != "transfer_id"}
    fields = {"lora_request": object()} if case == "adapter" else {}
    request, _ = p.arrives(params, **fields)
    for number, tokens in enumerate((16, 16, 8)):
        assert p.step(request, tokens, new=number == 0) == []


def test_prefill_says_what_it_computes_in_a_step_and_a_name_back():
    """By the first a router knows that it may name the next prompt's transfer to both engines."""
    p = Prefill()
    request, _ = p.arrives()
    request.status, p.tables = RequestStatus.FINISHED_LENGTH_CAPPED, {"r": [1, 2, 3]}
    request.num_computed_tokens = TOKENS
    _, params = p.engine.scheduler.request_finished(request, ([1, 2, 3],))
    assert (params["transfer_id"], params["step_tokens"]) == ("x", 2048)
    p.engine.scheduler.take_orders()
    unnamed, _ = p.arrives({k: v for k, v in PREFILL.items() if k != "transfer_id"}, "r2")
    unnamed.status, unnamed.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, TOKENS
    _, params = p.engine.scheduler.request_finished(unnamed, ([4, 5, 6],))
    assert params["step_tokens"] == 2048 and "transfer_id" not in params


@pytest.mark.parametrize(
    ("scheduler", "tokens"),
    [
        ((2048, None, 0), 2048),
        ((2048, 1024, 0), 1024),
        ((2048, 1024, 256), 256),
        ((2048, None, 4096), 2048),
    ],
    ids=str,
)
def test_a_step_computes_no_more_than_every_option_allows(scheduler, tokens):
    names = ("max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold")
    config = SimpleNamespace(**dict(zip(names, scheduler, strict=True)))
    assert step_tokens(SimpleNamespace(scheduler_config=config)) == tokens


def test_with_a_ticket_a_transfer_id_is_only_a_name():
    """A router that asks in turn passes on all that prefill answered."""
    p, d = Prefill(), Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    request, promise = p.arrives()
    request.status, request.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, TOKENS
    _, params = p.engine.scheduler.request_finished(request, ([1, 2, 3],))
    d.arrives(params, num_computed_tokens=0)
    (renew,) = d.steps([RenewLease])
    assert (renew.source.lease_id, renew.source.wait_s) == (promise.lease_id, 0)


@pytest.mark.parametrize("secret", [False, True])
def test_readers_of_mooncakes_routers_come_early_too(tmp_path, monkeypatch, secret):
    """With a secret as well: their offers need no ticket, since all that they go by is proved."""
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", "0")
    (tmp_path / "secret").write_text("0123456789abcdef")
    config = MooncakeConfig(auth_secret_file=str(tmp_path / "secret") if secret else None)
    p = Prefill(config=config, protocol=MooncakeProtocol)
    try:
        request, promise = p.arrives()
        assert promise.name == "transfer x"
        assert p.step(request, 16, new=True) == []
        (order,) = p.step(request, 24)
        assert (order.lease_id, order.blocks) == (promise.lease_id, ((100,),))
        unnamed, _ = p.arrives({"do_remote_decode": True}, "r2")
        assert p.step(unnamed, 16, new=True) == p.step(unnamed, 24) == []
    finally:
        p.engine.scheduler.close()


def test_an_aborted_request_is_forgotten():
    p = Prefill()
    request, promise = p.arrives()
    p.step(request, 16, new=True)
    p.step(request, 16)
    request.status = RequestStatus.FINISHED_ABORTED
    p.engine.scheduler.request_finished(request, ([],))
    (withdraw,) = p.engine.scheduler.take_orders()
    assert withdraw == Withdraw(promise.lease_id)
    assert p.step(request, 16) == []


def test_decode_is_asked_at_once():
    d = Engine("D", "kv_both", NixlConfig(prefill_timeout=33), RouterProtocol)
    request = d.arrives(DECODE, num_computed_tokens=0)
    (renew,) = d.steps([RenewLease])
    assert renew.source.request_id == "transfer x" and renew.source.wait_s == 33
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == TOKENS
    d.scheduler.update_state_after_alloc(request, blocks(7, 8, 9), TOKENS)
    (fetch,) = d.steps([Fetch])
    assert (fetch.tokens, fetch.source) == (TOKENS, renew.source)


@pytest.fixture
def secret(tmp_path):
    """Configurations that have it."""
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef0123456789abcdef")
    return NixlConfig(auth_secret_file=str(path), prefill_timeout=33)


def test_with_a_secret_decode_goes_by_a_ticket_of_that_engines(secret):
    """Of an earlier request: where the engine is counts, and not what it leased."""
    p, d = Prefill(config=secret), Engine("D", "kv_both", secret, RouterProtocol)
    said = p.answers()
    assert said["transfer_id"] == "x"
    asked = DECODE | {"transfer_id": "y", "kvconnect_engine": said["kvconnect"]}
    request = d.arrives(asked | {"remote_host": "10.6.6.6"}, num_computed_tokens=0)
    (renew,) = d.steps([RenewLease])
    source = renew.source
    assert (source.request_id, source.lease_id, source.wait_s) == ("transfer y", None, 33)
    (address,) = source.shards
    assert (address.host, address.port, address.key) == ("127.0.0.1", 7777, "k")
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == TOKENS
    again, promise = p.arrives(PREFILL | {"transfer_id": "y"}, "r2")
    assert promise.name == "transfer y"
    assert p.step(again, 16, new=True) == []
    (told,) = p.step(again, 24)
    assert told.lease_id == promise.lease_id


@pytest.mark.parametrize("ticket", [None, "another secret's", "none's"])
def test_with_a_secret_decode_dials_nobody_whom_no_ticket_names(secret, tmp_path, ticket):
    d = Engine("D", "kv_both", secret, RouterProtocol)
    (tmp_path / "another").write_text("fedcba9876543210fedcba9876543210")
    another = NixlConfig(auth_secret_file=str(tmp_path / "another"))
    named = {}
    if ticket:
        said = Prefill(config=another if ticket != "none's" else NixlConfig()).answers()
        named = {"kvconnect_engine": said["kvconnect"]}
    request = d.arrives(DECODE | named, num_computed_tokens=0)
    assert d.scheduler.take_orders() == []
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 0
    assert d.scheduler.take_stats()["num_invalid_params"] == 1


PUSH = {  # what vLLM's disagg_proxy_pushconnector_demo.py sends
    "do_remote_decode": False,
    "do_remote_prefill": True,
    "remote_engine_id": "P",
    "remote_host": "10.0.0.1",
    "remote_port": 7777,
    "tp_size": 1,
    "pp_size": 1,
    "remote_request_id": "7f",
}
AT_P, AT_D, SHARED = "cmpl-7f-0-0123abcd", "cmpl-7f-0-fedc9876", "cmpl-7f-0"


@pytest.mark.parametrize("protocol", [RouterProtocol, PushProtocol])
def test_engines_that_a_push_router_asks_at_once_meet_under_the_id(protocol):
    p = Prefill(protocol=protocol)
    d = Engine("D", "kv_both", NixlConfig(prefill_timeout=33), protocol)
    request, promise = p.arrives({"do_remote_decode": True}, AT_P)
    decoding = d.arrives(PUSH, AT_D, num_computed_tokens=0)
    d.scheduler.update_state_after_alloc(decoding, blocks(7, 8, 9), TOKENS)
    fetch = d.steps([RenewLease, Fetch])[1]
    assert (promise.name, fetch.source.request_id) == (SHARED, SHARED)
    assert (fetch.source.wait_s, fetch.source.lease_id) == (33, None)
    assert p.step(request, 16, new=True) == []
    told = p.step(request, 24)
    if protocol is PushProtocol:
        assert [(one.lease_id, one.digest) for one in told] == [(promise.lease_id, fetch.digest)]
    else:
        assert told == [], "it comes at the end, and pulls cost prefill nothing meanwhile"
    (grant,) = p.finishes(request)
    assert (grant.terms.name, grant.terms.digest) == (SHARED, fetch.digest)


def test_a_router_that_asks_in_turn_and_drops_the_ticket_names_each_request_apart():
    """A client may send one X-Request-Id with all that it asks: the last one has that name."""
    p, d = Prefill(), Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    for request_id in (AT_P, f"{SHARED}-89abcdef"):
        request, promise = p.arrives({"do_remote_decode": True}, request_id)
        assert promise.name == SHARED
        request.status, request.num_computed_tokens = RequestStatus.FINISHED_LENGTH_CAPPED, TOKENS
        _, params = p.engine.scheduler.request_finished(request, ([1, 2, 3],))
        p.engine.scheduler.take_orders()
        del params["kvconnect"]
        d.arrives(params, f"d {request_id}", num_computed_tokens=0)
        (renew,) = d.steps([RenewLease])
        assert (renew.source.request_id, renew.source.wait_s) == (request_id, 0)


def test_a_request_that_loads_and_lends_looks_for_what_its_params_name():
    """Its own id is the name of what it lends."""
    p = Engine("P", "kv_both", NixlConfig(), RouterProtocol)
    held = PUSH | {"do_remote_decode": True, "remote_engine_id": "D", "remote_block_ids": [[1, 2]]}
    p.arrives(held, AT_P, num_computed_tokens=0)
    promise, renew = p.steps([Promise, RenewLease])
    assert (renew.source.request_id, renew.source.wait_s) == ("7f", 0)
    assert promise.request_id == AT_P


@pytest.mark.parametrize(
    ("request_id", "changed"),
    [
        (AT_D, {"remote_engine_id": None}),
        (AT_D, {"remote_port": 0}),
        (AT_D, {"remote_host": "\udfff"}),
        (AT_D, {"remote_request_id": None}),
        (AT_D, {"remote_block_ids": []}),
        ("-0123abcd", {}),
        ("\udfff-0123abcd", {}),
        ("x" * 2000, {}),
    ],
    ids=ascii,
)
def test_what_cannot_be_a_push_is_computed_here(request_id, changed):
    d = Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    request = d.arrives(PUSH | changed, request_id, num_computed_tokens=0)
    assert d.scheduler.take_orders() == []
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 0


def test_with_a_secret_nobody_meets_under_an_id(tmp_path):
    (tmp_path / "secret").write_text("0123456789abcdef")
    config = NixlConfig(auth_secret_file=str(tmp_path / "secret"))
    _, promise = Prefill(config=config, protocol=PushProtocol).arrives(
        {"do_remote_decode": True}, AT_P
    )
    assert promise.name == ""
    d = Engine("D", "kv_both", config, RouterProtocol)
    d.arrives(PUSH, AT_D, num_computed_tokens=0)
    assert d.scheduler.take_orders() == []


def test_mooncakes_prefill_names_no_lease_by_an_id_so_nobody_waits_for_one():
    d = Engine("D", "kv_consumer", MooncakeConfig(), MooncakeProtocol)
    d.arrives(PUSH, AT_D, num_computed_tokens=0)
    assert d.scheduler.take_orders() == []


def test_a_push_that_is_aborted_before_it_runs_lets_go_of_the_lease():
    d = Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    d.arrives(PUSH, AT_D, num_computed_tokens=0, abort_immediately=True)
    renew, release = d.steps([RenewLease, Release])
    assert renew.source == release.source and release.source.request_id == SHARED


def test_prefill_that_has_answered_is_not_waited_for():
    """A router may copy fields without the ticket, and an older prefill engine knows no names."""
    d = Engine("D", "kv_both", NixlConfig(prefill_timeout=33), RouterProtocol)
    d.arrives(DECODE | {"remote_block_ids": [[1, 2, 3]]}, num_computed_tokens=0)
    (renew,) = d.steps([RenewLease])
    assert renew.source.request_id == "transfer x" and renew.source.wait_s == 0


def test_prefill_and_decode_agree_on_name_and_digest():
    p, d = Prefill(), Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    request, promise = p.arrives()
    p.step(request, 16, new=True)
    (order,) = p.step(request, 24)
    decoding = d.arrives(DECODE, num_computed_tokens=0)
    d.scheduler.update_state_after_alloc(decoding, blocks(7, 8, 9), TOKENS)
    fetch = d.steps([RenewLease, Fetch])[1]
    assert fetch.source.request_id == promise.name
    assert (fetch.tokens, fetch.digest) == (order.tokens, order.digest)


@pytest.mark.parametrize(
    "changed",
    [
        {"remote_port": "x"},
        {"remote_host": None},
        {"remote_engine_id": None},
        {"transfer_id": 5},
        {"transfer_id": "\n"},
        {"transfer_id": "x" * 1020},
        {"remote_engine_id": "D"},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_bad_params_are_prefilled_here(changed):
    d = Engine("D", "kv_both", NixlConfig(), RouterProtocol)
    request = d.arrives(DECODE | changed, num_computed_tokens=0)
    assert d.scheduler.get_num_new_matched_tokens(request, 0) == 0
