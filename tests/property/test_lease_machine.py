"""LeaseBook against a plain model: whatever happens, blocks are freed once and never too early."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.lease import LeaseBook, LeaseState, Terms
from kvconnect.testing import FakeClock

TTL_S = 10.0
MAX_S = 35.0

picks = st.integers(0, 1 << 16)
readers = st.sampled_from([("engine A", 0), ("engine A", 1), ("engine B", 0)])


class Model:
    """One lease as the contract of `kvconnect.lease` tells it."""

    def __init__(self, request_id, lease_id):
        self.request_id = request_id
        self.lease_id = lease_id
        self.granted_at = None
        self.deadline = None
        self.reading = set()
        self.closed = set()
        self.readers = None
        self.ended = None  # why

    def standing(self, now):
        if self.ended:
            return LeaseState.GONE
        if self.granted_at is None:
            return LeaseState.PROMISED
        return LeaseState.GRANTED if now < self.deadline else LeaseState.GONE


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.clock = FakeClock()
        self.book = LeaseBook(self.clock, MAX_S)
        self.models = []
        self.freed = []

    def pick(self, number):
        return self.models[number % len(self.models)]

    def free(self, model, why):
        assert model.ended is None, f"{model.request_id} was freed twice"
        model.ended = why
        self.freed.append(model.request_id)

    @initialize()
    def nothing_is_known(self):
        assert self.book.find("r1") is None
        assert self.book.next_deadline() is None

    @rule()
    def promise(self):
        model = Model(f"r{len(self.models)}", f"g{len(self.models)}")
        self.models.append(model)
        self.book.promise(model.request_id, model.lease_id)

    @rule()
    def promise_a_request_id_again_that_is_over(self):
        over = [m for m in self.models if m.ended]
        taken = {m.request_id for m in self.models if not m.ended}
        free = [m for m in over if m.request_id not in taken]
        if free:
            model = Model(free[-1].request_id, f"g{len(self.models)}")
            self.models.append(model)
            self.book.promise(model.request_id, model.lease_id)

    @rule(number=picks, promised=st.booleans())
    def grant(self, number, promised):
        waiting = [m for m in self.models if m.granted_at is None and not m.ended]
        if promised and not waiting:
            return
        if promised:
            model = waiting[number % len(waiting)]
        else:
            model = Model(f"r{len(self.models)}", f"g{len(self.models)}")
            self.models.append(model)
        model.granted_at = self.clock()
        model.deadline = self.clock() + TTL_S
        self.book.grant(Terms(model.request_id, model.lease_id, ((1,),), 1, b"d", TTL_S))

    @precondition(lambda self: self.models)
    @rule(number=picks)
    def withdraw(self, number):
        model = self.pick(number)
        self.book.withdraw(model.lease_id)
        if model.granted_at is None and not model.ended:
            model.ended = "withdrawn"

    @precondition(lambda self: self.models)
    @rule(number=picks, reader=readers)
    def open(self, number, reader):
        model = self.pick(number)
        if self.book.standing(model.lease_id) is LeaseState.GRANTED:
            terms = self.book.open(model.lease_id, reader)
            assert terms.request_id == model.request_id
            assert self.book.terms(model.lease_id) == terms
            model.reading.add(reader)

    @precondition(lambda self: self.models)
    @rule(number=picks)
    def renew(self, number):
        model = self.pick(number)
        standing = model.standing(self.clock())
        assert self.book.renew(model.lease_id) is standing
        if standing is LeaseState.GRANTED:
            model.deadline = min(self.clock() + TTL_S, model.granted_at + MAX_S)

    @precondition(lambda self: self.models)
    @rule(number=picks, reader=readers, of=st.integers(1, 3))
    def close(self, number, reader, of):
        model = self.pick(number)
        stands = model.standing(self.clock()) is LeaseState.GRANTED
        stood, freed = self.book.close(model.lease_id, reader, reader[1], of)
        assert stood is stands, "late must be failed, and only late"
        if not stands:
            assert freed is None
            return
        model.readers = model.readers or of
        model.closed.add(reader[1])
        model.reading.discard(reader)
        last = not model.reading and len(model.closed) >= model.readers
        assert freed == (model.request_id if last else None)
        if freed:
            self.free(model, "read")

    @precondition(lambda self: self.models)
    @rule(number=picks)
    def revoke(self, number):
        model = self.pick(number)
        held = not model.ended and model.granted_at is not None
        assert self.book.revoke(model.lease_id) == (model.request_id if held else None)
        if held:
            self.free(model, "revoked")

    @rule(seconds=st.sampled_from([0.0, 0.5, TTL_S / 2, TTL_S - 0.25, TTL_S, MAX_S]))
    def advance(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def expire(self):
        over = [
            m
            for m in self.models
            if not m.ended and m.granted_at is not None and self.clock() >= m.deadline
        ]
        assert sorted(r for _, r in self.book.expire()) == sorted(m.request_id for m in over)
        for model in over:
            self.free(model, "expired")

    @rule()
    def expire_when_told(self):
        """`next_deadline` is never later than the first lease that ends."""
        due = self.book.next_deadline()
        live = [m.deadline for m in self.models if not m.ended and m.granted_at is not None]
        assert due is None or not live or due <= min(live)
        assert (due is not None) or not live

    @invariant()
    def standings_agree(self):
        for model in self.models:
            standing = model.standing(self.clock())
            assert self.book.standing(model.lease_id) is standing
        assert self.book.standing("never heard of") is LeaseState.GONE

    @invariant()
    def requests_are_found_by_id_exactly_while_they_are_promised_or_granted(self):
        live = {m.request_id: m.lease_id for m in self.models if not m.ended}
        for request_id in {m.request_id for m in self.models}:
            assert self.book.find(request_id) == live.get(request_id)
            assert self.book.is_over(request_id) == (request_id not in live)

    @invariant()
    def nothing_is_kept_of_what_is_over(self):
        live = [m for m in self.models if not m.ended and m.granted_at is not None]
        assert len(self.book) == len(live)

    def teardown(self):
        self.clock.advance(2 * MAX_S)
        self.expire()
        granted = [m for m in self.models if m.granted_at is not None]
        assert len(self.freed) == len(granted), "each granted lease is freed exactly once"
        assert len(self.book) == 0
        assert self.book.next_deadline() is None


TestLeases = pytest.mark.slow(LeaseMachine.TestCase)
