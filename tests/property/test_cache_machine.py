"""CacheTier, with every policy: nothing that is needed leaves, and everybody who leaves is named.

The model is what ranks have been told: who was stored and not told to forget.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.offload.cache import CacheTier, KeyState
from kvconnect.offload.eviction import POLICIES, Lru, make

picks = st.integers(0, 1 << 16)
KEYS = [bytes([n]) * 4 for n in range(14)]
some_keys = st.lists(st.sampled_from(KEYS), max_size=6)


class CacheMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(capacity=st.integers(1, 8), threshold=st.integers(1, 3))
    def start(self, capacity, threshold):
        self.capacity, self.threshold = capacity, threshold
        self.tier = CacheTier("host", make(self.policy, capacity), threshold)
        self.held, self.filling = set(), set()
        self.cleared = set()  # and FILLING
        self.pins = []  # (keys, pins)
        self.offers = {}
        self.events = set()

    def pinned(self):
        return {key for keys, _ in self.pins for key in keys}

    def leave(self, left):
        assert len(set(left)) == len(left)
        for key in left:
            assert key in self.held | self.filling
            self.held.discard(key)
            self.filling.discard(key)
            self.cleared.discard(key)

    def admitted(self, admission, wanted):
        """``wanted``: absent keys that it should have tried to admit, in order."""
        assert not set(admission.evicted) & (self.pinned() | self.filling)
        self.leave(admission.evicted)
        self.filling |= set(admission.admitted)
        assert [k for k in wanted if k in admission.admitted] == admission.admitted
        if len(admission.admitted) < len(wanted):
            assert self.filling | self.pinned() >= self.filling | self.held
            assert self.tier.size == self.capacity, "it was skipped although there was room"

    @rule(keys=some_keys)
    def offer(self, keys):
        absent = [k for k in dict.fromkeys(keys) if k not in self.held | self.filling]
        worth = []
        for key in absent:
            self.offers[key] = self.offers.get(key, 0) + 1
            if self.offers[key] >= self.threshold:
                worth.append(key)
                self.offers[key] = 0
        admission = self.tier.offer(keys)
        self.admitted(admission, worth)

    @rule(keys=some_keys)
    def admit(self, keys):
        wanted = [k for k in dict.fromkeys(keys) if k not in self.held | self.filling]
        admission = self.tier.admit(keys)
        for key in admission.admitted:
            self.offers[key] = 0
        self.admitted(admission, wanted)

    @precondition(lambda self: self.filling)
    @rule(number=picks, stored=st.booleans())
    def settle(self, number, stored):
        key = sorted(self.filling)[number % len(self.filling)]
        left = self.tier.settle(key, stored)
        if stored and key not in self.cleared:
            assert left == []
            self.filling.remove(key)
            self.held.add(key)
        else:
            assert left == [key]
            self.leave(left)

    @precondition(lambda self: self.held)
    @rule(numbers=st.lists(picks, min_size=1, max_size=4))
    def pin(self, numbers):
        keys = list(dict.fromkeys(sorted(self.held)[n % len(self.held)] for n in numbers))
        self.pins.append((keys, self.tier.pin(keys)))

    @precondition(lambda self: self.pins)
    @rule(number=picks)
    def unpin(self, number):
        _, pins = self.pins.pop(number % len(self.pins))
        self.tier.unpin(pins)

    @rule(keys=some_keys)
    def touch(self, keys):
        self.tier.touch(keys)

    @rule(keys=some_keys)
    def ended(self, keys):
        self.tier.ended(keys)

    @rule(key=st.sampled_from(KEYS))
    def lose(self, key):
        """Pinned ones, too: that a rank lost it is a fact."""
        left = self.tier.lose(key)
        assert left == ([key] if key in self.held else [])
        self.leave(left)
        # who pinned it pinned what is gone: a new one is not kept by that
        self.pins = [([k for k in keys if k != key], pins) for keys, pins in self.pins]

    @rule()
    def clear(self):
        """What is pinned or being stored, too: it is not to be had again."""
        left = self.tier.clear()
        assert set(left) == self.held
        self.leave(left)
        self.cleared |= self.filling
        self.pins = [([], pins) for _, pins in self.pins]

    @invariant()
    def it_knows_what_ranks_have(self):
        if not hasattr(self, "tier"):
            return
        for key in KEYS:
            standing = self.tier.standing(key)
            assert (standing is KeyState.HELD) == (key in self.held) == self.tier.holds(key)
            assert (standing is KeyState.FILLING) == (key in self.filling)
        assert self.tier.size == len(self.held) + len(self.filling) <= self.capacity
        for change in self.tier.take_changes():
            assert (change.key in self.events) != change.held
            (self.events.add if change.held else self.events.discard)(change.key)
        assert self.events == self.held


def case(name):
    machine = type(f"{name}Machine", (CacheMachine,), {"policy": name})
    examples = max(20, settings.default.max_examples // 4)
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40)
    return pytest.mark.slow(machine.TestCase)


assert set(POLICIES) == {"lru", "arc"}
TestLru, TestArc = (case(name) for name in POLICIES)


def held(capacity, keys, **options):
    tier = CacheTier("host", Lru(capacity), **options)
    assert tier.recover(keys) == []
    return tier


def test_what_is_found_at_the_start_goes_in_the_order_in_which_it_was_stored():
    tier = held(3, KEYS[:3])
    assert tier.recover(KEYS[3:5]) == KEYS[:2]
    assert tier.admit([KEYS[9]]).evicted == [KEYS[2]]


def test_of_a_prefix_the_end_goes_first():
    tier = held(4, KEYS[:4])
    tier.touch(KEYS[:3])
    assert tier.admit(KEYS[8:10]).evicted == [KEYS[3], KEYS[2]]
    tier = held(4, KEYS[:4])
    tier.unpin(tier.pin(KEYS[:3]))
    assert tier.admit(KEYS[8:10]).evicted == [KEYS[3], KEYS[2]]


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("first", ["the request ends", "the stores end"])
def test_of_a_request_that_ended_the_end_goes_first_whatever_ended_when(policy, first):
    """The first chunk, without which the others are of no use, used to be the first to go."""
    tier = CacheTier("host", make(policy, 4))
    tier.admit(KEYS[:4])
    if first == "the request ends":
        tier.ended(KEYS[:4])
    for key in (KEYS[2], KEYS[0], KEYS[3], KEYS[1]):
        tier.settle(key, True)
    if first == "the stores end":
        tier.ended(KEYS[:4])
    assert tier.admit(KEYS[8:10]).evicted == [KEYS[3], KEYS[2]]


def test_an_end_waits_for_what_is_pinned_lost_or_not_stored():
    tier = held(4, KEYS[:3])
    tier.admit(KEYS[3:4])
    pins = tier.pin(KEYS[:2])
    tier.ended(KEYS[:4])
    tier.lose(KEYS[0])
    tier.unpin(pins)
    tier.touch(KEYS[2:3])
    tier.settle(KEYS[3], False)
    assert tier.admit(KEYS[8:11]).evicted == [KEYS[2]], "1 and then 2 are the prefix"


def test_an_end_is_no_use():
    """A scan that is stored and never asked for again does not count as wanted twice."""
    tier = CacheTier("host", make("arc", 4))
    for key in KEYS[:2]:
        tier.recover([key])
    tier.touch(KEYS[:2])
    tier.recover(KEYS[2:4])
    tier.ended(KEYS[2:4])
    assert tier.admit(KEYS[8:10]).evicted == [KEYS[3], KEYS[2]]


def test_a_pin_of_what_was_lost_does_not_hold_what_came_back():
    tier = held(1, KEYS[:1])
    old = tier.pin(KEYS[:1])
    assert tier.lose(KEYS[0]) == KEYS[:1]
    tier.recover(KEYS[:1])
    new = tier.pin(KEYS[:1])
    tier.unpin(old)
    assert tier.admit(KEYS[1:2]) == ([], [])
    assert tier.counts["keys_skipped_all_pinned"] == 1
    tier.unpin(new)
    assert tier.admit(KEYS[1:2]) == (KEYS[1:2], KEYS[:1])


def test_a_key_is_stored_when_it_was_offered_often_enough():
    tier = CacheTier("host", Lru(4), threshold=3)
    assert [tier.offer(KEYS[:1]).admitted for _ in range(3)] == [[], [], KEYS[:1]]
    assert tier.counts["keys_below_threshold"] == 2
    assert tier.admit(KEYS[1:2]).admitted == KEYS[1:2], "a promotion has been asked for"
