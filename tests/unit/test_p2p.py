"""vLLM's P2pNcclConnector as routers and configurations know it: options, ids, pings."""

import itertools
import threading
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.config import parse
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, OfferError
from kvconnect.orders import Source
from kvconnect.transport.nccl import library as nccl_library
from kvconnect.vllm.p2p.config import P2pNcclConfig
from kvconnect.vllm.p2p.ids import parse_pairing
from kvconnect.vllm.p2p.pings import Pings
from kvconnect.vllm.p2p.protocol import P2pProtocol
from kvconnect.vllm.params import Prompt
from kvconnect.vllm.protocol import EngineInfo

P, D = Address("10.0.0.1", 21001), Address("10.0.1.1", 22001)
UUID = "0123456789abcdef0123456789abcdef"
SECRET = b"a secret of 16 b"


def routers(prefill=P, decode=D, uuid=UUID):
    """The X-Request-Id that routers make."""
    return f"___prefill_addr_{prefill}___decode_addr_{decode}_{uuid}"


# -- options ---------------------------------------------------------------------------------


def parsed(**options):
    return parse(options, P2pNcclConfig, "KVConnectP2pNccl")


OF_VLLMS_EXAMPLE = {
    "proxy_ip": "0.0.0.0",
    "proxy_port": "30001",
    "http_port": "20003",
    "send_type": "PUT_ASYNC",
    "nccl_num_channels": "16",
    "mem_pool_size_gb": "32",
}


def test_the_configuration_of_vllms_example_means_what_it_meant():
    config = parsed(**OF_VLLMS_EXAMPLE)
    assert (config.proxy, config.http_port) == ("0.0.0.0:30001", 20003)
    assert config.nccl_num_channels == 16
    assert config.staging_bytes == P2pNcclConfig().staging_bytes


def test_numbers_need_not_be_text():
    numbers = {k: int(v) if v.isdigit() else v for k, v in OF_VLLMS_EXAMPLE.items()}
    config = parsed(**numbers)
    assert (config.proxy, config.http_port) == ("0.0.0.0:30001", 20003)
    assert config.nccl_num_channels == 16


@pytest.mark.parametrize("half", [{"proxy_ip": "10.0.0.9"}, {"proxy_port": 30001}, {}])
def test_without_address_and_port_no_router_is_told(half):
    assert parsed(**half).proxy == ""


def test_a_router_of_ip_version_6():
    assert parsed(proxy_ip="::1", proxy_port=1, http_port=2).proxy == "[::1]:1"


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"kv_buffer_size": "8e9"}, 64 << 20),  # decode's, and
        ({"kv_buffer_size": "1e1"}, 64 << 20),  # prefill's in vLLM's example
        ({"kv_buffer_size": 3 << 20}, 3 << 20),
        ({"kv_buffer_size": "8e9", "staging_bytes": 1 << 33}, 8_000_000_000),
        ({"mem_pool_size_gb": 0.03125}, 32 << 20),
        ({"mem_pool_size_gb": "1", "staging_bytes": 1 << 33}, 1 << 30),
        ({"mem_pool_size_gb": 0}, 64 << 20),
    ],
)
def test_memory_for_kv_on_its_way_is_bounded_by_the_old_options(options, most):
    assert parsed(**options).staging_bytes == most


WRONG = {
    "no http_port": ({"proxy_ip": "a", "proxy_port": 1}, "without http_port.*--port 8000"),
    "no port": ({"proxy_ip": "a", "proxy_port": "x", "http_port": 1}, "proxy_port is 'x'"),
    "port 0": ({"proxy_ip": "a", "proxy_port": 0, "http_port": 1}, "proxy_port is 0.*65535"),
    "http port": ({"proxy_ip": "a", "proxy_port": 1, "http_port": 1e9}, "http_port"),
    "send type": ({"send_type": "PUSH"}, "PUSH"),
    "backend": ({"backend": "gloo"}, "gloo"),
    "channels": ({"nccl_num_channels": "many"}, "nccl_num_channels is 'many'"),
    "half a channel": ({"nccl_num_channels": 0.5}, "nccl_num_channels"),
    "pool": ({"mem_pool_size_gb": "all"}, "mem_pool_size_gb is 'all', expected a number"),
    "buffer": ({"kv_buffer_size": -1}, "kv_buffer_size"),
    "endless": ({"kv_buffer_size": "inf"}, "kv_buffer_size"),
    "spelling": ({"proxy_prot": 1}, "did you mean 'proxy_port'"),
}


@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        parsed(**options)


def test_the_backend_is_nccl_between_gpus_where_it_can_be_had_and_else_ucx(monkeypatch, caplog):
    nccl = ("nccl", {"nccl_num_channels": 8})

    def missing():
        raise ConfigError("no libnccl")

    monkeypatch.setattr(nccl_library, "find", lambda: "libnccl.so.2")
    assert parsed().chosen_transport("cuda") == nccl
    assert parsed().chosen_transport("cpu") == ("ucx", {})
    assert parsed(backend="ucx").chosen_transport("cuda") == ("ucx", {})
    monkeypatch.setattr(nccl_library, "find", missing)
    assert parsed().chosen_transport("cuda") == ("ucx", {})
    assert "NCCL cannot be used, UCX is tried: no libnccl" in caplog.text
    assert parsed(backend="nccl").chosen_transport("cpu") == nccl
    assert parsed(transport="nixl").chosen_transport("cuda") == ("nixl", {})


# -- request ids -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "cmpl-", "chatcmpl-", "0_cmpl-"])
@pytest.mark.parametrize("behind", ["", "-0", "-12"])
@pytest.mark.parametrize("uuid", [UUID, "01234567-89ab-cdef-0123-456789abcdef", "a"])
def test_both_engines_know_a_request_by_the_same_name(before, behind, uuid):
    same = before + routers(uuid=uuid) + behind
    prefill, decode = (parse_pairing(f"{same}-{random}") for random in ("01234567", "fedcba98"))
    assert prefill == decode == parse_pairing(same)
    assert prefill is not None
    assert (prefill.prefill, prefill.decode) == (P, D)
    assert same == prefill.name


def test_prompts_and_answers_of_one_request_have_names_of_their_own():
    ids = [f"{n}cmpl-{routers()}-{i}-01234567" for n in ("", "0_", "1_") for i in (0, 1)]
    assert len({parse_pairing(i).name for i in ids}) == 6


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "prefill_1", "p.example.com", "::1", "fe80::1", "2401:db00::face:0:172:0"]
)
def test_any_form_of_address_is_understood(host):
    at = Address(host, 21001)
    for shown in (str(at), f"{host}:21001"):
        pairing = parse_pairing(f"cmpl-{routers(shown, shown)}-0")
        assert pairing is not None
        assert pairing[:2] == (at, at)


def test_other_ids_name_no_engines():
    assert parse_pairing("cmpl-1-0-01234567") is None
    assert parse_pairing("") is None


HOSTILE = {
    "only the mark": "___prefill_addr_",
    "no port": routers(prefill="10.0.0.1"),
    "port 0": routers(prefill="10.0.0.1:0"),
    "large port": routers(prefill="10.0.0.1:65536"),
    "endless port": routers(prefill="10.0.0.1:" + "9" * 5000),
    "no host": routers(prefill=":1"),
    "empty brackets": routers(prefill="[]:1"),
    "long host": routers(prefill="h" * 256 + ":1"),
    "no decode": "___prefill_addr_10.0.0.1:1",
    "no uuid": routers(uuid=""),
    "long uuid": routers(uuid="a" * 1024),
    "beginnings": "___prefill_addr_1:1___decode_addr_" * 100_000,
    "line break": routers(uuid="a\nb"),
    "surrogate": routers(uuid="a\ud800"),
    "zero byte": routers(uuid="a\0"),
    "other digits": routers(prefill="10.0.0.1:١٢"),
}


@pytest.mark.parametrize("request_id", HOSTILE.values(), ids=HOSTILE)
def test_an_id_that_cannot_be_is_an_offer_error(request_id):
    with pytest.raises(OfferError):
        parse_pairing(request_id)


PIECES = ["___prefill_addr_", "___decode_addr_", "10.0.0.1", ":", "21001", "_", "-0", "-01234567"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join))
def test_whatever_an_id_is_it_is_a_pairing_none_or_an_offer_error(request_id):
    try:
        pairing = parse_pairing(request_id)
    except OfferError:
        return
    if pairing is not None:  # what goes over the wire must be what the wire allows
        assert 0 < len(pairing.name) <= 1024
        for address in pairing[:2]:
            encoded = msgspec.msgpack.encode(address)
            assert msgspec.msgpack.decode(encoded, type=Address) == address


# -- the contract ----------------------------------------------------------------------------


def contract(role, here=None, secret=None):
    made = P2pProtocol(EngineInfo("engine", secret, 30.0, role), P2pNcclConfig(), None)
    made.addresses_known([here or {"kv_producer": P, "kv_consumer": D, "kv_both": P}[role]])
    return made


def request(request_id, params=None, tokens=40):
    return SimpleNamespace(
        request_id=request_id,
        kv_transfer_params=params,
        prompt_token_ids=list(range(tokens)),
        num_prompt_tokens=tokens,
        prompt_embeds=None,
        lora_request=None,
        mm_features=None,
        cache_salt=None,
    )


AT_P = request(f"cmpl-{routers()}-0-01234567")
AT_D = request(f"cmpl-{routers()}-0-fedcba98")


def test_prefill_lends_under_the_name_that_decode_asks_for():
    prefill, decode = contract("kv_producer"), contract("kv_consumer")
    assert (prefill.lends(AT_P), prefill.loads(AT_P)) == (True, False)
    assert (decode.lends(AT_D), decode.loads(AT_D)) == (False, True)
    offer = decode.offer(AT_D, Prompt(AT_D))
    assert offer.source == Source((P,), prefill.name(AT_P), None, 30.0)
    assert offer.tokens == 40


def test_a_prompt_whose_end_is_computed_at_decode_is_offered_without_it():
    assert contract("kv_consumer").offer(AT_D, Prompt(AT_D, backoff=1)).tokens == 39


@pytest.mark.parametrize(
    ("here", "lends", "loads"), [(P, True, False), (D, False, True), (Address("x", 1), 0, 0)]
)
def test_an_engine_of_both_kinds_does_what_is_at_its_own_address(here, lends, loads):
    both = contract("kv_both", here)
    assert (both.lends(AT_P), both.loads(AT_P)) == (lends, loads)


@pytest.mark.parametrize("role", ["kv_both", "kv_consumer"])
def test_an_engine_that_is_both_of_a_pair_asks_nobody(role):
    us = contract(role, here=P)
    same = request(f"cmpl-{routers(decode=P)}-0-01234567")
    assert not us.lends(same)
    if us.loads(same):
        with pytest.raises(OfferError, match="this very engine"):
            us.offer(same, Prompt(same))


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}])
def test_ids_count_where_no_params_say_anything(params):
    decode = contract("kv_consumer")
    assert decode.loads(request(AT_D.request_id, params))


def test_params_go_before_ids():
    """vLLM's router sends both, and without service discovery ids name HTTP ports."""
    prefill, decode = contract("kv_producer"), contract("kv_consumer")
    asked = request(AT_P.request_id, {"do_remote_decode": True})
    assert prefill.lends(asked)
    assert prefill.name(asked) == ""
    assert not decode.loads(request(AT_D.request_id, {"do_remote_decode": True}))
    params = {
        "do_remote_prefill": True,
        "remote_engine_id": "P",
        "remote_request_id": "cmpl-1",
        "remote_host": "10.0.0.7",
        "remote_port": 5600,
        "remote_block_ids": [[1, 2]],
    }
    at_decode = request(AT_D.request_id, params)
    assert decode.loads(at_decode)
    assert decode.offer(at_decode, Prompt(at_decode)).source.shards == (Address("10.0.0.7", 5600),)
    assert decode.unused(at_decode).source.request_id == "cmpl-1"


def test_with_a_secret_ids_neither_hand_over_nor_fetch():
    decode = contract("kv_consumer", secret=SECRET)
    assert not contract("kv_producer", secret=SECRET).lends(AT_P)
    assert decode.loads(AT_D)
    for ask in (lambda: decode.offer(AT_D, Prompt(AT_D)), lambda: decode.unused(AT_D)):
        with pytest.raises(OfferError, match="not signed for, which auth_secret_file requires"):
            ask()
    assert decode.unusable(AT_D) is None


def test_a_request_that_will_never_run_lets_its_lease_go():
    offer = contract("kv_consumer").unused(AT_D)
    assert offer.source.shards == (P,)
    assert (offer.tokens, offer.digest) == (0, b"")


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
@pytest.mark.parametrize("request_id", [*HOSTILE.values(), "cmpl-1"], ids=[*HOSTILE, "plain"])
def test_a_hostile_id_is_prefilled_locally(role, request_id):
    us, asked = contract(role), request(request_id)
    assert not us.lends(asked)
    assert us.name(asked) == ""
    assert us.loads(asked) == (role == "kv_consumer" and request_id != "cmpl-1")
    with pytest.raises(OfferError):
        us.offer(asked, Prompt(asked))
    assert us.unusable(asked) is None


# -- pings -----------------------------------------------------------------------------------


@pytest.fixture
def router():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        yield socket, f"127.0.0.1:{port}"


def heard(socket):
    assert socket.poll(60_000), "no ping within 60 s"
    identity, message = socket.recv_multipart()
    return identity, msgspec.msgpack.decode(message)


HTTP = Address("10.0.0.1", 20003)


@pytest.mark.parametrize(
    ("role", "types"), [("kv_producer", "P"), ("kv_consumer", "D"), ("kv_both", "PD")]
)
def test_a_router_hears_again_and_again_where_an_engine_is(router, role, types):
    socket, at = router
    pings = Pings(at, role, HTTP, P, every_s=0.01)
    try:
        for kind in itertools.islice(itertools.cycle(types), 5):
            assert heard(socket) == (
                b"10.0.0.1:21001",
                {"type": kind, "http_address": "10.0.0.1:20003", "zmq_address": "10.0.0.1:21001"},
            )
    finally:
        pings.close()


def test_an_address_of_ip_version_6_can_be_part_of_a_url(router):
    socket, at = router
    pings = Pings(at, "kv_producer", Address("::1", 8000), Address("::1", 21001))
    try:
        assert heard(socket)[1]["http_address"] == "[::1]:8000"
    finally:
        pings.close()


def test_nothing_is_left_of_pings_that_were_closed(router):
    socket, at = router
    pings = Pings(at, "kv_producer", HTTP, P, every_s=0.01)
    heard(socket)
    pings.close()
    pings.close()
    while socket.poll(20):
        socket.recv_multipart()
    assert not socket.poll(50)
    assert "kvconnect-pings" not in {thread.name for thread in threading.enumerate()}


def test_a_router_that_comes_late_hears_of_the_engine_too():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.unbind(f"tcp://127.0.0.1:{port}")
        pings = Pings(f"127.0.0.1:{port}", "kv_producer", HTTP, P, every_s=0.01)
        try:
            assert not socket.poll(50)
            socket.bind(f"tcp://127.0.0.1:{port}")
            heard(socket)
        finally:
            pings.close()


def test_what_is_no_address_is_a_config_error():
    with pytest.raises(ConfigError, match="proxy_ip and proxy_port say a b:1"):
        Pings("a b:1", "kv_producer", HTTP, P)
