"""Where prompts belong: what engines hold of them, and which are too short for a prefill engine."""

import json
from typing import Any

import pytest
from test_proxy_app import (
    ANSWER,
    CHAT,
    DONE,
    TEXT,
    TOKENS,
    Engine,
    answers,
    prefills,
    rig,
    run,
    streams,
)

from kvconnect.errors import ConfigError
from kvconnect.proxy.config import make_config
from kvconnect.proxy.engines.balance import in_order
from kvconnect.proxy.policy import read_body
from kvconnect.proxy.prompts import holdings, short
from kvconnect.proxy.prompts.holdings import HELD_S, Holdings
from kvconnect.proxy.prompts.short import ENOUGH, LATELY_S, ShortPrompts
from kvconnect.proxy.prompts.text import STEP_BYTES, PromptText, prompt_text
from kvconnect.testing import FakeClock

SYSTEM = {"role": "system", "content": "be kind"}
TURN = [SYSTEM, {"role": "user", "content": "x" * 3000}]
ANSWERED = {"role": "assistant", "content": "y" * 400}
NEXT = [*TURN, ANSWERED, {"role": "user", "content": "why?"}]


def text(**body: Any) -> PromptText:
    return prompt_text(read_body(json.dumps(body).encode()))


def size(*pieces: Any) -> int:
    return sum(len(json.dumps(piece)) for piece in pieces)


# --- what two prompts have in common -----------------------------------------------------------


def shared(one: PromptText, other: PromptText) -> int:
    """Bytes of the longest beginning that both have."""
    known = {beginning.digest for beginning in one.beginnings}
    return max((b.nbytes for b in other.beginnings if b.digest in known), default=0)


def test_a_turn_begins_with_all_of_the_one_before():
    assert shared(text(messages=TURN), text(messages=NEXT)) == size(*TURN)


def test_texts_share_whole_steps():
    one, other = (text(prompt="a" * 5000 + end) for end in ("b", "c" * 300))
    assert shared(one, other) == 4 * STEP_BYTES
    assert shared(one, text(prompt="a" * 5000 + "b")) == 5003


def test_chats_with_one_document_share_it():
    one, other = (
        text(messages=[{"role": "user", "content": "d" * 9000 + question}]) for question in "?!"
    )
    assert shared(one, other) == 8 * STEP_BYTES


@pytest.mark.parametrize(
    "other",
    [{"model": "n"}, {"cache_salt": "s"}, {"tools": [{"a": 1}]}, {"chat_template": "t"}],
)
def test_what_else_a_prompt_depends_on_makes_it_another(other: dict[str, Any]):
    assert shared(text(messages=TURN), text(messages=TURN)) == size(*TURN)
    assert not shared(text(messages=TURN), text(messages=TURN, **other))


@pytest.mark.parametrize("odd", [{}, {"messages": 3}, {"messages": "no list"}, {"messages": []}])
def test_what_is_no_prompt_has_no_beginning_that_matters(odd: dict[str, Any]):
    assert sum(beginning.nbytes for beginning in text(**odd).beginnings) < 16


def test_a_long_prompt_has_so_many_beginnings_and_no_more():
    assert len(text(prompt="z" * 5 * 2**20).beginnings) == 1025


# --- what engines hold -------------------------------------------------------------------------


def test_an_engine_holds_what_it_was_sent_and_what_it_answered():
    held = Holdings(FakeClock())
    held.holds("p", text(messages=TURN), answered=False)
    held.holds("d", text(messages=TURN), answered=True)
    assert held.tokens("p", text(messages=NEXT)) == size(*TURN) // 4
    assert held.tokens("d", text(messages=NEXT)) == size(*TURN, ANSWERED) // 4
    assert held.tokens("d", text(messages=NEXT[1:])) == held.tokens("e", text(messages=NEXT)) == 0


def test_what_engines_hold_grows_old_and_goes_with_them():
    clock = FakeClock()
    held = Holdings(clock)
    held.holds("d", text(messages=TURN), answered=True)
    clock.advance(HELD_S)
    assert held.tokens("d", text(messages=NEXT)) == 0
    held.holds("d", text(messages=TURN), answered=True)
    held.keep_only(["e"])
    assert held.tokens("d", text(messages=NEXT)) == 0


def test_so_many_beginnings_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holdings, "REMEMBERED", 10)
    held = Holdings(FakeClock())
    held.holds("d", text(prompt="first"), answered=False)
    for number in range(5):
        held.holds("d", text(prompt=f"{number}" * 1500), answered=False)
    assert held.tokens("d", text(prompt="first")) == 0
    assert held.tokens("d", text(prompt="0" * 1500)) > 0


# --- which prompts are too short ---------------------------------------------------------------


def measured(clock: FakeClock, **seconds: Any) -> ShortPrompts:
    """What ``seconds`` by tokens tell: of prefill, hand-overs, and decode alone."""
    shorts = ShortPrompts("auto", clock)
    for tokens in (100, 4000) * ENOUGH:
        shorts.prefilled("p", tokens, seconds["prefill"](tokens))
        shorts.began(tokens, seconds["handover"](tokens), handed_over=True)
        if "alone" in seconds:
            shorts.began(tokens, seconds["alone"](tokens), handed_over=False)
    return shorts


def test_a_number_is_that_number():
    assert ShortPrompts(70, FakeClock()).min_tokens() == 70
    assert not ShortPrompts(0, FakeClock()).wanted


def test_as_many_tokens_as_a_hand_over_takes_are_short():
    handover = lambda n: 0.050 + n * 1e-6  # noqa: E731
    shorts = measured(FakeClock(), prefill=lambda n: 0.010 + n * 101e-6, handover=handover)
    assert shorts.min_tokens() == pytest.approx(400, rel=0.01)
    fast = measured(
        FakeClock(),
        prefill=lambda n: 0.010 + n * 101e-6,
        handover=handover,
        alone=lambda n: 0.010 + n * 41e-6,
    )
    assert fast.min_tokens() == pytest.approx(1000, rel=0.01)


def test_no_prompt_is_short_before_it_was_measured_or_long_after():
    clock = FakeClock()
    assert ShortPrompts("auto", clock).min_tokens() == 0
    shorts = measured(clock, prefill=lambda n: n * 1e-4, handover=lambda n: 0.05)
    assert shorts.min_tokens() == pytest.approx(500, rel=0.01)
    clock.advance(LATELY_S)
    assert shorts.min_tokens() == 0
    few = ShortPrompts("auto", clock)
    for _ in range(ENOUGH - 1):
        few.began(100, 9.0, handed_over=True)
        few.prefilled("p", 100, 0.001)
    few.prefilled("p", 100, 0.001)
    assert few.min_tokens() == 0


def test_nothing_is_said_of_longer_hand_overs_than_were_seen():
    shorts = measured(FakeClock(), prefill=lambda n: 0.001, handover=lambda n: 0.1)
    assert shorts.min_tokens() == 4000


def test_a_decode_engine_that_answers_slower_than_it_is_handed_over_gets_no_prompt_alone():
    shorts = measured(FakeClock(), prefill=lambda n: 0.2 + n * 1e-4, handover=lambda n: 0.1)
    assert shorts.min_tokens() == 0


def test_the_slowest_prefill_engine_stands_for_decode_until_that_was_seen():
    shorts = measured(FakeClock(), prefill=lambda n: n * 1e-4, handover=lambda n: 0.05)
    for _ in range(ENOUGH):
        shorts.prefilled("slow", 1000, 0.5)
    assert shorts.min_tokens() == pytest.approx(100, rel=0.01)
    shorts.keep_only(["p"])
    assert shorts.min_tokens() == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("wrong", [-1, "some", 1.5, True])
def test_a_number_of_tokens_that_cannot_be_is_refused(wrong: Any):
    with pytest.raises(ConfigError, match="is no number of tokens"):
        make_config(prefill=["http://p"], decode=["http://d"], min_prefill_tokens=wrong)


# --- through the proxy -------------------------------------------------------------------------


def test_a_turn_that_decode_holds_stays_there():
    """Prefill used to compute the whole chat once more, and decode to read all of it."""

    async def scenario() -> None:
        p, d, other = Engine(prefills), Engine(answers), Engine(answers)
        async with rig([p], [d, other], min_prefill_tokens=200) as r:
            assert await r.ask(CHAT, messages=TURN) == (200, ANSWER)
            assert await r.ask(CHAT, messages=NEXT) == (200, ANSWER)
            assert len(p.bodies) == 1
            holder = d if len(d.bodies) == 2 else other
            assert "kv_transfer_params" not in holder.bodies[1] and len(holder.bodies) == 2
            longer = [*NEXT, ANSWERED, {"role": "user", "content": "z" * 1000}]
            assert await r.ask(CHAT, messages=longer) == (200, ANSWER)
            assert len(p.bodies) == 2, "250 tokens of it are new"
            assert (await r.counters())["short"] == 1

    run(scenario())


def test_a_holder_that_was_removed_holds_nothing_when_it_comes_back():
    async def scenario() -> None:
        p, d, other = Engine(prefills), Engine(answers), Engine(answers)
        async with rig([p], [d, other], min_prefill_tokens=200, admin_key="k") as r:
            await r.ask(CHAT, messages=TURN)
            holder = d if d.bodies else other
            gone = {"role": "decode", "url": holder.url}
            admin = {"Authorization": "Bearer k"}
            async with r.session.delete("/admin/engines", params=gone, headers=admin) as removed:
                assert removed.status == 200
            await r.ask(CHAT, messages=[{"role": "user", "content": "w" * 1000}])
            async with r.session.post("/admin/engines", json=gone, headers=admin) as added:
                assert added.status == 200
            await r.ask(CHAT, messages=NEXT)
            assert len(p.bodies) == 3

    run(scenario())


def test_kv_aware_asks_who_holds_the_prompt():
    async def scenario() -> None:
        p, q = Engine(prefills), Engine(prefills)
        d, e = Engine(answers), Engine(answers)
        async with rig([p, q], [d, e], policy="kv-aware") as r:
            chats = [[{"role": "user", "content": f"{n}" * 2000}] for n in range(6)]
            for messages in chats:
                await r.ask(CHAT, messages=messages)
            first = [[b["messages"][0]["content"][0] for b in x.bodies] for x in (p, q, d, e)]
            assert all(len(found) == 3 for found in first), "by turns, as nobody is busy"
            for messages in reversed(chats):
                follow = [*messages, ANSWERED, {"role": "user", "content": "and?"}]
                await r.ask(CHAT, messages=follow)
            again = [[b["messages"][0]["content"][0] for b in x.bodies[3:]] for x in (p, q, d, e)]
            assert [sorted(found) for found in again] == [sorted(found) for found in first]

    run(scenario())


def test_what_an_engine_holds_is_worth_as_much_load():
    class Loaded:
        def __init__(self, url: str, tokens: int) -> None:
            self.url, self.tokens = url, tokens

    for busy, asked in ((900, "a"), (1100, "b")):
        engines = [Loaded("a", busy), Loaded("b", 0)]
        assert in_order(engines, "kv-aware", 0, None, {"a": 1000})[0].url == asked
        assert in_order(engines, "least-loaded", 0, None)[0].url == "b"


def test_measured_rates_keep_short_prompts_at_decode(monkeypatch: pytest.MonkeyPatch):
    """Real HTTP and a clock that engines turn: prefill takes 1 ms a token, a hand-over 50 ms."""
    monkeypatch.setattr(short, "ENOUGH", 4)

    async def scenario() -> None:
        async def computes(engine: Engine, request: Any) -> Any:
            r.clock.advance(len(engine.bodies[-1]["prompt"]) / 4 * 0.001)
            return await prefills(engine, request)

        async def takes_over(engine: Engine, request: Any) -> Any:
            r.clock.advance(0.050)
            return await streams(*TOKENS, DONE)(engine, request)

        p, d = Engine(computes), Engine(takes_over)
        async with rig([p], [d], min_prefill_tokens="auto") as r:
            for number in range(8):
                await r.ask(TEXT, prompt=f"{number}" * (2000 + 400 * number), stream=True)
            assert len(p.bodies) == 8, "nothing was measured, or all of them were long"
            await r.ask(TEXT, prompt="s" * 100, stream=True)
            assert len(p.bodies) == 8
            await r.ask(TEXT, prompt="l" * 400, stream=True)
            assert len(p.bodies) == 9

    run(scenario())
