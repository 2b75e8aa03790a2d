"""KV events: what engines publish over real ZMQ, and what the proxy makes of it."""

import asyncio
import contextlib
import json
from array import array
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from test_proxy_app import CHAT, Engine, Rig, answers, rig, run, says
from test_proxy_placement import NEXT, TURN, text

from kvconnect.errors import ConfigError
from kvconnect.proxy.config import make_config
from kvconnect.proxy.policy import prompt_ids
from kvconnect.proxy.prompts import kv_events, kv_subscriber, tokens
from kvconnect.proxy.prompts.holdings import Holdings
from kvconnect.proxy.prompts.kv_events import RankBlocks
from kvconnect.proxy.prompts.kv_subscriber import endpoints
from kvconnect.proxy.prompts.tokens import PromptTokens
from kvconnect.testing import FakeClock

SIZE = 16
IDS = list(range(100, 100 + 5 * SIZE))
FIRST_TURN = text(messages=TURN).beginnings[-1].nbytes // 4
"""Its tokens, as they are guessed."""


def stored(ids: list[int], first: int = 0, parent: int | None = None, **more: Any) -> dict:
    """Blocks of these tokens, numbered from ``first``, as vLLM 0.32 has it."""
    hashes = list(range(first, first + len(ids) // SIZE))
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent}
    event |= {"token_ids": ids, "block_size": SIZE, "lora_id": None, "medium": "GPU"}
    return event | {"lora_name": None} | more


def removed(*hashes: int, **more: Any) -> dict:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"} | more


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), 0])


def told(*batches: bytes) -> RankBlocks:
    rank = RankBlocks()
    for number, payload in enumerate(batches, 7):
        rank.hear(number, payload)
    return rank


def held(rank: RankBlocks, ids: list[int] = IDS, model: str | None = None) -> int:
    return rank.held(array("I", ids), model)


# --- what is told ------------------------------------------------------------------------------


def test_blocks_are_held_from_the_first_to_one_that_is_missing():
    rank = told(batch(stored(IDS[:48])), batch(stored(IDS[48:], first=3, parent=2)))
    assert held(rank) == 80
    assert held(rank, [*IDS[:40], 1, *IDS[41:]]) == 32
    rank.hear(9, batch(removed(1)))
    assert held(rank) == 16
    rank.hear(10, batch(CLEARED))
    assert held(rank) == 0


def test_events_of_older_versions_are_arrays():
    old = ["BlockStored", [b"a", b"b"], None, IDS[:32], SIZE, None, "GPU", None, None, 0]
    rank = told(batch(old, ["BlockRemoved", [b"b"], "GPU", 0], ["SomethingElse", 3]))
    assert held(rank) == 16
    rank.hear(8, batch(["AllBlocksCleared"]))
    assert held(rank) == 0


def test_fields_and_events_of_later_versions_are_passed_over():
    rank = told(batch({"type": "BlockMoved", "x": 1}, stored(IDS, locality="LOCAL", newer=[1])))
    assert held(rank) == 80


def test_a_lost_batch_clears_what_was_known():
    rank = told(batch(stored(IDS)))
    rank.hear(9, batch(stored(IDS[:16], first=50)))
    assert held(rank) == 16
    rank.clear()
    assert not rank.tells


@pytest.mark.parametrize(
    "odd",
    [
        {"token_ids": IDS[:-1]},
        {"block_size": 0},
        {"block_hashes": "x"},
        {"token_ids": [-1] * 80},
        {"token_ids": [2**32] * 80},
        {"parent_block_hash": 99},
        {"extra_keys": [["salt"], None, None, None, None]},
        {"kv_cache_spec_kind": "sliding_window"},
    ],
)
def test_blocks_that_are_not_the_prompts_tokens_alone_are_not_held(odd: dict[str, Any]):
    assert held(told(batch(stored(IDS) | odd))) == 0
    assert held(told(batch(stored(IDS) | odd, stored(IDS)))) == 80, "nor do they end what follows"


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x91" * 5000, batch(3), b"\x93\x01\x02\x03"])
def test_a_batch_that_cannot_be_read_leaves_nothing_that_it_may_have_removed(junk: bytes):
    assert held(told(junk, batch(stored(IDS)))) == 80
    rank = told(batch(stored(IDS)), junk)
    assert held(rank) in ((80,) if junk == batch(3) else (0,))


def test_a_block_is_held_until_it_is_gone_everywhere():
    rank = told(batch(stored(IDS), stored(IDS, medium="CPU"), removed(0, 1, 2, 3, 4)))
    assert held(rank) == 80
    rank.hear(8, batch(removed(0, medium="CPU")))
    assert held(rank) == 0


def test_an_adapters_blocks_are_its_own():
    rank = told(batch(stored(IDS, lora_name="sql", extra_keys=[["sql"]] * 5)))
    assert (held(rank), held(rank, model="base"), held(rank, model="sql")) == (0, 0, 80)
    rank.hear(8, batch(stored(IDS, first=20)))
    assert (held(rank), held(rank, model="base")) == (80, 80)


def test_endless_events_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_events, "REMEMBERED_BLOCKS", 8)
    rank = told(batch(stored(IDS)))
    for number in range(8, 40):
        rank.hear(number, batch(stored([number] * SIZE, first=number)))
    assert held(rank) == 0
    assert [held(rank, [n] * SIZE) for n in (31, 32, 39)] == [0, 16, 16]
    odd = [batch(stored([1] * n, block_size=n, block_hashes=[n])) for n in range(1, 40)]
    assert len(told(*odd).block_sizes) == 4


# --- prompts and their tokens ------------------------------------------------------------------


def test_what_begins_as_a_known_prompt_has_its_first_tokens():
    known = PromptTokens()
    known.learn(text(messages=TURN), IDS, "m")
    found = known.of(text(messages=NEXT))
    assert found is not None and (list(found.ids), found.model) == (IDS, "m")
    known.learn(text(prompt="a" * 4096), IDS, None)
    part = known.of(text(prompt="a" * 2048 + "b" * 500))
    assert part is not None and len(part.ids) == len(IDS) * 2048 // 4098
    assert known.of(text(prompt="c")) is None


def test_so_many_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens, "REMEMBERED_TOKENS", 3 * len(IDS))
    known = PromptTokens()
    for number in (1, 2, 2, 2, 3, 4):
        known.learn(text(prompt=f"{number}"), IDS, None)
    assert [known.of(text(prompt=f"{n}")) is not None for n in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert known.prompts == 3


def test_short_prompts_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch):
    """They used to be kept for their few tokens' sake, with nothing left to find them by."""
    monkeypatch.setattr(tokens, "REMEMBERED_BEGINNINGS", 3)
    known = PromptTokens()
    for number in range(9):
        known.learn(text(prompt=f"{number}"), IDS, None)
    assert known.prompts == 3
    assert known.of(text(prompt="8")) is not None


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        ({"choices": [{"prompt_token_ids": [1, 2]}]}, [1, 2]),
        ({"choices": [{"text": ""}], "prompt_token_ids": [1, 2]}, [1, 2]),
        ({"choices": [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]}, []),
        ({"choices": [{"prompt_token_ids": None}]}, []),
        ({"choices": [{"prompt_token_ids": [-1]}]}, []),
        ({"content": []}, []),
        ([], []),
    ],
)
def test_prefill_says_which_tokens_a_prompt_has(answer: Any, ids: list[int]):
    assert prompt_ids(json.dumps(answer).encode()) == ids


def test_events_say_how_much_of_what_was_sent_is_still_there():
    clock = FakeClock()
    ranks: dict[str, list[RankBlocks]] = {"d": [told(batch(stored(IDS)))]}
    known = Holdings(clock, lambda url: ranks.get(url, []))
    known.holds("d", text(messages=TURN), answered=True)
    sent = known.tokens("d", text(messages=NEXT))
    assert sent > FIRST_TURN, "its answer, too"
    known.learn(text(messages=TURN), IDS, None)
    assert known.tokens("d", text(messages=NEXT)) == sent
    ranks["d"][0].hear(8, batch(removed(2, 3, 4)))
    left = known.tokens("d", text(messages=NEXT))
    assert left == FIRST_TURN * 2 // 5
    ranks["d"].append(told(batch(stored(IDS[:16]))))
    assert known.tokens("d", text(messages=NEXT)) == left // 2, "another rank may get the request"
    ranks["e"] = [told(batch(stored(IDS)))]
    assert known.tokens("e", text(messages=TURN)) == FIRST_TURN, "never sent there"


# --- where engines publish ---------------------------------------------------------------------


def test_ports_follow_from_engines_urls():
    where = endpoints(["5557-5558", "http://h:1=tcp://k:9", "http://[::1]:2=tcp://[::2]:9-10"])
    assert where("http://10.0.0.1:8100") == ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")
    assert where("http://h:1") == ("tcp://k:9",)
    assert where("http://[::1]:2") == ("tcp://[::2]:9", "tcp://[::2]:10")
    assert where("http://[::3]:2")[0] == "tcp://[::3]:5557"
    assert endpoints([])("http://h:1") == ()


@pytest.mark.parametrize(
    "wrong", ["", "0", "70000", "9-8", "h:5557", "1-5000", "http://h:1=5557", "h:1=tcp://h:2", "x"]
)
def test_what_names_no_ports_is_refused(wrong: str):
    with pytest.raises(ConfigError, match="--kv-events"):
        endpoints([wrong])


def test_events_that_nobody_would_use_are_refused():
    with pytest.raises(ConfigError, match="kv-aware"):
        make_config(prefill=["http://p"], decode=["http://d"], kv_events=["5557"])


# --- through the proxy -------------------------------------------------------------------------


class Publisher:
    """One rank's, as vLLM's."""

    def __init__(self, socket: zmq.asyncio.Socket, port: int) -> None:
        self.socket = socket
        self.port = port
        self.number = 0

    async def say(self, *events: Any) -> None:
        number = self.number.to_bytes(8, "big")
        await self.socket.send_multipart([b"kv", number, batch(*events)])
        self.number += 1


@contextlib.asynccontextmanager
async def publisher() -> AsyncIterator[Publisher]:
    with zmq.asyncio.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.linger = 0
        yield Publisher(socket, socket.bind_to_random_port("tcp://127.0.0.1"))


@contextlib.asynccontextmanager
async def listening(prefill: Engine, decode: Engine, rank: Publisher) -> AsyncIterator[Rig]:
    """The proxy, which hears ``rank`` for both, and has seen the first turn."""
    settings = {"min_prefill_tokens": 200, "kv_events": [str(rank.port)], "admin_key": "k"}
    async with rig([prefill], [decode], **settings) as r:
        assert await rank.socket.recv() == b"\1"  # it has subscribed
        await r.ask(CHAT, messages=TURN)
        yield r


def prefill_that_returns(ids: list[int]) -> Engine:
    params = {"do_remote_prefill": True, "remote_port": 1}
    answer = {"choices": [{}], "prompt_token_ids": ids, "kv_transfer_params": params}
    return Engine(says(json.dumps(answer).encode()))


async def until(r: Rig, p: Engine, prefilled: bool) -> None:
    """Asks for the next turn again and again, until it is prefilled, or no more."""
    for _ in range(500):
        before = len(p.bodies)
        await r.ask(CHAT, messages=NEXT)
        if (len(p.bodies) > before) == prefilled:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nothing changed")


def test_what_decode_says_it_dropped_is_computed_by_prefill():
    """An engine that had evicted a chat used to get its next turn alone, and computed all of it."""

    async def scenario() -> None:
        p, d = prefill_that_returns(IDS), Engine(answers)
        async with publisher() as rank, listening(p, d, rank) as r:
            assert p.bodies[0]["return_token_ids"] is True
            assert "return_token_ids" not in d.bodies[0]
            await rank.say(stored(IDS))
            await until(r, p, prefilled=False)
            await rank.say(removed(0))
            await until(r, p, prefilled=True)
            await rank.say(stored(IDS[:16]))
            await until(r, p, prefilled=False)
            rank.number += 1  # one is lost
            await rank.say()
            await until(r, p, prefilled=True)

    run(scenario())


def test_an_engine_whose_events_broke_off_is_believed_to_hold_what_it_was_sent():
    async def scenario() -> None:
        p, d = prefill_that_returns(IDS), Engine(answers)
        async with contextlib.AsyncExitStack() as stack:
            rank = await stack.enter_async_context(publisher())
            r = await stack.enter_async_context(listening(p, d, rank))
            await rank.say(removed(0))
            await until(r, p, prefilled=True)
            rank.socket.close()
            await until(r, p, prefilled=False)

    run(scenario())


def test_who_is_removed_is_not_listened_to_any_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_subscriber, "LOOK_EVERY_S", 0.02)

    async def scenario() -> None:
        p, d = prefill_that_returns(IDS), Engine(answers)
        admin = {"Authorization": "Bearer k"}
        async with publisher() as rank, listening(p, d, rank) as r:
            drain = {"role": "prefill", "url": p.url, "drain": True}
            async with r.session.post("/admin/engines", json=drain, headers=admin) as drained:
                assert drained.status == 200
            gone = {"role": "decode", "url": d.url}
            async with r.session.delete("/admin/engines", params=gone, headers=admin) as removed:
                assert removed.status == 200
            assert await rank.socket.recv() == b"\0", "no socket is left that hears"

    run(scenario())


def test_an_engine_that_returns_no_ids_is_believed_to_hold_what_it_was_sent():
    async def scenario() -> None:
        p, d = prefill_that_returns([]), Engine(answers)
        async with publisher() as rank, listening(p, d, rank) as r:
            await rank.say(removed(0))
            await rank.say(CLEARED)
            await asyncio.sleep(0)
            await until(r, p, prefilled=False)

    run(scenario())
