"""What a worker writes of the loads of traced requests."""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from workers import engines

from kvconnect.telemetry.handovers import HandOverTraces
from kvconnect.telemetry.spans import SpanWriter


def test_a_span_names_the_rank_that_read(monkeypatch):
    """It was 0 for every rank: what traces was made before the worker knew which one it is."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with engines(monkeypatch, 0, 3) as (p, d):
        d.worker.traces = HandOverTraces(writer=lambda: SpanWriter(provider))
        d.worker.traces.ordered({"d": {}})
        assert d.fetched("d", p.lend("r", [3], seed=7), [5]) is None
        d.worker.take_stats()
    (whole,) = [one for one in exporter.get_finished_spans() if one.parent is None]
    assert whole.attributes == {"kvconnect.request_id": "d", "kvconnect.rank": 3}
