"""Spans as they were written, and a clock for those who write them."""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvconnect.telemetry.handovers import HandOverTraces
from kvconnect.telemetry.spans import SpanWriter


class SpanRig:
    def __init__(self):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.writer = SpanWriter(provider)
        self.now = 50.0

    def handovers(self):
        return HandOverTraces(lambda: self.now, lambda: self.now + 1000, lambda: self.writer)

    @property
    def spans(self):
        """By name: began and ended, in seconds since 1970, and the span."""
        return {
            span.name: (span.start_time / 1e9, span.end_time / 1e9, span)
            for span in self.exporter.get_finished_spans()
        }
