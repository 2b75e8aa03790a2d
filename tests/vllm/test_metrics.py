"""Our stats as vLLM's API server exports them, on real Prometheus metrics."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvconnect.costs import Costs
from kvconnect.stats import Stats
from kvconnect.vllm.metrics import KvConnectPromMetrics, KvConnectStats

MIB = 1 << 20


class Exported:
    """Metrics of two engines behind one API server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        types = {kind: self._registered(kind) for kind in (Gauge, Counter, Histogram)}
        engines = {0: ["m", "0"], 1: ["m", "1"]}
        config = SimpleNamespace(kv_transfer_config=None)
        self.metrics = KvConnectPromMetrics(config, types, ["model_name", "engine"], engines)

    def _registered(self, kind):
        def make(**options):
            return kind(registry=self.registry, **options)

        return make

    def value(self, name, engine="0"):
        return self.registry.get_sample_value(name, {"model_name": "m", "engine": engine})


def taken(staged, count=4):
    """Stats of a mover that made some transfers with one peer."""
    costs, stats = Costs(), Stats()
    for _ in range(count):
        costs.measured(staged, 1000, 100 * MIB, 0.1)
        stats.path(staged, costs)
    return stats.take()


def test_averages_are_gauges_in_people_s_units():
    exported = Exported()
    exported.metrics.observe(taken(staged=True), 0)
    exported.metrics.observe(taken(staged=False), 1)
    rate = exported.value("vllm:kvconnect_staged_bytes_per_second")
    assert rate == pytest.approx(1000 * MIB)
    assert exported.value("vllm:kvconnect_num_staged_transfers_total") == 4
    assert exported.value("vllm:kvconnect_descriptor_seconds", "1") == pytest.approx(1e-4)
    assert exported.value("vllm:kvconnect_num_staged_transfers_total", "1") == 0


def test_an_average_of_nothing_is_not_set():
    """All of a direct transfer may be put down to its descriptors: its bytes then cost 0."""
    exported = Exported()
    exported.metrics.observe(taken(staged=False) | {"direct_seconds_per_byte": [0.0]})
    assert exported.value("vllm:kvconnect_direct_bytes_per_second") == 0


def test_no_label_names_a_peer():
    """Peers come and go, and Prometheus never forgets one."""
    exported = Exported()
    exported.metrics.observe(taken(staged=True))
    labels = {
        name
        for family in exported.registry.collect()
        for sample in family.samples
        for name in sample.labels
    }
    assert labels == {"model_name", "engine", "le"}


def test_stats_of_another_version_are_passed_over():
    exported = Exported()
    exported.metrics.observe({"from the future": [1.0]})
    both = KvConnectStats(data=taken(staged=True)).aggregate(KvConnectStats(data={"more": [1.0]}))
    assert both.reduce()["Num staged transfers"] == 4
    exported.metrics.observe(both.data)
