"""The planner: every offer ends in exactly one way, every promise is kept or withdrawn."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, multiple, rule

from kvconnect.control.wire import Address
from kvconnect.lease import Terms
from kvconnect.orders import (
    Cancel,
    EngineAddresses,
    Fetch,
    Grant,
    Offer,
    Promise,
    Release,
    RenewLease,
    Source,
    Withdraw,
)
from kvconnect.planner import Planner

ADDRESS = Address("host", 1)
SOURCE = Source((ADDRESS,), "remote", "g", 5.0)
OFFER = Offer(SOURCE, 32, b"digest")
BLOCKS = (((0, 4), (1, 7)),)
GRANTED = Terms("p", "", ((4, 7),), 32, b"digest", 5.0)


@pytest.fixture
def planner():
    return Planner()


def test_an_offer_is_renewed_and_matched_until_it_is_loaded(planner):
    planner.renew("r", OFFER)
    assert planner.take_orders() == [RenewLease("r", SOURCE)]
    assert planner.match("r", 0) == 32
    assert planner.match("r", 10) == 22
    assert planner.match("r", 32) == planner.match("r", 40) == 0
    planner.fetch("r", BLOCKS)
    assert planner.take_orders() == [Fetch("r", SOURCE, BLOCKS, 32, b"digest")]
    assert planner.match("r", 0) == 0, "it is asked again while it is loaded"
    planner.received("r")
    planner.end("r")
    assert planner.take_orders() == []


def test_an_offer_that_is_cached_here_already_is_released(planner):
    planner.renew("r", OFFER)
    planner.release("r")
    assert planner.take_orders()[1:] == [Release("r", SOURCE)]
    planner.end("r")
    assert planner.take_orders() == []


def test_an_offer_of_a_request_that_never_ran_is_released(planner):
    planner.renew("r", OFFER)
    planner.end("r")
    planner.end("r")
    assert planner.take_orders()[1:] == [Release("r", SOURCE)]


def test_a_request_that_ends_while_it_is_loaded_is_cancelled(planner):
    planner.renew("r", OFFER)
    planner.fetch("r", BLOCKS)
    planner.take_orders()
    planner.end("r")
    assert planner.take_orders() == [Cancel("r")]
    planner.received("r")
    planner.end("r")
    assert planner.take_orders() == []


def test_a_request_without_an_offer_is_no_business_of_ours(planner):
    assert planner.match("r", 0) == 0
    planner.fetch("r", BLOCKS)
    planner.release("r")
    planner.received("r")
    planner.end("r")
    assert planner.take_orders() == []


def test_a_promise_is_kept_under_the_lease_id_that_was_promised(planner):
    planner.promise("p")
    planner.promise("p")  # preempted, admitted again
    (promise,) = planner.take_orders()
    assert isinstance(promise, Promise)
    lease_id = planner.grant(GRANTED)
    (grant,) = planner.take_orders()
    assert isinstance(grant, Grant)
    assert grant.terms.lease_id == promise.lease_id == lease_id
    assert grant.terms.ttl_s == 5.0
    planner.withdraw("p")
    assert planner.take_orders() == []


def test_kv_that_was_not_promised_can_be_lent(planner):
    lease_id = planner.grant(GRANTED)
    assert planner.take_orders()[0].terms.lease_id == lease_id


def test_a_promise_that_cannot_be_kept_is_withdrawn_once(planner):
    planner.promise("p")
    (promise,) = planner.take_orders()
    planner.withdraw("p")
    planner.withdraw("p")
    assert planner.take_orders() == [Withdraw(promise.lease_id)]


def test_each_lease_has_an_id_of_its_own(planner):
    assert len({planner.grant(GRANTED) for _ in range(100)}) == 100


def test_the_ranks_are_named_to_every_worker(planner):
    planner.addresses_known((ADDRESS,))
    assert planner.take_orders() == [EngineAddresses((ADDRESS,))]
    assert planner.take_orders() == []


class PlannerMachine(RuleBasedStateMachine):
    """vLLM's calls in any sequence that it makes them in."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.planner = Planner()
        self.state = {}
        self.orders = []

    @rule(target=requests, offered=st.booleans())
    def arrives(self, offered):
        request_id = f"r{len(self.state)}"
        self.state[request_id] = "waiting" if offered else "plain"
        if offered:
            self.planner.renew(request_id, OFFER)
        return multiple(request_id)

    @rule(request_id=requests, local=st.sampled_from([0, 16, 32, 48]))
    def is_admitted(self, request_id, local):
        if self.state[request_id] in ("loading", "gone"):
            return
        tokens = self.planner.match(request_id, local)
        offered = self.state[request_id] == "waiting"
        assert tokens == (max(0, 32 - local) if offered else 0)
        if tokens:
            self.planner.fetch(request_id, BLOCKS)
        else:
            self.planner.release(request_id)
        if offered:
            self.state[request_id] = "loading" if tokens else "running"

    @rule(request_id=requests)
    def is_loaded(self, request_id):
        if self.state[request_id] == "loading":
            self.planner.received(request_id)
            self.state[request_id] = "running"

    @rule(request_id=requests)
    def ends(self, request_id):
        if self.state[request_id] != "gone":
            self.planner.end(request_id)
            self.state[request_id] = "gone"

    def teardown(self):
        for request_id in self.state:
            self.ends(request_id)
        orders = self.planner.take_orders()
        for request_id in self.state:
            kinds = [type(o) for o in orders if getattr(o, "request_id", None) == request_id]
            assert kinds in (
                [],
                [RenewLease, Fetch],
                [RenewLease, Release],
                [RenewLease, Fetch, Cancel],
            ), f"{request_id}: {kinds}"


PlannerMachine.TestCase.settings = settings(max_examples=settings().max_examples // 3)
TestPlanner = pytest.mark.slow(PlannerMachine.TestCase)
