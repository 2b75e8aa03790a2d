"""One warning for each peer that is read far more slowly than is expected."""

import logging

import pytest

from kvconnect.stats import PeerRead
from kvconnect.telemetry import bandwidth
from kvconnect.telemetry.bandwidth import JUDGED, SIZEABLE_BYTES, BandwidthWatch, raw_copy

GB = 10**9


def read(gb_s, peer="10.0.0.2:5600", nbytes=GB):
    return PeerRead("r", "direct", peer, nbytes, 5.0, 5.0 + nbytes / GB / gb_s)


def watch(expected=None, copy=10.0):
    return BandwidthWatch(expected, lambda: copy, lambda work: work())


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_peer_that_is_slow_is_warned_of_once(caplog):
    one = watch(expected=40.0)
    for _ in range(3 * JUDGED):
        one.read(read(0.5))
    (said,) = warned(caplog)
    assert "peer 10.0.0.2:5600 is read at 0.5 GB/s (direct) where 40 were expected" in said
    assert "UCX_TLS" in said
    assert "kvconnect doctor --peer" in said


def test_each_peer_is_judged_for_itself(caplog):
    one = watch()
    for _ in range(JUDGED):
        one.read(read(0.1, "a:1"))
        one.read(read(0.1, "b:1"))
        one.read(read(0.6, "c:1"))
    assert [said.split()[2] for said in warned(caplog)] == ["a:1", "b:1"]
    assert "at least 0.5 was expected" in warned(caplog)[0]


@pytest.mark.parametrize(("expected", "gb_s"), [(40.0, 20.0), (None, 0.5)])
def test_half_of_what_is_expected_will_do(caplog, expected, gb_s):
    one = watch(expected)
    for _ in range(JUDGED):
        one.read(read(gb_s))
    assert not warned(caplog)


def test_the_fastest_read_counts(caplog):
    """The first one pays for what is set up once, and reads that overlap share the link."""
    one = watch()
    for gb_s in (0.01, 0.01, 3.0, 0.01):
        one.read(read(gb_s))
    assert not warned(caplog)


def test_small_reads_say_nothing(caplog):
    one = watch()
    for _ in range(100):
        one.read(read(0.001, nbytes=SIZEABLE_BYTES - 1))
        one.read(PeerRead("r", "direct", "p", GB, 5.0, 5.0))  # too fast to be measured
    assert not warned(caplog)
    assert one.ceiling == 0


def test_nobody_is_judged_before_the_copy_was_measured(caplog):
    waiting = []
    one = BandwidthWatch(None, lambda: 10.0, waiting.append)
    for _ in range(2 * JUDGED):
        one.read(read(0.1))
    assert not warned(caplog)
    assert one.ceiling == 0
    (measure,) = waiting
    measure()
    one.read(read(0.1))
    assert len(warned(caplog)) == 1
    assert one.ceiling == 10 * GB


def test_what_an_operator_expects_is_the_ceiling():
    assert watch(expected=40.0).ceiling == 40 * GB


def test_so_many_peers_are_remembered_and_no_more(monkeypatch, caplog):
    monkeypatch.setattr(bandwidth, "MAX_PEERS", 5)
    one = watch()

    def warnings_of(number):
        for _ in range(bandwidth.JUDGED):
            one.read(read(0.1, f"p:{number}"))
        return len(warned(caplog))

    assert [warnings_of(number) for number in (0, 1, 2, 3, 4, 0)] == [1, 2, 3, 4, 5, 5]
    assert [warnings_of(number) for number in (5, 4, 0)] == [6, 6, 7], "0 was forgotten for 5"


def test_a_raw_copy_is_measured():
    assert raw_copy() > 0
