"""Eviction policies against plain models: the same key goes, and never a pinned one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvconnect.offload.eviction import Lru
from kvconnect.offload.eviction.arc import Arc

picks = st.integers(0, 1 << 16)


class Model:
    """Queues as lists of keys, oldest first; what is pinned is in none of them."""

    queues = ("queue",)

    def __init__(self, capacity):
        self.capacity = capacity
        self.lists = {name: [] for name in self.queues}
        self.pinned = {}  # key → name of its queue

    def resident(self):
        return [k for keys in self.lists.values() for k in keys] + list(self.pinned)

    def where(self, key):
        return next(name for name in self.queues if key in self.lists[name])

    def pin(self, key):
        name = self.where(key)
        self.lists[name].remove(key)
        self.pinned[key] = name

    def unpin(self, key):
        self.lists[self.pinned.pop(key)].append(key)

    def remove(self, key):
        if key in self.pinned:
            del self.pinned[key]
        else:
            self.lists[self.where(key)].remove(key)

    def size(self, name):
        """Of a queue with those that are pinned out of it."""
        return len(self.lists[name]) + list(self.pinned.values()).count(name)

    def insert(self, key):
        evicted = None
        if len(self.resident()) == self.capacity:
            if len(self.pinned) == self.capacity:
                return False, None
            evicted = self.evict(key)
        self.enter(key)
        return True, evicted


class LruModel(Model):
    def touch(self, key):
        if key not in self.pinned:
            self.lists["queue"].remove(key)
            self.lists["queue"].append(key)

    def evict(self, key):
        return self.lists["queue"].pop(0)

    def enter(self, key):
        self.lists["queue"].append(key)


class ArcModel(Model):
    queues = ("T1", "T2")

    def __init__(self, capacity):
        super().__init__(capacity)
        self.b1, self.b2, self.p = [], [], 0.0

    def touch(self, key):
        if key in self.pinned:
            self.pinned[key] = "T2"
        else:
            self.remove(key)
            self.lists["T2"].append(key)

    def insert(self, key):
        full = len(self.resident()) == self.capacity
        if full and len(self.pinned) == self.capacity:
            return False, None
        in_b1, in_b2 = key in self.b1, key in self.b2
        if in_b1:
            self.p = min(self.p + max(1.0, len(self.b2) / len(self.b1)), self.capacity)
            self.b1.remove(key)
        if in_b2:
            self.p = max(self.p - max(1.0, len(self.b1) / len(self.b2)), 0.0)
            self.b2.remove(key)
        evicted = self.replace(in_b2) if full else None
        if in_b1 or in_b2:
            self.lists["T2"].append(key)
            return True, evicted
        while self.b1 and self.size("T1") + len(self.b1) >= self.capacity:
            self.b1.pop(0)
        while self.b2 and len(self.resident() + self.b1 + self.b2) >= 2 * self.capacity:
            self.b2.pop(0)
        self.lists["T1"].append(key)
        return True, evicted

    def replace(self, in_b2):
        t1 = self.size("T1")
        wanted = "T1" if t1 > self.p or (in_b2 and t1 == self.p) else "T2"
        if not self.lists[wanted]:  # all pinned, or empty
            wanted = "T2" if wanted == "T1" else "T1"
        victim = self.lists[wanted].pop(0)
        (self.b1 if wanted == "T1" else self.b2).append(victim)
        return victim


class PolicyMachine(RuleBasedStateMachine):
    """Keys are few, so that ghosts come back."""

    policy_type, model_type = Lru, LruModel

    @initialize(capacity=st.integers(1, 25), spare=st.integers(1, 30))
    def start(self, capacity, spare):
        self.policy = self.policy_type(capacity)
        self.model = self.model_type(capacity)
        self.keys = [bytes([n]) for n in range(capacity + spare)]

    def evictable(self):
        return [k for k in self.model.resident() if k not in self.model.pinned]

    @rule(number=picks)
    def use(self, number):
        key = self.keys[number % len(self.keys)]
        if key in self.model.resident():
            self.policy.touch(key)
            self.model.touch(key)
            return
        pinned = set(self.model.pinned)
        insertion = self.policy.insert(key)
        assert tuple(insertion) == self.model.insert(key)
        assert insertion.evicted not in pinned

    @rule(numbers=st.lists(picks, max_size=40))
    def use_many(self, numbers):
        for number in numbers:
            self.use(number)

    @precondition(lambda self: self.evictable())
    @rule(number=picks)
    def pin(self, number):
        key = self.evictable()[number % len(self.evictable())]
        self.policy.pin(key)
        self.model.pin(key)

    @precondition(lambda self: self.model.pinned)
    @rule(number=picks)
    def unpin(self, number):
        key = list(self.model.pinned)[number % len(self.model.pinned)]
        self.policy.unpin(key)
        self.model.unpin(key)

    @precondition(lambda self: self.model.resident())
    @rule(number=picks)
    def remove(self, number):
        key = self.model.resident()[number % len(self.model.resident())]
        self.policy.remove(key)
        self.model.remove(key)

    @invariant()
    def the_same_is_resident(self):
        if not hasattr(self, "model"):
            return
        assert len(self.policy) == len(self.model.resident()) <= self.model.capacity
        for key in self.keys:
            assert (key in self.policy) == (key in self.model.resident())
        assert all(key in self.policy for key in self.model.pinned)


def machine(policy, model):
    name = f"{policy.__name__}Machine"
    case = type(name, (PolicyMachine,), {"policy_type": policy, "model_type": model}).TestCase
    half = max(20, settings.default.max_examples // 3)
    case.settings = settings(max_examples=half, stateful_step_count=40)
    return pytest.mark.slow(case)


TestLru = machine(Lru, LruModel)
TestArc = machine(Arc, ArcModel)
