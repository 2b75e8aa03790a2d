"""Mooncake's params: what both legs say becomes one lease's name, and nothing hostile raises."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.config import MooncakeConfig
from kvconnect.control.wire import Address, RequestId
from kvconnect.errors import ConfigError, OfferError
from kvconnect.vllm.mooncake import protocol as contract_module
from kvconnect.vllm.mooncake.allowed import Endpoint
from kvconnect.vllm.mooncake.place import place_of
from kvconnect.vllm.mooncake.protocol import MooncakeProtocol
from kvconnect.vllm.params import TICKET_KEY, Prompt, Ticket
from kvconnect.vllm.protocol import EngineInfo

SECRET = b"a secret of 16 b"
RANKS = (Address("127.0.0.1", 7000), Address("127.0.0.1", 7001))
SIZES = {"tp_size": 2, "dcp_size": 1, "pp_size": 1}


def parallel(**changed):
    """The attributes of vLLM's ParallelConfig that are used.

    Not the size of the group: vLLM says 1 to the engines of dense models.
    """
    fields = {
        "local_engines_only": False,
        "data_parallel_rank_local": 0,
        "data_parallel_index": 0,
        "data_parallel_master_ip": "127.0.0.1",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
    }
    return SimpleNamespace(**{**fields, **changed})


@pytest.fixture(autouse=True)
def any_port(monkeypatch):
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", "0")


@pytest.fixture
def make():
    made = []

    def make(engine_id, role, secret=None, shape=None, **options):
        config = MooncakeConfig(handshake_timeout=60.0, **options)
        us = EngineInfo(engine_id, secret, 30.0, role)
        contract = MooncakeProtocol(
            us, config, SimpleNamespace(parallel_config=shape or parallel())
        )
        made.append(contract)
        return contract

    yield make
    for contract in made:
        contract.close(), contract.close()


class Pair:
    """A prefill and a decode engine's contracts, and what a router says to both."""

    def __init__(self, make, p_secret=None, d_secret=None, **options):
        self.p = make("P", "kv_producer", p_secret)
        self.p.addresses_known(RANKS)
        self.d = make("D", "kv_consumer", d_secret, **options)
        self.port = self.p.port

    def offer(self, params, unused=False, backoff=0):
        """As vLLM's scheduler asks: again and again."""
        ask = request(params)
        prompt = Prompt(ask, backoff=backoff)
        until = time.monotonic() + 60
        while (found := self.d.unused(ask) if unused else self.d.offer(ask, prompt)) is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        return found

    def decode_params(self, **changed):
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_bootstrap_addr": f"http://127.0.0.1:{self.port}",
            "remote_engine_id": "P",
            "transfer_id": "xfer-1",
            **changed,
        }


PREFILL = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "xfer-1"}


def request(params, ids=tuple(range(40))):
    return SimpleNamespace(
        kv_transfer_params=params,
        prompt_token_ids=list(ids),
        num_prompt_tokens=len(ids),
        prompt_embeds=None,
        lora_request=None,
        mm_features=None,
        cache_salt=None,
    )


def ticket():
    shards = tuple((address, "i") for address in RANKS)
    return Ticket(3, "P", "g", "cmpl-1", 40, Prompt(request({})).digest(40), 30_000, shards)


def offered(contract, params):
    asked = request(params)
    return contract.offer(asked, Prompt(asked))


@pytest.mark.parametrize("secret", [None, SECRET])
def test_both_legs_name_one_lease(make, secret):
    pair = Pair(make, secret, secret)
    prefill = request(PREFILL)
    assert pair.p.lends(prefill) and not pair.p.loads(prefill)
    offer = pair.offer(pair.decode_params())
    assert offer.source.request_id == pair.p.name(prefill) == "transfer xfer-1"
    assert offer.source.shards == tuple(RANKS)
    assert offer.source.lease_id is None
    assert (offer.tokens, offer.digest) == (40, Prompt(request({})).digest(40))
    assert (offer.source.ttl_s, offer.source.wait_s) == (30.0, 480.0)


def test_nothing_is_answered(make):
    pair = Pair(make)
    assert pair.p.answer(request(PREFILL), ticket(), [[1]], SIZES) is None


def test_the_last_tokens_may_be_left_to_decode(make):
    offer = Pair(make).offer(Pair(make).decode_params(), backoff=1)
    assert (offer.tokens, offer.digest) == (39, Prompt(request({})).digest(39))


def test_a_request_that_never_runs_has_a_lease_to_release(make):
    pair = Pair(make)
    offer = pair.offer(pair.decode_params(), unused=True)
    assert offer.source.request_id == "transfer xfer-1"
    assert (offer.tokens, offer.digest) == (0, b"")


def test_params_of_the_nixl_form_are_understood_and_answered(make):
    pair = Pair(make)
    plain = request({"do_remote_decode": True, "remote_engine_id": None, "transfer_id": None})
    assert pair.p.name(plain) == ""
    answer = pair.p.answer(plain, ticket(), [[1]], SIZES)
    assert answer["remote_request_id"] == "cmpl-1"
    assert "step_tokens" not in answer, "a router would take it for one that it may read early"
    assert offered(pair.d, answer).source.lease_id == "g"
    assert pair.d.unused(request(answer)).source.request_id == "cmpl-1"
    both = {**answer, "transfer_id": "xfer-1", "remote_bootstrap_addr": "http://nobody:1"}
    assert offered(pair.d, both).source.lease_id == "g", "the ticket wins"


def test_a_lease_is_not_found_by_an_id_that_is_a_transfers(make):
    """A client may choose either."""
    pair = Pair(make)
    assert pair.p.name(request({**PREFILL, "transfer_id": "cmpl-1"})) != "cmpl-1"


@pytest.mark.parametrize(("p_secret", "d_secret"), [(None, SECRET), (b"another of 16 by", SECRET)])
def test_an_endpoint_that_proves_nothing_is_not_believed(make, p_secret, d_secret):
    pair = Pair(make, p_secret, d_secret)
    with pytest.raises(OfferError, match="auth_secret_file"):
        pair.offer(pair.decode_params())


def test_only_allowed_endpoints_are_asked(make):
    pair = Pair(make, allowed_bootstrap_addresses=("10.0.0.0/8",))
    with pytest.raises(OfferError, match="allowed_bootstrap_addresses"):
        pair.offer(pair.decode_params())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"remote_engine_id": "Q"}, "knows no engine Q"),
        ({"remote_engine_id": "D"}, "this very engine"),
        ({"remote_engine_id": None}, "remote_engine_id"),
        ({"transfer_id": None}, "transfer_id"),
        ({"transfer_id": 7}, "transfer_id"),
        ({"transfer_id": "x" * 513}, "transfer_id"),
        ({"transfer_id": "\ud800"}, "transfer_id"),
        ({"remote_bootstrap_addr": None}, "remote_bootstrap_addr"),
        ({"remote_bootstrap_addr": "https://127.0.0.1:1"}, "remote_bootstrap_addr"),
        ({"remote_bootstrap_addr": "http://127.0.0.1:1"}, "cannot be asked"),
    ],
)
def test_what_is_unusable_is_an_offer_error(make, changed, reason):
    pair = Pair(make)
    for unused in (False, True):
        with pytest.raises(OfferError, match=reason):
            pair.offer(pair.decode_params(**changed), unused)
    assert pair.d.unusable(request(pair.decode_params(**changed))) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
keys = st.sampled_from(
    ["transfer_id", "remote_bootstrap_addr", "remote_engine_id", "do_remote_decode", TICKET_KEY]
)


@pytest.fixture(scope="module")
def alone():
    """A contract whose resolver asks nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", "0")
        found = SimpleNamespace(find=lambda endpoint, engine_id: RANKS)
        patch.setattr(contract_module, "Resolver", lambda ask, clock: found)
        us, shape = (
            EngineInfo("D", None, 30.0, "kv_consumer"),
            SimpleNamespace(parallel_config=parallel()),
        )
        return MooncakeProtocol(us, MooncakeConfig(), shape)


@pytest.mark.slow
@given(st.dictionaries(keys, values))
def test_hostile_params_raise_nothing_but_offer_errors(alone, params):
    for leg in ("do_remote_prefill", "do_remote_decode"):
        ask = request({**params, leg: True})
        for look in (alone.loads, alone.lends, alone.name, alone.unusable):
            look(ask)
        for find in (lambda one: alone.offer(one, Prompt(one)), alone.unused):
            try:
                offer = find(ask)
            except OfferError:
                continue
            assert 0 < len(offer.source.request_id) <= 1024
        assert alone.answer(ask, ticket(), [[1]], SIZES) is None or not alone.name(ask)


def test_a_lease_name_is_never_too_long_for_the_wire(alone):
    (bound,) = RequestId.__metadata__
    assert len(alone.name(request({**PREFILL, "transfer_id": "x" * 512}))) <= bound.max_length


# -- where the endpoint is -------------------------------------------------------------------


def test_a_group_of_engines_has_one_endpoint(make, monkeypatch):
    first = make("P_dp0", "kv_producer", SECRET, parallel())
    first.addresses_known(RANKS)
    port = first.port
    monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", str(port))
    second = make("P_dp1", "kv_producer", SECRET, parallel(data_parallel_index=1))
    assert second.port is None
    others = tuple(Address("127.0.0.1", 7100 + rank) for rank in range(2))
    second.addresses_known(others)
    pair = Pair.__new__(Pair)
    pair.d, pair.port = make("D", "kv_consumer", SECRET), port
    offer = pair.offer(pair.decode_params(remote_engine_id="P_dp1"))
    assert offer.source.shards == tuple(others)
    offer = pair.offer(pair.decode_params(remote_engine_id="P_dp0"))
    assert offer.source.shards == tuple(RANKS)


def test_an_operators_endpoint_is_registered_at(make):
    whole = make("first", "kv_both", None, parallel())
    port = whole.port
    shape = parallel(data_parallel_index=2)
    ours = make("P", "kv_producer", None, shape, bootstrap_server_address=f"localhost:{port}")
    ours.addresses_known(RANKS)
    pair = Pair.__new__(Pair)
    pair.d, pair.port = make("D", "kv_consumer"), port
    assert len(pair.offer(pair.decode_params()).source.shards) == 2


def test_decode_engines_serve_nothing(make):
    assert make("D", "kv_consumer").port is None
    assert make("B", "kv_both").port is not None


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:x", "host:70000"])
def test_a_bad_bootstrap_server_address_is_a_startup_error(address):
    with pytest.raises(ConfigError, match="bootstrap_server_address"):
        place_of(parallel(), address)


def test_ports_that_are_none_are_a_startup_error(monkeypatch):
    for port in ("x", "-1", "70000"):
        monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", port)
        with pytest.raises(ConfigError, match="VLLM_MOONCAKE_BOOTSTRAP_PORT"):
            place_of(parallel(), None)


def test_a_group_cannot_look_for_its_endpoint_at_any_port():
    with pytest.raises(ConfigError, match="data-parallel"):
        place_of(parallel(data_parallel_index=1), None)


@pytest.mark.parametrize(
    ("shape", "registers_at"),
    [
        ({"data_parallel_index": 3}, Endpoint("10.0.0.9", 8998)),
        (
            {"local_engines_only": True, "data_parallel_index": 3, "data_parallel_rank_local": 1},
            Endpoint("127.0.0.1", 8998),
        ),
        ({"local_engines_only": True, "data_parallel_index": 3}, None),
        ({}, None),
    ],
)
def test_who_serves_is_as_in_tree(monkeypatch, shape, registers_at):
    monkeypatch.delenv("VLLM_MOONCAKE_BOOTSTRAP_PORT")
    place = place_of(parallel(data_parallel_master_ip="10.0.0.9", **shape), None)
    assert (place.registers_at, place.port) == (registers_at, 8998)
