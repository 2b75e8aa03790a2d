"""Mooncake's bootstrap endpoint and who asks it: found, proved, bounded, and never ended."""

import concurrent.futures
import contextlib
import http.client
import http.server
import json
import socket
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, OfferError
from kvconnect.testing import FakeClock
from kvconnect.vllm.mooncake import resolver as resolver_module
from kvconnect.vllm.mooncake import server as server_module
from kvconnect.vllm.mooncake.allowed import Allowed, Endpoint, parse_endpoint
from kvconnect.vllm.mooncake.client import Client
from kvconnect.vllm.mooncake.directory import (
    MAX_ANSWER_BYTES,
    Directory,
    Registration,
    Sizes,
    engines_in,
    ranks_of,
    registrations,
)
from kvconnect.vllm.mooncake.loop import LoopThread
from kvconnect.vllm.mooncake.proof import CHALLENGE, NONCE, PROOF, prove_answer
from kvconnect.vllm.mooncake.resolver import FAULT_KEPT_S, KEPT_S, Resolver
from kvconnect.vllm.mooncake.server import BootstrapServer

SECRET, OTHER = b"a secret of 16 b", b"another of 16 by"
SIZES = Sizes(tp=2, pp=2)
FOUR = [Address("10.0.0.1", 7000 + rank) for rank in range(4)]
HERE = "127.0.0.1"
PREFILL = Endpoint("p", 1)


def known(engine_id="P", dp_rank=0, addresses=FOUR):
    directory = Directory(SIZES)
    for rank in registrations(engine_id, dp_rank, SIZES.tp, addresses):
        assert directory.register(rank) == ""
    return directory


# -- the directory -------------------------------------------------------------------------


def test_what_was_registered_is_found_in_rank_order():
    entry = engines_in(known().answer())["P"]
    assert ranks_of(entry) == tuple(FOUR)


def test_the_answer_is_in_trees():
    told = json.loads(known("P_dp1", dp_rank=1).answer())
    assert told["1"]["engine_id"] == "P_dp1"
    assert told["1"]["worker_addr"] == {  # tensor-parallel rank, then pipeline rank
        "0": {"0": "tcp://10.0.0.1:7000", "1": "tcp://10.0.0.1:7002"},
        "1": {"0": "tcp://10.0.0.1:7001", "1": "tcp://10.0.0.1:7003"},
    }


def test_ipv6_addresses_come_back():
    (rank,) = registrations("P", 0, 1, [Address("fe80::1", 7)])
    directory = Directory(SIZES)
    assert directory.register(rank) == ""
    assert ranks_of(engines_in(directory.answer())["P"]) == (Address("fe80::1", 7),)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"engine_id": "Q"}, "mismatch"),
        ({"addr": "tcp://10.0.0.1:1"}, "already registered"),
        ({"tp_rank": 2}, "no such rank"),
        ({"pp_rank": 2}, "no such rank"),
        ({"tp_rank": 1, "addr": "udp://10.0.0.1:1"}, "expected tcp"),
        ({"tp_rank": 1, "addr": "tcp://10.0.0.1:x"}, "expected tcp"),
    ],
)
def test_registrations_of_others_are_refused(changed, why):
    directory, first = Directory(SIZES), Registration("P", 0, 0, 0, "tcp://10.0.0.1:7000")
    assert directory.register(first) == ""
    assert directory.register(first) == "", "repeated"
    before = directory.answer()
    assert why in directory.register(msgspec.structs.replace(first, **changed))
    assert directory.answer() == before


@pytest.mark.parametrize("missing", range(4))
def test_an_engine_of_which_a_rank_is_missing_is_not_used(missing):
    directory = Directory(SIZES)
    for place, rank in enumerate(registrations("P", 0, SIZES.tp, FOUR)):
        if place != missing:
            directory.register(rank)
    with pytest.raises(OfferError, match="all ranks"):
        ranks_of(engines_in(directory.answer())["P"])


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.dictionaries(
        st.sampled_from(["0", "1", "-1", "9999", "x", "engine_id", "worker_addr"]), inner
    ) | st.lists(inner),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_answer_is_understood_or_an_offer_error(answer):
    try:
        for entry in engines_in(answer).values():
            assert all(isinstance(one, Address) for one in ranks_of(entry))
    except OfferError:
        pass


# -- which may be asked ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://10.0.0.1:8998", ("10.0.0.1", 8998)),
        ("http://10.0.0.1:8998/", ("10.0.0.1", 8998)),
        ("http://[fd00::1]:8998", ("fd00::1", 8998)),
        ("http://prefill-0.svc", ("prefill-0.svc", 80)),
    ],
)
def test_endpoints_are_read(url, endpoint):
    assert parse_endpoint(url) == endpoint


@pytest.mark.parametrize(
    "url",
    [
        None,
        7,
        "",
        "10.0.0.1:8998",
        "https://10.0.0.1:8998",
        "ftp://10.0.0.1",
        "file:///etc/passwd",
        "http://",
        "http://user@10.0.0.1:8998",
        "http://user:pass@10.0.0.1:8998",
        "http://10.0.0.1:8998/latest",
        "http://10.0.0.1:8998?x",
        "http://10.0.0.1:8998#x",
        "http://10.0.0.1:99999",
        "http://10.0.0.1:0",
        "http://10.0.0.1:x",
        "http://[fd00::1%25eth0]:1",
        "http://[::1",
        "http://a b:1",
        "http://a\r\nHost: b:1",
        "http://a\\b:1",
        "http://ümlaut:1",
        "http://" + "a" * 300,
    ],
)
def test_anything_else_is_refused(url):
    with pytest.raises(OfferError):
        parse_endpoint(url)


@given(st.text(max_size=40).map(lambda text: f"http://{text}") | st.text(max_size=40))
def test_no_text_raises_anything_else(url):
    with contextlib.suppress(OfferError):
        assert parse_endpoint(url).host


@pytest.mark.parametrize(
    ("entries", "host", "resolved", "is_permitted"),
    [
        (None, "h", "127.0.0.1", True),
        (None, "h", "::1", True),
        (None, "h", "10.1.2.3", True),
        (None, "h", "192.168.0.1", True),
        (None, "h", "100.64.0.1", True),
        (None, "h", "fd00::1", True),
        (None, "h", "8.8.8.8", False),
        (None, "h", "2001:4860:4860::8888", False),
        (None, "h", "169.254.169.254", False),  # where clouds keep credentials
        (None, "h", "::ffff:169.254.169.254", False),
        (None, "h", "fe80::1", False),
        (None, "h", "fe80::1%eth0", False),
        (None, "h", "0.0.0.0", False),
        (None, "h", "224.0.0.1", False),
        (None, "h", "255.255.255.255", False),
        (None, "h", "nonsense", False),
        (["10.0.0.0/8"], "h", "10.1.2.3", True),
        (["10.0.0.0/8"], "h", "::ffff:10.1.2.3", True),
        (["10.0.0.0/8"], "h", "127.0.0.1", False),
        (["10.0.0.0/8"], "h", "11.0.0.1", False),
        (["10.0.0.7"], "h", "10.0.0.7", True),
        (["10.0.0.7"], "h", "10.0.0.8", False),
        (["8.8.8.8"], "h", "8.8.8.8", True),
        (["Prefill-0"], "prefill-0", "8.8.8.8", True),
        (["prefill-0"], "prefill-1", "10.0.0.1", False),
        ([], "h", "127.0.0.1", False),
    ],
)
def test_what_may_be_connected_to(entries, host, resolved, is_permitted):
    assert Allowed(entries).permits(host, resolved) is is_permitted


@pytest.mark.parametrize("entry", ["http://10.0.0.1", "10.0.0.1:8998", "10.0.0.0/99", "", "a b"])
def test_what_the_option_cannot_hold(entry):
    with pytest.raises(ConfigError, match="allowed_bootstrap_addresses"):
        Allowed([entry])


# -- over HTTP ------------------------------------------------------------------------------


@pytest.fixture
def thread():
    thread = LoopThread("test")
    yield thread
    thread.close()


@pytest.fixture
def serve():
    servers = []

    def serve(directory=None, secret=None, allowed=None):
        server = BootstrapServer(0, directory or known(), Allowed(allowed), secret)
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.close()


def request(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(HERE, server.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def query(thread, server, secret=None, allowed=None, host=HERE, timeout_s=60.0):
    client = Client(Allowed(allowed), secret, timeout_s)
    port = server if isinstance(server, int) else server.port
    return thread.submit(client.query(Endpoint(host, port))).result(10)


@pytest.mark.parametrize("host", [HERE, "localhost", "::1"])
def test_decode_finds_the_ranks(thread, serve, host):
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    answer = query(thread, serve(), host=host)
    assert ranks_of(engines_in(answer)["P"]) == tuple(FOUR)


def test_routers_need_no_secret(serve):
    status, answer, _ = request(serve(secret=SECRET), "GET", "/query")
    assert status == 200
    assert json.loads(answer)["0"]["engine_id"] == "P"


def test_an_answer_is_proved_to_who_asks_for_it(thread, serve):
    server = serve(secret=SECRET)
    assert query(thread, server, SECRET) == known().answer()
    with pytest.raises(OfferError, match="auth_secret_file"):
        query(thread, server, OTHER)
    with pytest.raises(OfferError, match="auth_secret_file"):
        query(thread, serve(secret=None), SECRET)


def test_a_proof_is_of_one_nonce_and_one_answer(serve):
    server = serve(secret=SECRET)
    nonce = "0" * 32
    _, answer, headers = request(server, "GET", "/query", headers={NONCE: nonce})
    assert headers[PROOF] == prove_answer(SECRET, nonce, answer)
    assert headers[PROOF] != prove_answer(SECRET, "1" * 32, answer)
    _, _, headers = request(server, "GET", "/query", headers={NONCE: "text of my choice|" * 2})
    assert PROOF not in headers


def test_engines_of_a_group_register(thread, serve):
    for secret in (None, SECRET):
        server = serve(secret=secret)
        client = Client(Allowed(None), secret, 5.0)
        ranks = registrations("P_dp1", 1, SIZES.tp, FOUR)
        thread.submit(client.register(Endpoint(HERE, server.port), ranks)).result(5)
        assert set(engines_in(query(thread, server))) == {"P", "P_dp1"}


def test_who_has_no_secret_cannot_register(thread, serve):
    server = serve(secret=SECRET)
    for client in (Client(Allowed(None), None, 5.0), Client(Allowed(None), OTHER, 5.0)):
        work = client.register(
            Endpoint(HERE, server.port), registrations("P_dp1", 1, SIZES.tp, FOUR)
        )
        with pytest.raises(ConfigError, match="401"):
            thread.submit(work).result(5)
    assert set(engines_in(query(thread, server))) == {"P"}


def test_without_a_secret_only_permitted_addresses_register(thread, serve):
    server = serve(allowed=["10.0.0.0/8"])
    client = Client(Allowed(None), None, 5.0)
    ranks = registrations("P_dp1", 1, SIZES.tp, FOUR)
    with pytest.raises(ConfigError, match="403"):
        thread.submit(client.register(Endpoint(HERE, server.port), ranks)).result(5)


def test_a_registration_that_contradicts_is_a_startup_error(thread, serve):
    client = Client(Allowed(None), None, 5.0)
    ranks = registrations("another", 0, SIZES.tp, FOUR)
    with pytest.raises(ConfigError, match="Engine ID mismatch"):
        thread.submit(client.register(Endpoint(HERE, serve().port), ranks)).result(5)


@pytest.mark.slow
def test_an_endpoint_that_is_not_up_yet_is_waited_for_and_not_for_ever(thread):
    client = Client(Allowed(None), None, 0.6)
    ranks = registrations("P", 0, SIZES.tp, FOUR)
    with pytest.raises(ConfigError, match=r"in 0\.6 s: .*cannot be asked"):
        thread.submit(client.register(Endpoint(HERE, free_port()), ranks)).result(5)


def test_a_port_that_is_taken_is_a_startup_error(serve):
    server = serve()
    with pytest.raises(ConfigError, match="VLLM_MOONCAKE_BOOTSTRAP_PORT"):
        BootstrapServer(server.port, known(), Allowed(None), None)


def test_it_can_be_closed_twice_and_its_port_is_free_again(serve):
    server = serve()
    server.close(), server.close()
    again = BootstrapServer(server.port, known(), Allowed(None), None)
    again.close()


HOSTILE = [
    b"\x00" * 2000,
    b"GET /query HTTP/9.9\r\n\r\n",
    b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /register HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab",
    b"POST /register HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"DELETE /query HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /query HTTP/1.1\r\nX-KVConnect-Nonce: \xff\xfe\r\n\r\n",
]


@pytest.mark.parametrize("sent", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_arrives_it_goes_on_serving(serve, sent):
    server = serve(secret=SECRET)
    with socket.create_connection((HERE, server.port), timeout=60) as link:
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        link.settimeout(5)
        try:
            while link.recv(65536):
                pass
        except ConnectionError:
            pass
    assert request(server, "GET", "/query")[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 422),
        (b"[" * 5000, 422),
        (b'{"engine_id": "P"}', 422),
        (b'{"engine_id":"P","dp_rank":true,"tp_rank":0,"pp_rank":0,"addr":"x"}', 422),
        (b'{"engine_id":"P","dp_rank":-1,"tp_rank":0,"pp_rank":0,"addr":"x"}', 422),
        (b'{"engine_id":"P","dp_rank":0,"tp_rank":0,"pp_rank":0,"addr":"\xff"}', 422),
        (b'{"engine_id":"Q","dp_rank":0,"tp_rank":0,"pp_rank":0,"addr":"tcp://a:1"}', 400),
        (b"x" * 70_000, 413),
    ],
)
def test_bad_registrations_change_nothing(serve, body, status):
    server = serve()
    before = request(server, "GET", "/query")[1]
    assert request(server, "POST", "/register", body)[0] == status
    assert request(server, "GET", "/query")[1] == before


def test_other_paths_are_not_found(serve):
    server = serve()
    assert request(server, "GET", "/")[0] == 404
    assert request(server, "POST", "/query")[0] == 404
    assert request(server, "GET", "/register")[0] == 404


@pytest.mark.slow
def test_connections_are_bounded_and_the_oldest_goes_first(serve, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 4)
    server = serve()
    idle = [socket.create_connection((HERE, server.port), timeout=60) for _ in range(8)]
    try:
        assert request(server, "GET", "/query")[0] == 200
        assert idle[0].recv(1) == b"", "the first was closed"
        idle[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            idle[-1].recv(1)
    finally:
        for link in idle:
            link.close()


def test_a_registration_is_challenged_alike_for_the_endpoints_whole_life(serve):
    server = serve(secret=SECRET)
    body = msgspec.json.encode(registrations("P_dp1", 1, SIZES.tp, FOUR)[0])
    first = request(server, "POST", "/register", body)[2][CHALLENGE]
    assert request(server, "POST", "/register", body)[2][CHALLENGE] == first
    assert request(serve(secret=SECRET), "POST", "/register", body)[2][CHALLENGE] != first


# -- asking an endpoint that is none ---------------------------------------------------------


class Liar(http.server.BaseHTTPRequestHandler):
    """Answers by the port's mode."""

    def do_GET(self):
        asked.append(self.path)
        mode = self.server.mode
        if mode == "redirects":
            self.send_response(302)
            self.send_header("Location", f"http://{HERE}:{self.server.elsewhere}/query")
            self.end_headers()
        elif mode == "fails":
            self.send_error(500)
        elif mode == "sends too much":
            self.send_response(200)
            self.end_headers()
            piece = b" " * (1 << 16)
            try:
                for _ in range(4 * MAX_ANSWER_BYTES // len(piece)):
                    self.wfile.write(piece)
            except OSError:
                asked.append("cut off")
        elif mode == "bomb":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"\x1f\x8bxx")
        elif mode == "no HTTP":
            self.wfile.write(b"220 mail ready\r\n")
        elif mode == "silent":
            released.wait(5)

    def log_message(self, *_):
        """Not to the tests' output."""


asked: list[str] = []
released = threading.Event()


@pytest.fixture
def lie():
    servers = []
    asked.clear()
    released.clear()

    def lie(mode, elsewhere=0):
        server = http.server.ThreadingHTTPServer((HERE, 0), Liar)
        server.mode, server.elsewhere = mode, elsewhere
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield lie
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("fails", "answered 500"),
        ("sends too much", "too many bytes"),
        ("no HTTP", "cannot be asked"),
        ("silent", "did not answer in 0.2 s"),
    ],
)
def test_whoever_lies_is_an_offer_error(thread, lie, mode, reason):
    with pytest.raises(OfferError, match=reason):
        query(thread, lie(mode), timeout_s=0.2 if mode == "silent" else 60.0)


def test_compressed_answers_are_not_unpacked(thread, lie):
    with pytest.raises(OfferError, match="malformed"):
        engines_in(query(thread, lie("bomb")))


def test_redirects_are_not_followed(thread, lie, serve):
    with pytest.raises(OfferError, match="answered 302"):
        query(thread, lie("redirects", elsewhere=lie("fails")))
    assert asked == ["/query"]


def test_nobody_listens_there(thread):
    with pytest.raises(OfferError, match="cannot be asked"):
        query(thread, free_port())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (HERE, ["10.0.0.0/8"]),
        ("localhost", ["10.0.0.0/8"]),
        ("127.1", ["10.0.0.0/8"]),  # what else libc takes for an address
        ("2130706433", ["10.0.0.0/8"]),
        ("0x7f000001", ["10.0.0.0/8"]),
        ("0", None),
        (HERE, []),
    ],
)
def test_what_is_not_permitted_is_never_connected_to(thread, lie, host, allowed):
    with pytest.raises(OfferError, match="allowed_bootstrap_addresses"):
        query(thread, lie("fails"), host=host, allowed=allowed)
    assert asked == []


@pytest.mark.parametrize("host", ["a" * 70, "-", "..", "."])
def test_names_that_are_none_are_an_offer_error(thread, host):
    with pytest.raises(OfferError):
        query(thread, 1, host=host)


def free_port():
    with socket.create_server((HERE, 0)) as taken:
        return taken.getsockname()[1]


# -- without waiting -------------------------------------------------------------------------


class Asked:
    """Stands for the client: answers when the test says so."""

    def __init__(self):
        self.clock = FakeClock()
        self.futures = []
        self.resolver = Resolver(self.ask, self.clock)

    def ask(self, endpoint):
        self.futures.append((endpoint, concurrent.futures.Future()))
        return self.futures[-1][1]

    def find(self, endpoint=PREFILL, engine_id="P"):
        return self.resolver.find(endpoint, engine_id)

    def answer(self, answer=None):
        if isinstance(answer, OfferError):
            self.futures[-1][1].set_exception(answer)
        else:
            self.futures[-1][1].set_result(known().answer() if answer is None else answer)


@pytest.fixture
def rig():
    return Asked()


def test_it_asks_once_and_answers_many(rig):
    assert rig.find() is None
    assert rig.find() is None
    assert len(rig.futures) == 1
    rig.answer()
    assert rig.find() == tuple(FOUR)
    assert rig.find() == tuple(FOUR)
    assert len(rig.futures) == 1


def test_answers_grow_old(rig):
    rig.find(), rig.answer(), rig.find()
    rig.clock.advance(KEPT_S)
    assert rig.find() is None
    moved = [Address("10.0.0.2", 1) for _ in range(4)]
    rig.answer(known(addresses=moved).answer())
    assert rig.find() == tuple(moved)


def test_what_went_wrong_is_told_and_asked_again_a_little_later(rig):
    rig.find(), rig.answer(OfferError("nobody there"))
    for _ in range(2):
        with pytest.raises(OfferError, match="nobody there"):
            rig.find()
    assert len(rig.futures) == 1
    rig.clock.advance(FAULT_KEPT_S)
    assert rig.find() is None
    rig.answer()
    assert rig.find() == tuple(FOUR)


def test_an_engine_that_is_not_known_may_have_been_started_since(rig):
    rig.find(), rig.answer(), rig.find()
    with pytest.raises(OfferError, match="knows no engine Q"):
        rig.find(engine_id="Q")
    rig.clock.advance(FAULT_KEPT_S)
    assert rig.find() == tuple(FOUR), "the one that is known is still known"
    assert rig.find(engine_id="Q") is None
    rig.answer(known("Q").answer())
    assert rig.find(engine_id="Q") == tuple(FOUR)


def test_a_malformed_answer_is_an_offer_error(rig):
    rig.find(), rig.answer(b"{")
    with pytest.raises(OfferError, match="malformed"):
        rig.find()


def test_what_is_asked_and_kept_is_bounded(rig, monkeypatch):
    monkeypatch.setattr(resolver_module, "MAX_ASKED", 3)
    monkeypatch.setattr(resolver_module, "MAX_KEPT", 2)
    for port in range(1, 4):
        assert rig.find(Endpoint("p", port)) is None
    with pytest.raises(OfferError, match="3 bootstrap endpoints"):
        rig.find(Endpoint("p", 4))
    for _, future in rig.futures:
        future.set_result(known().answer())
    assert rig.find(Endpoint("p", 3)) == tuple(FOUR)
    assert rig.find(Endpoint("p", 1)) is None, "forgotten: two others came after it"
