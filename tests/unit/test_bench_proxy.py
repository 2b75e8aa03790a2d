"""The proxy's benchmark: engines that do nothing, clients that count, figures beside a peer's."""

import sys

import pytest

from kvconnect.cli.processes import Fleet
from kvconnect_bench import http_load
from kvconnect_bench.http_load import HttpLoad, request
from kvconnect_bench.proxy import BODY, FLOOR, OURS, RUST, Figures, rows_of


@pytest.mark.slow
def test_requests_are_sent_in_turn_and_counted(tmp_path):
    with Fleet(tmp_path) as fleet:
        server = fleet.start(
            "engines", lambda port: [sys.executable, http_load.__file__, str(port)]
        )
        fleet.wait_up([server], 100)
        port = int(server.url.rsplit(":", 1)[1])
        load = HttpLoad(port, [request(port, BODY), request(port, BODY)])
        rate = load.run(connections=3, seconds=1.0, warm_s=0.0)
        assert load.failed == 0
        assert len(load.latencies_s) == rate > 0
        assert min(load.latencies_s) > 0


def test_figures_are_medians_beside_the_floor_and_the_rust_router():
    measured = {
        (FLOOR, 1): [Figures(100, 1, 2, 10, 0)],
        (RUST, 1): [Figures(50, 2, 3, 20, 0)],
        (OURS, 1): [Figures(n, 3, 5, 40, 1) for n in (10, 40, 25)],
        (FLOOR, 64): [Figures(100, 1, 2, 10, 0)],
    }
    ours = next(row for row in rows_of(measured) if row.router == OURS)
    assert (ours.requests_per_s, ours.added_p50_ms, ours.added_p99_ms) == (25, 2, 3)
    assert (ours.of_rust, ours.cpu_us, ours.failed) == (0.5, 40, 3)
    assert [row.of_rust for row in rows_of(measured) if row.connections == 64] == [None]


def test_messages_are_told_apart_wherever_they_are_cut():
    message = request(80, {"a": 1})
    got = []
    connection = http_load.HttpMessages(lambda _, whole: got.append(whole))
    for byte in range(2 * len(message)):
        connection.data_received((message * 2)[byte : byte + 1])
    assert got == [message, message]
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    connection.data_received(chunked + message)
    assert got[2:] == [chunked, message]
