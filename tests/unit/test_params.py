"""kv_transfer_params went through the client's hands: used, or OfferError, never an exception."""

import base64
import contextlib
import json
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.control.wire import Address
from kvconnect.errors import OfferError
from kvconnect.vllm.params import (
    TICKET_KEY,
    Prompt,
    Ticket,
    lent_params,
    open_ticket,
    parse_offer,
    parse_rejected,
    seal_ticket,
    wants_remote_decode,
    wants_remote_prefill,
)

SECRET = b"a secret of 16 b"
TTL_S = 30.0
IN_TREE = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "P",
    "remote_request_id": "cmpl-1",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
    "remote_block_ids": [[1, 2]],
}


def request(ids=tuple(range(40)), **changed):
    """The attributes of a vLLM request that `Prompt` uses."""
    fields = {
        "prompt_token_ids": list(ids) if ids is not None else None,
        "num_prompt_tokens": len(ids) if ids is not None else 4,
        "prompt_embeds": None,
        "lora_request": None,
        "mm_features": None,
        "cache_salt": None,
    }
    return SimpleNamespace(**{**fields, **changed})


def prompt(ids=tuple(range(40)), **changed):
    adapter = "digest of its weights" if "lora_request" in changed else None
    return Prompt(request(ids, **changed), adapter)


def ticket(tokens=39, **changed):
    fields = {
        "version": 3,
        "engine_id": "P",
        "lease_id": "g",
        "request_id": "cmpl-1",
        "tokens": tokens,
        "digest": prompt().digest(tokens),
        "ttl_ms": 2500,
        "shards": ((Address("10.0.0.1", 7), "k0"), (Address("10.0.0.1", 8), "k1")),
    }
    return Ticket(**{**fields, **changed})


KEY_ADDRESS = Address("10.0.0.1", 5600)


def lent(secret=None, **changed):
    sizes = {"tp_size": 2, "dcp_size": 1, "pp_size": 1}
    return lent_params(ticket(**changed), KEY_ADDRESS, secret, ((1, 2), (3,)), sizes)


def parse(params, secret=None, of=None, engine_id="D"):
    return parse_offer(params, of or prompt(), engine_id, secret, TTL_S)


# -- tickets -------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET])
def test_what_was_lent_is_offered_after_a_trip_through_json(secret):
    offer = parse(json.loads(json.dumps(lent(secret))), secret)
    assert offer.tokens == 39
    assert offer.digest == prompt().digest(39)
    assert offer.source.request_id == "cmpl-1"
    assert offer.source.lease_id == "g"
    assert offer.source.ttl_s == 2.5
    assert offer.source.shards == (
        Address("10.0.0.1", 7, "k0"),
        Address("10.0.0.1", 8, "k1"),
    )


def test_params_carry_the_whole_in_tree_field_set():
    params = lent()
    assert params["remote_block_ids"] == [[1, 2], [3]]
    assert (params["remote_host"], params["remote_port"]) == ("10.0.0.1", 5600)
    assert params["remote_num_tokens"] == 39
    assert {*IN_TREE, "tp_size", "pp_size", "transfer_mode"} <= params.keys()


def test_the_ticket_wins_over_a_host_that_a_router_wrote():
    offer = parse({**lent(), "remote_host": "router", "remote_port": 1})
    assert offer.source.shards[0] == Address("10.0.0.1", 7, "k0")


def test_an_unsigned_ticket_is_refused_where_a_secret_is_set():
    with pytest.raises(OfferError, match=r"signature is wrong.*auth_secret_file"):
        parse(lent(), SECRET)


def test_a_ticket_signed_with_another_secret_is_refused():
    with pytest.raises(OfferError, match="signature is wrong"):
        parse(lent(b"another secret 16"), SECRET)


def test_the_in_tree_form_is_refused_where_a_secret_is_set():
    with pytest.raises(OfferError, match="no kvconnect ticket, which auth_secret_file requires"):
        parse(IN_TREE, SECRET)


def test_a_signed_ticket_is_fine_where_no_secret_is_set():
    assert parse(lent(SECRET)).tokens == 39


@pytest.mark.slow
@given(st.data())
def test_a_signed_ticket_with_any_changed_character_is_refused(data):
    sealed = seal_ticket(ticket(), SECRET)
    place = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda c: c != sealed[place]))
    tampered = sealed[:place] + other + sealed[place + 1 :]
    try:
        assert open_ticket(tampered, SECRET) == ticket()  # base64 leaves some bits unused
    except OfferError:
        pass
    else:
        assert sealed.partition(".")[0] == tampered.partition(".")[0]


REFUSED = {
    "too many tokens": ({"tokens": 41}, "ticket for 41 of a prompt of 40 tokens"),
    "no tokens": ({"tokens": 0}, "ticket for 0 of a prompt"),
    "another prompt": ({"digest": prompt((9,) * 40).digest(39)}, "another prompt"),
    "no digest": ({"digest": b""}, "another prompt"),
    "this engine": ({"engine_id": "D"}, "in this very engine"),
    "a later version": ({"version": 2}, "ticket of version 2, expected 3"),
}


@pytest.mark.parametrize(("changed", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_ticket_that_does_not_fit_is_refused_with_the_reason(changed, reason):
    with pytest.raises(OfferError, match=reason):
        parse(lent(**changed))


def packed(value):
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(value)).decode() + "."


FIELDS = list(msgspec.structs.astuple(ticket()))
MALFORMED = {
    "a number": 7,
    "a list": ["x"],
    "not base64": "!!!.???",
    "one character": "A",
    "no payload": ".",
    "only dots": "......",
    "not msgpack": base64.urlsafe_b64encode(b"\xc1\xff").decode(),
    "cut off": seal_ticket(ticket(), None)[:40],
    "not UTF-8 when encoded": "\ud800.\ud800",
    "a map": packed({"version": 1}),
    "too few fields": packed(FIELDS[:3]),
    "no shards": packed([*FIELDS[:7], []]),
    "a port that cannot be": packed([*FIELDS[:7], [[["h", 70_000], "i"]]]),
    "an empty host": packed([*FIELDS[:7], [[["", 7], "i"]]]),
    "a ttl of years": packed([*FIELDS[:6], 1 << 40, FIELDS[7]]),
    "no ttl": packed([*FIELDS[:6], 0, FIELDS[7]]),
    "longer than any": "A" * (1 << 21),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_malformed_ticket_is_refused(text, secret):
    with pytest.raises(OfferError):
        parse({**IN_TREE, TICKET_KEY: text}, secret)


def test_a_ticket_of_endless_nesting_is_refused():
    """Used to raise RecursionError in the scheduler: a client could end the engine."""
    fields = msgspec.msgpack.encode(ticket())
    nested = b"\x99" + fields[1:] + b"\x91" * 500_000
    with pytest.raises(OfferError, match="malformed"):
        parse({TICKET_KEY: base64.urlsafe_b64encode(nested).decode()})


def test_a_message_never_repeats_all_of_what_was_sent():
    with pytest.raises(OfferError) as raised:
        parse({TICKET_KEY: ["x" * 10_000]})
    assert len(str(raised.value)) < 200


# -- the in-tree form ----------------------------------------------------------------------


def test_the_in_tree_form_is_an_offer_by_request_id():
    offer = parse(IN_TREE)
    assert offer.source.shards == (Address("10.0.0.1", 5600),)
    assert (offer.source.request_id, offer.source.lease_id) == ("cmpl-1", None)
    assert offer.source.ttl_s == TTL_S
    assert (offer.tokens, offer.digest) == (40, prompt().digest(40))


ACCEPTED = {
    "flat ids": {"remote_block_ids": [1, 2]},
    "groups": {"remote_block_ids": [[1, 2], []]},
    "tuples": {"remote_block_ids": ((1, 2), (3,))},
    "a list of tuples": {"remote_block_ids": [(1, 2)]},
    "ids as floats": {"remote_block_ids": [[1.0, 2.0]]},
    "port as float": {"remote_port": 5600.0},
    "tokens as float": {"remote_num_tokens": 40.0},
    "null tokens": {"remote_num_tokens": None},
    "more tokens than the prompt": {"remote_num_tokens": 41},
    "null ticket": {TICKET_KEY: None},
    "empty ticket": {TICKET_KEY: ""},
    "unknown keys": {"x": {"y": [1]}, "tp_size": "many", "": 0},
    "other nulls": {"remote_blocks_expiry_time": None, "tp_size": None, "transfer_mode": None},
}


@pytest.mark.parametrize("changed", ACCEPTED.values(), ids=ACCEPTED)
def test_forms_that_are_seen_in_the_wild_are_accepted(changed):
    assert parse({**IN_TREE, **changed}).tokens == 40


def test_fewer_tokens_than_the_prompt_are_fewer_tokens():
    assert parse({**IN_TREE, "remote_num_tokens": 32}).digest == prompt().digest(32)


UNUSABLE = {
    "no ids": {"remote_block_ids": None},
    "empty ids": {"remote_block_ids": []},
    "empty groups": {"remote_block_ids": [[], []]},
    "ids as text": {"remote_block_ids": "12"},
    "an id as text": {"remote_block_ids": [["1"]]},
    "a negative id": {"remote_block_ids": [[-1]]},
    "half an id": {"remote_block_ids": [[0.5]]},
    "true for an id": {"remote_block_ids": [[True]]},
    "an endless id": {"remote_block_ids": [[float("inf")]]},
    "a null id": {"remote_block_ids": [[None]]},
    "mixed depth": {"remote_block_ids": [[1], 2]},
    "too deep": {"remote_block_ids": [[[1]]]},
    "a map": {"remote_block_ids": {"0": [1]}},
    "no host": {"remote_host": None},
    "empty host": {"remote_host": ""},
    "a long host": {"remote_host": "h" * 256},
    "a host as bytes": {"remote_host": b"h"},
    "no port": {"remote_port": None},
    "port zero": {"remote_port": 0},
    "port too large": {"remote_port": 65_536},
    "port as text": {"remote_port": "5600"},
    "port true": {"remote_port": True},
    "half a port": {"remote_port": 5600.5},
    "port not a number": {"remote_port": float("nan")},
    "port with thousands of digits": {"remote_port": 10**5000},
    "no request": {"remote_request_id": None},
    "no engine": {"remote_engine_id": None},
    "this engine": {"remote_engine_id": "D"},
    "tokens zero": {"remote_num_tokens": 0},
    "tokens negative": {"remote_num_tokens": -1},
    "tokens as text": {"remote_num_tokens": "9"},
    # these used to end the mover's thread, when they were dialled or encoded
    "a host that cannot be encoded": {"remote_host": "\ud800"},
    "a host with a zero byte": {"remote_host": "a\0b"},
    "a request that cannot be encoded": {"remote_request_id": "\udfff"},
}


@pytest.mark.parametrize("changed", UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_unusable_is_refused(changed):
    with pytest.raises(OfferError):
        parse({**IN_TREE, **changed})


@pytest.mark.parametrize("key", [k for k in IN_TREE if k.startswith("remote")])
def test_every_field_of_the_in_tree_form_is_needed(key):
    with pytest.raises(OfferError, match=key):
        parse({k: v for k, v in IN_TREE.items() if k != key})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*IN_TREE, TICKET_KEY, "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from([*IN_TREE, TICKET_KEY, "remote_num_tokens", "x"])


@pytest.mark.slow
@given(st.dictionaries(KEYS, JSON, max_size=5), st.booleans(), st.sampled_from([None, SECRET]))
def test_whatever_a_client_sends_is_an_offer_or_an_offer_error(params, based, secret):
    params = {**(IN_TREE if based else {}), **params}
    assert wants_remote_prefill(params) in (True, False)
    assert wants_remote_decode(params) in (True, False)
    try:
        offer = parse(params, secret)
    except OfferError:
        pass
    else:
        assert secret is None
        assert 0 < offer.tokens <= 40
        msgspec.msgpack.encode([offer.source.request_id, offer.source.shards[0]])
    with contextlib.suppress(OfferError):
        parse_rejected(params, "D", secret, TTL_S)


@pytest.mark.parametrize("params", [None, "x", [], 7, {}])
def test_params_that_are_none_want_nothing(params):
    assert not wants_remote_prefill(params)
    assert not wants_remote_decode(params)


def test_a_rejected_request_has_a_lease_to_let_go_whatever_its_prompt_was():
    offer = parse_rejected(lent(), "D", None, TTL_S)
    assert (offer.tokens, offer.source.lease_id) == (0, "g")
    assert parse_rejected(IN_TREE, "D", None, TTL_S).source.request_id == "cmpl-1"


# -- prompts -------------------------------------------------------------------------------


def embeds(*rows):
    """A stand-in for a float tensor."""
    import numpy as np

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, key):
            return Tensor(self.array[key])

        def float(self):
            return self

        def numpy(self):
            return self.array

    return Tensor(np.array(rows, dtype=np.float32))


def image(mm_hash, offset=2, length=3):
    position = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(mm_hash=mm_hash, identifier="id", mm_position=position)


LORA = SimpleNamespace(lora_name="adapter")
OTHERS = {
    "another token": prompt((*range(39), 99)),
    "another order": prompt((1, 0, *range(2, 40))),
    "salt": prompt(cache_salt="tenant"),
    "adapter": prompt(lora_request=LORA),
    "image": prompt(mm_features=[image("h")]),
    "embeds": prompt(None, num_prompt_tokens=40, prompt_embeds=embeds([1.0], [2.0])),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_whatever_kv_depends_on_changes_the_digest(other):
    assert other.digest(40) != prompt().digest(40)


def test_whatever_kv_depends_on_changes_every_beginning():
    """Those of decode's answers, of which the next turn's prompt may load as far as it agrees."""
    ids = range(48)
    prompts = [prompt(), prompt(cache_salt="tenant"), prompt(cache_salt="another")]
    prompts += [prompt(lora_request=LORA), Prompt(request(lora_request=LORA), "other weights")]
    found = [one.prefixes(16, ids) for one in prompts]
    assert [len(one) for one in found] == [3] * 5
    assert len({digest for one in found for digest in one}) == 15
    assert prompt().prefixes(16, (99, *ids[1:]))[2] != found[0][2]


@pytest.mark.parametrize("other", ["image", "embeds"])
def test_a_prompt_that_is_not_of_tokens_alone_has_no_beginnings(other):
    """What came as an image is a placeholder's token, the same for every image."""
    assert OTHERS[other].prefixes(16, range(48)) == []


def test_digests_differ_among_those_too():
    digests = {o.digest(40) for o in OTHERS.values()} | {
        prompt(cache_salt="another").digest(40),
        prompt(mm_features=[image("other")]).digest(40),
        prompt(mm_features=[image("h", offset=3)]).digest(40),
        prompt(mm_features=[image(None)]).digest(40),
        prompt(None, num_prompt_tokens=40, prompt_embeds=embeds([1.0], [3.0])).digest(40),
    }
    assert len(digests) == len(OTHERS) + 5


def test_which_of_a_prompt_are_embeddings_is_part_of_it():
    """vLLM computes either the token or the embedding of a place, as the mask says."""
    both = {
        "prompt_embeds": embeds(*[[1.0]] * 4),
        "prompt_is_token_ids": [True, True, False, False],
    }
    other = both | {"prompt_is_token_ids": [True, False, False, False]}
    one = prompt(range(4), **both)
    assert one.digest(4) != prompt(range(4), **other).digest(4)
    assert one.digest(1) == prompt(range(4), **other).digest(1)


def test_an_adapter_is_its_weights_whatever_its_name():
    """Two adapters of one name used to be taken for one, and one of two names for two."""
    asked = [request(lora_request=SimpleNamespace(lora_name=name)) for name in ("a", "b")]
    a1, a2, b1 = Prompt(asked[0], "1"), Prompt(asked[0], "2"), Prompt(asked[1], "1")
    assert a1.digest(40) == b1.digest(40) != a2.digest(40)


@pytest.mark.parametrize("adapter", ["", None])
def test_an_adapter_that_is_not_known_has_no_digest(adapter):
    with pytest.raises(AssertionError):
        Prompt(request(lora_request=LORA), adapter)


def test_the_digest_is_of_the_first_tokens_only():
    assert prompt((*range(39), 99)).digest(39) == prompt().digest(39)
    later = [image("h", offset=39)]
    assert prompt(mm_features=later).digest(39) == prompt().digest(39)
    assert prompt().digest(38) != prompt().digest(39)


@pytest.mark.parametrize(("tokens", "backoff", "handed"), [(40, 1, 39), (1, 1, 1), (2, 1, 1)])
def test_at_least_one_token_is_handed_over(tokens, backoff, handed):
    assert Prompt(request(range(tokens)), backoff=backoff).num_tokens == handed
