"""What the proxy asks, and of whom: bodies, verdicts on answers, turns, operator's settings."""

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvconnect.errors import ConfigError
from kvconnect.proxy.config import make_config
from kvconnect.proxy.engines.pool import Pool
from kvconnect.proxy.policy import (
    CHAT,
    MAX_HELD_BYTES,
    TEXT,
    Opening,
    decode_body,
    error_body,
    error_event,
    judge_opening,
    prefill_body,
    read_body,
    request_id,
    splittable,
    transfer_params,
)
from kvconnect.testing import FakeClock

# A machine that is busy with other tests is no failure of these.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PROMPT_FIELDS = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
    "chat_template_kwargs": {"enable_thinking": False},
    "cache_salt": "s",
    "truncate_prompt_tokens": 8,
    "field_of_a_later_vllm": [1, {"a": None}],
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
transfer_keys = st.sampled_from(["kv_transfer_params", "ec_transfer_params"])
bodies = st.dictionaries(
    transfer_keys | st.sampled_from(["vllm_xargs", "n", "prompt", "model"]) | st.text(),
    json_values,
    max_size=6,
)


def body_of(**fields: object) -> dict[str, msgspec.Raw]:
    return read_body(json.dumps(fields).encode())


# --- what a client may say ---------------------------------------------------------------------


@unhurried
@given(bodies, json_values, st.booleans())
def test_no_client_ever_sets_transfer_params(fields, evil, ascii_only):
    fields |= {"kv_transfer_params": evil, "ec_transfer_params": evil}
    fields["vllm_xargs"] = {"kv_transfer_params": evil, "ec_transfer_params": evil, "kept": 1}
    body = read_body(json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "replace"))
    prefill, decode = json.loads(prefill_body(TEXT, body)), json.loads(decode_body(body, None))
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert "kv_transfer_params" not in decode
    for leg in (prefill, decode):
        assert "ec_transfer_params" not in leg
        assert leg["vllm_xargs"] == {"kept": 1}


@pytest.mark.parametrize(
    "raw",
    [
        b'{"kv_transfer_params": {"a": 1}, "kv_transfer_params": {"b": 2}}',
        b'{"kv_transfer_\\u0070arams": {"a": 1}}',
        b'{"vllm_xargs": {"kv_transfer_params": "x"}, "vllm_xargs": {"kv_transfer_params": "y"}}',
        b'{"vllm_xargs": {"kv_transfer_\\u0070arams": "x", "kv_transfer_params": "y"}}',
    ],
    ids=["given twice", "escaped", "extra args twice", "extra args escaped"],
)
def test_hiding_transfer_params_does_not_help(raw):
    assert b"arams" not in decode_body(read_body(raw), None)


@unhurried
@given(st.data())
def test_the_engines_parser_sees_the_same_keys_as_ours(data):
    """Values pass unparsed: none may carry a key in that only the engine would see."""
    raw = bytearray(b'{"prompt":"a\\u0041\\"x","n":1.5e3,"l":[1,{"k":[]}],"z":null}')
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 1))] = bytes(
            [data.draw(st.sampled_from(b'{}[]",:\\019eE+-.truefalsn \n\x00\xff'))]
        )
    try:
        body = read_body(bytes(raw))
        seen = json.loads(decode_body(body, None))
    except ValueError:  # refused by us, or by the engine: both are safe
        return
    assert set(seen) == set(body)


@unhurried
@given(bodies)
def test_what_nobody_looks_at_passes_unchanged(fields):
    for key in ("kv_transfer_params", "ec_transfer_params", "vllm_xargs"):
        fields.pop(key, None)
    body = read_body(json.dumps(fields).encode())
    assert json.loads(decode_body(body, None)) == fields


def test_numbers_keep_their_spelling():
    raw = b'{"temperature":0.10,"seed":12345678901234567890123}'
    assert decode_body(read_body(raw), None) == raw


@pytest.mark.parametrize("raw", [b"", b"{", b"nul", b'{"a":1}x', b'{"\xff":1}', b'{"a":NaN}'])
def test_invalid_json_is_said_to_be(raw):
    with pytest.raises(ValueError, match="not valid JSON"):
        read_body(raw)


@pytest.mark.parametrize("raw", [b"[]", b'"x"', b"1", b"null", b'{"vllm_xargs":[1]}'])
def test_a_body_that_is_no_object_is_said_to_be(raw):
    with pytest.raises(ValueError, match="not a JSON object"):
        read_body(raw)


@pytest.mark.parametrize("own", ["req_1", "a" * 128, "trace:7.3-x"])
def test_a_clients_request_id_is_kept(own):
    assert request_id(own) == own


@pytest.mark.parametrize(
    "own",
    [
        *(None, "", "é", "\udcff"),
        "___prefill_addr_10.0.0.9:1___decode_addr_10.0.0.8:2_x",
    ],
)
def test_a_request_id_that_could_steer_or_break_an_engine_is_not(own):
    assert request_id(own) is None


@pytest.mark.parametrize("own", ["a b", "a" * 129, "x\n", "team/7#3@eu+1"])
def test_a_request_id_with_other_characters_is_cleaned_and_still_told_apart(own):
    cleaned = request_id(own)
    assert cleaned is not None
    assert cleaned.startswith(own[0]) and len(cleaned) <= 128
    assert request_id(cleaned) == cleaned != request_id(own + "!")


# --- the prefill leg ---------------------------------------------------------------------------


def test_prefill_is_asked_for_one_token_and_to_keep_its_kv():
    asked = json.loads(
        prefill_body(
            TEXT,
            body_of(
                prompt="p", stream=True, stream_options={"include_usage": True}, max_tokens=900
            ),
        )
    )
    assert asked == {
        "prompt": "p",
        "stream": False,
        "max_tokens": 1,
        "min_tokens": 1,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }


@pytest.mark.parametrize("given_as", [900, None])
def test_prefill_makes_one_token_also_where_the_chat_limit_would_win(given_as):
    asked = json.loads(prefill_body(CHAT, body_of(messages=[], max_completion_tokens=given_as)))
    assert asked["max_completion_tokens"] == asked["max_tokens"] == 1


def test_prefill_renders_the_same_prompt_as_decode():
    """Whatever can change the prompt's tokens has to reach both engines."""
    body = body_of(**PROMPT_FIELDS, max_tokens=9)
    prefill, decode = json.loads(prefill_body(TEXT, body)), json.loads(decode_body(body, None))
    for key, value in PROMPT_FIELDS.items():
        assert prefill[key] == decode[key] == value


def test_prefill_computes_nothing_that_only_an_answer_needs():
    dropped = {
        "n": 1,
        "best_of": 1,
        "use_beam_search": False,
        "stop": ["x"],
        "stop_token_ids": [3],
        "echo": True,
        "logprobs": 5,
        "top_logprobs": 5,
        "logprob_token_ids": [1],
        "min_tokens": 70,
        "seed": 7,
        "return_token_ids": True,
        "stream_interval": 4,
    }
    asked = json.loads(prefill_body(TEXT, body_of(prompt="p", **dropped)))
    assert set(asked) == {"prompt", "stream", "max_tokens", "min_tokens", "kv_transfer_params"}


def test_decode_gets_prefills_params_verbatim():
    params = transfer_params(b'{"id":"x","kv_transfer_params": {"b" : 1e2, "i":9007199254740993} }')
    assert params is not None
    sent = decode_body(body_of(prompt="p", kv_transfer_params={"evil": 1}), params)
    assert sent.endswith(b'"kv_transfer_params":{"b" : 1e2, "i":9007199254740993}}')
    assert b"evil" not in sent


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"kv_transfer_params":null}', b'{"kv_transfer_params":"x"}', b"[]", b"<"]
)
def test_an_answer_without_params_hands_nothing_over(answer):
    assert transfer_params(answer) is None


# --- which requests are split ------------------------------------------------------------------

NEUTRAL = {"n": 1, "best_of": 1, "use_beam_search": False, "echo": False, "prompt_logprobs": None}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "p"},
        {"prompt": "p", **NEUTRAL},
        {"prompt": "p", **dict.fromkeys(NEUTRAL)},
        {"prompt": ["p"]},
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2, 3]]},
        {"prompt": []},
        {"prompt": "p", "echo": True},
        {"prompt": "p", "logprobs": 3},
        {"prompt": "p", "truncate_prompt_tokens": 4},
        {"prompt_embeds": "AAAA"},
        {"messages": [], "top_logprobs": 2, "logprobs": True},
        {"messages": [], "echo": False},
    ],
    ids=str,
)
def test_one_prompt_with_one_answer_is_split(fields):
    assert splittable(TEXT, body_of(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["p", "q"]},
        {"prompt": [[1], [2]]},
        {"prompt": "p", "prompt_embeds": "AAAA"},
        {"prompt_embeds": ["AAAA", "BBBB"]},
        {"prompt": "p", "n": 2},
        {"prompt": "p", "n": "2"},
        {"prompt": "p", "n": 2.0},
        {"prompt": "p", "best_of": 3},
        {"prompt": "p", "use_beam_search": True},
        {"prompt": "p", "use_beam_search": "yes"},
        {"prompt": "p", "prompt_logprobs": 0},
        {"prompt": "p", "echo": True, "logprobs": 0},
        {"prompt": "p", "echo": "yes", "logprobs": 0},
        {"messages": [], "echo": True},
        {"prompt": "p", "truncate_prompt_tokens": -1},
        {"prompt": "p", "truncate_prompt_tokens": "-1"},
    ],
    ids=str,
)
def test_what_one_lease_cannot_feed_is_not_split(fields):
    assert not splittable(TEXT, body_of(**fields))


@unhurried
@given(st.lists(st.text() | st.lists(st.integers(0, 9), min_size=1), min_size=2, max_size=5))
def test_a_batch_of_prompts_is_never_split(prompts):
    assert not splittable(TEXT, body_of(prompt=prompts))


# --- answers that start with an error ----------------------------------------------------------

ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
LOAD_FAILED = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (b"", Opening.UNDECIDED),
        (LOAD_FAILED[:9], Opening.UNDECIDED),
        (LOAD_FAILED, Opening.FAILED),
        (LOAD_FAILED + DONE, Opening.FAILED),
        (ROLE, Opening.UNDECIDED),
        (ROLE + LOAD_FAILED, Opening.FAILED),
        (ROLE + TOKEN, Opening.GOOD),
        (TOKEN + LOAD_FAILED, Opening.GOOD),
        (DONE, Opening.GOOD),
        (b": keep-alive\n\n", Opening.GOOD),
        (b'data: {"choices":[{"text":"a","index":0}]}\n\n', Opening.GOOD),
        (b'data: {"error": {"code": 400}}\n\n', Opening.GOOD),
        (b'data: {"error": {"code": "server_error"}}\n\n', Opening.FAILED),
        (b"data: {}\r\n", Opening.GOOD),
        (b"data: " + b"x" * MAX_HELD_BYTES, Opening.GOOD),
    ],
)
def test_a_stream_is_judged_by_its_first_events(head, verdict):
    assert judge_opening(head) is verdict


@unhurried
@given(st.integers(0, len(ROLE + LOAD_FAILED)))
def test_a_failure_is_never_taken_for_good_however_it_is_cut(at):
    whole = ROLE + LOAD_FAILED
    assert judge_opening(whole[:at]) in (Opening.UNDECIDED, judge_opening(whole))


def test_errors_have_openais_shape():
    error = json.loads(error_body(503, "gone"))["error"]
    assert error == {
        "message": "gone",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }


@pytest.mark.parametrize(("sent", "border"), [(b"\n\n", 0), (b'"a', 2), (b"}\n", 2)])
def test_an_error_event_starts_its_own_event(sent, border):
    event = error_event(502, "x", sent)
    assert event[:border] == b"\n" * border
    assert event[border:].startswith(b'data: {"error":')
    assert event.endswith(b"}\n\n")


# --- whose turn it is --------------------------------------------------------------------------


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def firsts(pool: Pool, count: int) -> list[str]:
    return [pool.candidates()[0] for _ in range(count)]


@unhurried
@given(st.integers(1, 6), st.integers(1, 4))
def test_turns_are_fair(engines, rounds):
    urls = [f"http://e{i}" for i in range(engines)]
    taken = firsts(Pool(urls, FakeClock()), engines * rounds)
    assert taken == urls * rounds


def test_every_engine_that_is_up_is_a_candidate(clock):
    pool = Pool(["a", "b", "c"], clock)
    pool.candidates()
    assert pool.candidates() == ("b", "c", "a")


def test_a_failed_engine_sits_out_until_its_backoff_has_passed(clock):
    pool = Pool(["a", "b"], clock)
    assert pool.failed("a")
    clock.advance(0.99)
    assert firsts(pool, 4) == ["b"] * 4
    assert pool.candidates() == ("b",)
    assert pool.last_resort() == ("a",)
    clock.advance(0.02)
    assert pool.candidates() == ("a", "b")


def test_one_caller_at_a_time_probes_an_engine(clock):
    """A hundred waiting requests must not all run into a host that swallows packets."""
    pool = Pool(["a", "b"], clock)
    pool.failed("a")
    clock.advance(1)
    assert firsts(pool, 4) == ["a", "b", "b", "b"]


def test_a_probe_that_never_reports_is_followed_by_another(clock):
    pool = Pool(["a", "b"], clock)
    pool.failed("a")
    clock.advance(1)
    assert firsts(pool, 2) == ["a", "b"]
    clock.advance(1)
    assert firsts(pool, 1) == ["a"]


def test_backoff_doubles_to_its_limit_and_success_ends_it(clock):
    pool = Pool(["a"], clock)
    waits = []
    for _ in range(7):
        assert pool.failed("a")
        waits.append(pool.states()[0].retry_in_s)
        clock.advance(waits[-1])
        assert pool.candidates() == ("a",)
    assert waits == [1, 2, 4, 8, 15, 15, 15]
    assert pool.succeeded("a")
    assert not pool.succeeded("a")
    assert pool.any_up()
    pool.failed("a")
    assert pool.states()[0].retry_in_s == 1


def test_a_burst_of_failures_counts_once(clock):
    """Fifty requests were on the engine when it died: it still is away for 1 s, not 15."""
    pool = Pool(["a"], clock)
    assert [pool.failed("a") for _ in range(50)] == [True] + [False] * 49
    assert pool.states()[0].retry_in_s == 1


def test_the_probe_of_an_engine_counts(clock):
    pool = Pool(["a", "b"], clock)
    pool.failed("a")
    clock.advance(1)
    pool.candidates()
    assert pool.failed("a")
    assert pool.states()[0].retry_in_s == 2


def test_the_last_resort_is_who_is_due_soonest(clock):
    pool = Pool(["a", "b"], clock)
    pool.failed("a")
    clock.advance(0.5)
    pool.failed("b")
    assert pool.candidates() == ()
    assert pool.last_resort() == ("a", "b")
    assert not pool.any_up()


def test_requests_in_flight_are_counted_also_when_they_fail(clock):
    pool = Pool(["a"], clock)

    def fail_amid_two() -> None:
        with pool.busy("a"), pool.busy("a"):
            assert pool.states()[0].in_flight == 2
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_amid_two()
    assert pool.states()[0].in_flight == 0


@unhurried
@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "failed", "succeeded", "wait"]), st.integers(0, 2)),
        max_size=40,
    )
)
def test_no_engine_is_ever_lost_or_offered_twice(steps):
    clock, urls = FakeClock(), ["a", "b", "c"]
    pool = Pool(urls, clock)
    for step, which in steps:
        if step == "wait":
            clock.advance(which)
        elif step == "ask":
            pool.candidates()
        else:
            getattr(pool, step)(urls[which])
        up = {state.url for state in pool.states() if state.up}
        resort = pool.last_resort()
        asked = pool.candidates()
        assert sorted(asked + resort) == urls
        assert up <= set(asked)
    clock.advance(15)
    assert sorted(pool.candidates()) == urls


# --- what an operator may set ------------------------------------------------------------------


def test_urls_are_taken_as_they_are_meant():
    config = make_config(prefill=["http://p:8100/"], decode=["https://d/base/", "http://[::1]:1"])
    assert config.prefill == ("http://p:8100",)
    assert config.decode == ("https://d/base", "http://[::1]:1")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8100", r"'localhost:8100' is not an http\(s\) URL"),
        ("p", "is not an http"),
        ("ftp://p", "is not an http"),
        ("http://", "is not an http"),
        ("http://p:99999", "is not a URL"),
        ("http://p:0", "is not an http"),
        ("http://u:x@p", "carries a user name"),
        ("http://p/v1/", "ends in /v1; leave /v1 off"),
        ("http://p?x=1", "more than a host"),
        ("http://p ", "more than a host"),
    ],
)
def test_a_url_that_cannot_work_is_named_with_a_remedy(url, said):
    with pytest.raises(ConfigError, match=f"--prefill .*{said}"):
        make_config(prefill=[url], decode=["http://d"])


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"prefill": []}, "no prefill engine is named"),
        ({"decode": None}, "no decode engine is named"),
        ({"decode": ["http://d", "http://d/"]}, "given twice"),
        ({"api_key": " "}, "API key is empty"),
        ({"admin_key": "k\n"}, "admin key .*line ends"),
        ({"engine_api_key": "a\nb"}, "engine API key .*plain"),
        ({"ssl_keyfile": "k.pem"}, "ssl_certfile"),
        ({"silence_timeout_s": 0.0}, "silence_timeout_s"),
        ({"typo": 1}, "typo"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_an_error_at_startup(settings_, said):
    with pytest.raises(ConfigError, match=said):
        make_config(**({"prefill": ["http://p"], "decode": ["http://d"]} | settings_))
