"""One trace for each request: the proxy's spans, and decode's of the hand-over."""

import logging

import pytest
from kit.spans import SpanRig

from kvconnect.proxy.operators.traces import RequestTraces
from kvconnect.proxy.requests.life import Journal
from kvconnect.stats import PeerRead
from kvconnect.telemetry.handovers import MAX_OPEN, HandOverTraces

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def rig():
    return SpanRig()


def test_a_hand_over_is_waiting_reading_and_verifying(rig):
    traces = rig.handovers()
    traces.ordered({"r": HEADERS})
    traces.read(PeerRead("r", "staged", "10.0.0.1:7", 10**9, 51.0, 53.0))
    traces.read(PeerRead("another", "staged", "10.0.0.1:7", 10**9, 40.0, 41.0))
    rig.now = 55.0
    traces.write(3)
    assert not rig.spans, "it has not ended"
    traces.ended({"r": 54.0, "another": 54.0}, {})
    traces.write(3)
    times = {name: told[:2] for name, told in rig.spans.items()}
    assert times == {
        "kvconnect.handover": (1050.0, 1054.0),
        "kvconnect.wait": (1050.0, 1051.0),
        "kvconnect.transfer": (1051.0, 1053.0),
        "kvconnect.verify": (1053.0, 1054.0),
    }
    whole = rig.spans["kvconnect.handover"][2]
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.attributes == {"kvconnect.request_id": "r", "kvconnect.rank": 3}
    assert whole.status.is_unset
    for name in ("wait", "transfer", "verify"):
        assert rig.spans[f"kvconnect.{name}"][2].parent.span_id == whole.context.span_id
    about = rig.spans["kvconnect.transfer"][2].attributes
    assert about["kvconnect.path"] == "staged"
    assert about["kvconnect.bytes_per_second"] == 0.5e9
    traces.write(3)
    assert len(rig.exporter.get_finished_spans()) == 4


def test_a_load_that_failed_says_why(rig):
    traces = rig.handovers()
    traces.ordered({"r": HEADERS})
    rig.now = 55.0
    traces.ended({"r": 52.0}, {"r": "the lease is over"})
    traces.write(3)
    assert rig.spans.keys() == {"kvconnect.handover", "kvconnect.wait"}
    assert rig.spans["kvconnect.handover"][2].status.description == "the lease is over"


def test_what_never_ends_is_forgotten(rig):
    traces = rig.handovers()
    for number in range(MAX_OPEN + 10):
        traces.ordered({str(number): HEADERS})
    traces.ended({str(number): rig.now for number in (0, 9, 10)}, {})
    traces.write(3)
    assert rig.spans["kvconnect.handover"][2].attributes["kvconnect.request_id"] == "10"
    assert len(rig.exporter.get_finished_spans()) == 2, "its own, and the wait below it"


def test_an_engine_goes_on_without_a_trace(caplog):
    """The worker's step would raise, and its engine end."""

    def broken():
        raise RuntimeError("no exporter")

    traces = HandOverTraces(writer=broken)
    traces.ordered({"r": HEADERS})
    traces.ended({"r": 1.0}, {})
    with caplog.at_level(logging.ERROR):
        traces.write(3)
    assert "no exporter" in caplog.text


@pytest.mark.parametrize("given", [{}, HEADERS, {"Traceparent": HEADERS["traceparent"]}])
def test_a_request_is_one_trace_of_which_engines_are_told(rig, given):
    journal = Journal(lambda: rig.now)
    RequestTraces(journal, rig.writer)
    with journal.of("id", "/v1/completions", dict(given)) as life:
        (told,) = [value for name, value in life.headers.items() if name.lower() == "traceparent"]
        prefill = life.asked("prefill", "http://p:1")
        rig.now += 2
        life.answered(prefill, 200)
        decode = life.asked("decode", "http://d:1")
        rig.now += 1
        life.answered(decode, 200)
        rig.now += 4
        life.outcome = "ok"
    whole = rig.spans["kvconnect.proxy"][2]
    assert told.startswith(f"00-{whole.context.trace_id:032x}-{whole.context.span_id:016x}-")
    if given:
        assert f"{whole.context.trace_id:032x}" == TRACE
        assert f"{whole.parent.span_id:016x}" == PARENT
    lengths = {name: round(ended - began, 3) for name, (began, ended, _) in rig.spans.items()}
    assert lengths == {"kvconnect.proxy": 7, "kvconnect.prefill": 2, "kvconnect.decode": 5}
    about = rig.spans["kvconnect.decode"][2].attributes
    assert about["kvconnect.first_byte_seconds"] == 1
    assert about["url.full"] == "http://d:1"
    assert whole.status.is_unset


def test_a_request_that_failed_says_so(rig):
    journal = Journal(lambda: rig.now)
    RequestTraces(journal, rig.writer)
    with journal.of("id", "/v1/completions", {}) as life:
        life.outcome, life.cause = "error", "no prefill engine"
        life.asked("prefill", "http://p:1")
    assert rig.spans["kvconnect.proxy"][2].status.description == "no prefill engine"
    assert "http.response.status_code" not in rig.spans["kvconnect.prefill"][2].attributes
