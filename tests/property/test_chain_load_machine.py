"""ChainLoader loads on several ranks, each with faults of its own, over the scheduler's real tier.

The scheduler's side is `OffloadTier`; a rank is a `ChainLoader` whose carriers answer when and how
hypothesis says. Held all the time: a block is filled by one source at a time, a peer has one
fetch of a load, bytes that count are right, pins and leases are returned, all is reported once.
"""

import enum
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvconnect.chain.load import CancelLoad, ChainedLoad, ChainLoader, LoadUnit
from kvconnect.offload.cache import CacheTier
from kvconnect.offload.eviction import make
from kvconnect.offload.jobs import Fill
from kvconnect.offload.tiers import KeyedChunk, OffloadTier
from kvconnect.orders import Cancel, Fetch, Offer, Release, Source

RANKS, CHUNK, MOST = 2, 4, 5
PEERS = ("one", "two")
KEYS = [bytes([n]) * 4 for n in range(MOST)]


class How(enum.Enum):
    """An answer to a fill."""

    FAILED = "failed"
    UNUSED = "unused"
    WELL = "well"


class Rank:
    """Carries nothing: notes what it was asked, for the machine to answer."""

    def __init__(self):
        self.now = 0.0
        self.chained = ChainLoader(self, PEERS, [1 << 20, 1 << 19], clock=lambda: self.now)
        self.fetches: dict[str, tuple[str, Fetch]] = {}
        self.cancelled: set[str] = set()
        self.fills: dict[int, Fill] = {}
        self.declined: list[int] = []
        self.aborted: set[str] = set()
        self.loads: dict[int, str] = {}  # number of a fill → load
        self.released: Counter = Counter()
        self.firsts: dict[str, set[int]] = {}  # load → first blocks of its groups
        self.filled: dict[str, set[int]] = {}  # load → blocks that hold the right bytes
        self.ended: dict[str, frozenset[int]] = {}

    def ask(self, peer, order):
        match order:
            case Fetch():
                busy = [name for name, (p, f) in self.fetches.items() if p == peer]
                load = order.request_id.split("#")[0]
                assert not any(name.split("#")[0] == load for name in busy), "two fetches at once"
                assert not self.released[peer, load], "a fetch after its lease was released"
                assert any(order.blocks), "a fetch of nothing"
                assert load not in self.aborted, "a fetch for nobody"
                self.fetches[order.request_id] = peer, order
            case Cancel():
                self.cancelled.add(order.request_id)
            case Release():
                self.released[peer, order.request_id] += 1

    def fill(self, fills):
        for fill in fills:
            assert fill.number not in self.fills
            assert self.loads[fill.number] not in self.aborted, "a fill for nobody"
            self.fills[fill.number] = fill

    def decline(self, fills):
        self.declined += [fill.number for fill in fills]

    def touched(self):
        """Blocks that some source may be writing now."""
        found = [b for _, f in self.fetches.values() for group in f.blocks for _, b in group]
        return found + [b for fill in self.fills.values() for b in fill.blocks if b >= 0]

    def take(self):
        for ended in self.chained.take():
            assert ended.request_id not in self.ended, "reported twice"
            self.ended[ended.request_id] = ended.lost
            first = self.firsts[ended.request_id]
            assert ended.from_start == bool(first & ended.lost)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tier = OffloadTier(
            CacheTier("host", make("lru", 3)), CacheTier("disk", make("lru", 4)), ranks=RANKS
        )
        self.ranks = [Rank() for _ in range(RANKS)]
        self.loads: dict[str, ChainedLoad] = {}
        self.aborted: set[str] = set()
        self.answers: dict[int, list[How]] = {}
        self.settled: set[int] = set()
        self.count = 0
        self.next_block = 0

    def carry_out(self, result):
        for job in result.jobs:
            if not isinstance(job, Fill) and hasattr(job, "number"):
                self.carry_out(self.tier.answered(job.number, True))

    def answer(self, number, how):
        """Of one rank; once all have answered, the tier hears of it."""
        given = self.answers[number]
        assert number not in self.settled, "answered more often than there are ranks"
        given.append(how)
        if len(given) == RANKS:
            self.settled.add(number)
            if How.FAILED not in given and How.UNUSED in given:
                self.carry_out(self.tier.declined(number))
            else:
                self.carry_out(self.tier.answered(number, How.FAILED not in given))

    @rule(key=st.sampled_from(KEYS))
    def store(self, key):
        self.carry_out(self.tier.store([KeyedChunk(key, 0, (0,))]))

    @rule(
        chunks=st.integers(1, MOST),
        offered=st.dictionaries(st.sampled_from(PEERS), st.integers(0, MOST * CHUNK)),
        groups=st.integers(1, 2),
    )
    def begin(self, chunks, offered, groups):
        self.count += 1
        name = f"load {self.count}"
        here = [n for n in range(chunks) if self.tier.has(KEYS[n])]
        blocks = {}
        for n in range(chunks):
            for group in range(groups):
                blocks[n, group] = (self.next_block, self.next_block + 1)
                self.next_block += 2
        stores = {n: self.tier.source_of(KEYS[n]) for n in here}
        result = self.tier.load(name, [KeyedChunk(KEYS[n], 0, blocks[n, 0]) for n in here])
        fills = {job.key: job for job in result.jobs if isinstance(job, Fill)}
        self.answers |= {fill.number: [] for fill in fills.values()}
        self.carry_out(result)
        units = tuple(
            LoadUnit(
                group,
                tuple(enumerate(blocks[n, group], 2 * n)),
                (n + 1) * CHUNK,
                0 if group else CHUNK,
                None if group else fills.get(KEYS[n]),
                stores.get(n, ""),
            )
            for n in range(chunks)
            for group in range(groups)
        )
        offers = tuple(
            (peer, Offer(Source((), peer, None, 1.0), tokens, b""))
            for peer, tokens in offered.items()
        )
        self.loads[name] = load = ChainedLoad(name, units, offers)
        for rank in self.ranks:
            rank.filled[name] = set()
            rank.loads |= {fill.number: name for fill in fills.values()}
            rank.firsts[name] = {blocks[0, group][0] for group in range(groups)}
            rank.chained.load(load)

    @precondition(lambda self: any(rank.fetches for rank in self.ranks))
    @rule(data=st.data(), well=st.booleans(), took=st.floats(0.001, 2.0))
    def a_fetch_ends(self, data, well, took):
        rank = data.draw(st.sampled_from([r for r in self.ranks if r.fetches]))
        name = data.draw(st.sampled_from(sorted(rank.fetches)))
        _, fetch = rank.fetches.pop(name)
        cancelled = name in rank.cancelled
        rank.now += took
        if well and not cancelled:
            blocks = {b for group in fetch.blocks for _, b in group}
            rank.filled[name.split("#")[0]] |= blocks
        error = None if well or cancelled else "broken"
        assert rank.chained.fetched(name, error, rank.now)
        assert not rank.chained.fetched(name, error, rank.now)

    @precondition(lambda self: any(rank.fills for rank in self.ranks))
    @rule(data=st.data(), well=st.booleans(), took=st.floats(0.001, 2.0))
    def a_fill_ends(self, data, well, took):
        rank = data.draw(st.sampled_from([r for r in self.ranks if r.fills]))
        fill = rank.fills.pop(data.draw(st.sampled_from(sorted(rank.fills))))
        rank.now += took
        if well:
            owner = next(n for n, load in self.loads.items() if fill in (p.fill for p in load[1]))
            rank.filled[owner] |= set(fill.blocks)
        assert rank.chained.filled(fill.number, "" if well else "broken", rank.now)
        self.answer(fill.number, How.WELL if well else How.FAILED)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.loads)))
        self.aborted.add(name)
        for rank in self.ranks:
            rank.chained.cancel(CancelLoad(name))
            rank.aborted.add(name)

    @invariant()
    def what_ended_is_reported_once_and_holds_what_it_says(self):
        for rank in self.ranks:
            rank.take()
            for number in rank.declined:
                self.answer(number, How.UNUSED)
            rank.declined.clear()
            for name, lost in rank.ended.items():
                load = self.loads[name]
                wanted = {b for unit in load.units for _, b in unit.blocks}
                assert lost <= wanted
                if name not in self.aborted:
                    assert wanted - lost <= rank.filled[name], "empty blocks are said to hold KV"
                    could = {
                        b
                        for unit in load.units
                        if unit.fill or any(unit.end_token <= o.tokens for _, o in load.offers)
                        for _, b in unit.blocks
                    }
                    assert wanted - could <= lost
                assert all(rank.released[peer, name] == 1 for peer, _ in load.offers)
                assert not any(f.split("#")[0] == name for f in rank.fetches)

    @invariant()
    def a_block_is_written_by_one_source_at_a_time(self):
        for rank in self.ranks:
            touched = rank.touched()
            assert len(touched) == len(set(touched))

    def teardown(self):
        for rank in self.ranks:
            while rank.fetches or rank.fills:
                for name in list(rank.fetches):
                    del rank.fetches[name]
                    rank.chained.fetched(name, "the end", rank.now)
                for number in list(rank.fills):
                    del rank.fills[number]
                    rank.chained.filled(number, "the end", rank.now)
                    self.answer(number, How.FAILED)
        self.what_ended_is_reported_once_and_holds_what_it_says()
        for rank in self.ranks:
            assert rank.ended.keys() == self.loads.keys(), "a load never ended"
        assert self.settled == self.answers.keys(), "a fill was not answered by every rank"
        assert not self.tier.busy
        held = [key for key in KEYS if self.tier.host.holds(key)]
        self.tier.clear()
        assert not any(self.tier.has(key) for key in held), "a pin was not returned"


Machine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestChained = Machine.TestCase
