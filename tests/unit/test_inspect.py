"""``kvconnect inspect`` on real movers and real channels, over loopback."""

import http.server
import json
import threading
import time

import pytest
from kit.running import KNOWN, running_engines
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect.control.channel import ZmqChannel
from kvconnect.lease import Terms
from kvconnect.orders import Fetch, Grant, Source
from kvconnect_bench.caches import Model

HOST = "127.0.0.1"
PATIENCE_S = 60.0
SECRET = {"KVCONNECT_AUTH_SECRET": KNOWN.decode()}
EXPORTED = """\
# HELP vllm:kvconnect_staged_bytes_per_second Rate of staged reads
vllm:kvconnect_staged_bytes_per_second{engine="0",model_name="m"} 2.5e+09
vllm:kvconnect_descriptor_seconds{engine="0",model_name="m"} 1.9e-06
vllm:kvconnect_gather_bytes_per_second{engine="0",model_name="m"} 0.0
vllm:nixl_xfer_time_seconds_bucket{engine="0",le="0.5",model_name="m"} 3.0
vllm:nixl_xfer_time_seconds_count{engine="0",model_name="m"} 7.0
vllm:num_requests_running{engine="0",model_name="m"} 1.0
"""


@pytest.fixture
def start():
    with running_engines() as make:
        yield make


def inspect(*arguments, secret=SECRET):
    return CliRunner().invoke(main, ["inspect", *arguments], env={"COLUMNS": "200"} | secret)


def told(*arguments):
    done = inspect(*arguments, "--json")
    assert done.stdout, done.output
    return done.exit_code, json.loads(done.stdout)


def test_an_engine_says_who_it_is(start):
    p = start(tp_size=2)
    shown = inspect(p.address)
    assert shown.exit_code == 0, shown.output
    for text in ("2 ranks", "vllm 0.32.0", "loopback", "direct and staged", "2..3 of 4", "BHNC"):
        assert text in shown.output
    code, found = told(p.address)
    (engine,) = found["engines"]
    assert code == 0 and engine["fingerprint"] == {"model": "m", "revision": "None"}
    assert [r["address"] for r in engine["ranks"]] == [str(m.address) for m in p.movers]
    assert [r["incarnation"] for r in engine["ranks"]] == [m.incarnation for m in p.movers]
    (layers,) = engine["ranks"][1]["layers"]
    assert layers["count"] == 3 and layers["heads"] == "2..3 of 4"
    assert (layers["block_tokens"], layers["blocks"], layers["dtype"]) == (4, 8, "bfloat16")
    assert layers["parts"] == ["k 4", "v 4"] and layers["last"] == "model.layers.2.attn"


def test_tiles_and_layers_that_differ_are_told(start):
    layouts = {}
    for layout in ("vec", "amx", "BLNHC"):
        (e,) = told(start(layout=layout).address)[1]["engines"]
        layouts[layout] = [layers["layout"] for layers in e["ranks"][0]["layers"]]
    assert layouts["vec"] == ["BHCN + BHNC"]
    assert "in tiles of" in layouts["amx"][0]
    assert layouts["BLNHC"] == ["BNHC"]


def test_two_engines_that_are_alike_read_directly(start):
    code, found = told(start(tp_size=2).address, start().address)
    assert code == 0
    assert found["pair"]["direct"]["works"] and found["pair"]["staged"]["works"]
    assert "3 rows a block, of 128 bytes" in found["pair"]["direct"]["detail"]
    assert len(found["pair"]["reads"]) == 2


def test_what_only_staging_can_map_is_staged(start):
    p, d = start(), start(Model(3, 4, 16, 8, dtype="fp8_e4m3"))
    code, found = told(p.address, d.address)
    assert code == 0
    assert "blocks of 4 and 16 tokens" in found["pair"]["direct"]["why_not"]
    assert found["pair"]["staged"]["works"]


def test_a_pair_that_cannot_work_is_an_error_with_the_remedy(start):
    p, d = start(), start(Model(3, 4, 16, 8), staging=False)
    shown = inspect(p.address, d.address)
    assert shown.exit_code == 1
    assert "does not stage; set its transfer_mode" in shown.output
    shown = inspect(p.address, start(Model(2, 8, 4, 8)).address)
    assert shown.exit_code == 1
    assert "do both engines run the same model?" in shown.output


def test_another_model_is_refused_as_a_peer_would_be(start):
    other = {"model": "[red]other[/red]", "revision": "None"}
    code, found = told(start().address, start(fingerprint=other).address)
    assert code == 1 and found["pair"]["direct"]["works"]
    assert found["pair"]["differences"] == ["model: 'm' and '[red]other[/red]'"]
    shown = inspect(start().address, start(fingerprint=other).address)
    assert "'[red]other[/red]'" in shown.output, "what a peer says is never markup"


def test_secrets_are_needed_and_named(start, tmp_path):
    p = start(secret=b"a secret of 16 bytes")
    for name, text in (("right", "a secret of 16 bytes"), ("wrong", "another of 16 bytes")):
        (tmp_path / name).write_text(text)
    assert inspect(p.address, "--secret", str(tmp_path / "right")).exit_code == 0
    for arguments, why in (
        ([], "and we have none"),
        (["--secret", str(tmp_path / "wrong")], "another secret"),
    ):
        shown = inspect(p.address, *arguments, secret={})
        assert shown.exit_code == 1 and why in shown.output


def test_an_engine_without_a_secret_tells_a_stranger_nothing(start):
    p = start(secret=None)
    for secret, why in (({}, "tells a stranger nothing"), (SECRET, "has no auth_secret_file")):
        shown = inspect(p.address, secret=secret)
        assert shown.exit_code == 1 and why in shown.output


def test_nobody_there_is_said_in_time():
    channel = ZmqChannel(HOST, 0)
    address = str(channel.key_address)
    channel.close()
    started = time.monotonic()
    shown = inspect(address, "--timeout", "0.2")
    assert shown.exit_code == 1 and "is the engine up" in shown.output
    assert time.monotonic() - started < PATIENCE_S


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:70000", "host:http"])
def test_what_is_no_address_is_said(text):
    shown = inspect(text)
    assert shown.exit_code == 2 and "expected HOST:PORT" in shown.output


def test_an_inspected_engine_goes_on_as_before(start):
    p, d = start(), start()
    for _ in range(5):
        assert told(p.address, d.address)[0] == 0
    (cache,), (target,) = p.caches, d.caches
    cache.fill((3, 1), 7)
    terms = Terms("r", "g", ((3, 1),), 8, b"d", 30.0)
    p.movers[0].put([Grant(terms)])
    shard = p.movers[0].address
    blocks = ((0, 5), (1, 2))
    d.movers[0].put([Fetch("r", Source((shard,), "r", "g", 30.0), (blocks,), 8, b"d")])
    received, sent, end = set(), set(), time.monotonic() + PATIENCE_S
    while not (received and sent):
        assert time.monotonic() < end
        outcome = d.movers[0].take()
        assert not outcome.failed
        received |= outcome.received
        sent |= p.movers[0].take().sent
    assert target.holds_fill(blocks, 7)


@pytest.fixture
def metrics_url():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(EXPORTED.encode())

        def log_message(self, *_):
            """Quiet."""

    server = http.server.ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://{HOST}:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("end", ["", "/", "/metrics"])
def test_running_averages_come_from_the_api_server(metrics_url, end):
    shown = inspect("--metrics", metrics_url + end)
    assert shown.exit_code == 0, shown.output
    assert "engine 0  kvconnect_staged_bytes_per_second = 2.50 GB/s" in shown.output
    assert "kvconnect_descriptor_seconds = 1.90 µs" in shown.output
    assert "kvconnect_gather_bytes_per_second = not measured" in shown.output
    assert "bucket" not in shown.output and "num_requests" not in shown.output
    found = told("--metrics", metrics_url)[1]["metrics"][metrics_url]["0"]
    assert found["vllm:nixl_xfer_time_seconds_count"] == 7.0


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "http://127.0.0.1:1"])
def test_metrics_that_cannot_be_read_are_said(url):
    shown = inspect("--metrics", url, "--timeout", "1")
    assert shown.exit_code == 1 and ("no URL" in shown.output or "cannot be read" in shown.output)
