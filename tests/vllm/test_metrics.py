"""Our stats as vLLM's API server exports them, on real Prometheus metrics."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector import v1

import kvconnect
from kvconnect.costs import Costs
from kvconnect.proxy.early import READS_EARLY
from kvconnect.stats import OBSERVED, Stats
from kvconnect.vllm.metrics import PEER, Metrics, PeerStats
from kvconnect.vllm.multi.metrics import CHAIN
from kvconnect.vllm.offload.metrics import OFFLOAD, OffloadStats

MIB = 1 << 20
ROOT = Path(kvconnect.__file__).parent


class Exported:
    """Metrics of two engines behind one API server."""

    def __init__(self, table=PEER):
        self.registry = CollectorRegistry()
        types = {kind: self._registered(kind) for kind in (Gauge, Counter, Histogram)}
        engines = {0: ["m", "0"], 1: ["m", "1"]}
        config = SimpleNamespace(kv_transfer_config=None)
        self.metrics = Metrics(table, config, types, ["model_name", "engine"], engines)

    def _registered(self, kind):
        def make(**options):
            return kind(registry=self.registry, **options)

        return make

    def value(self, name, engine="0", **more):
        labels = {"model_name": "m", "engine": engine} | more
        return self.registry.get_sample_value(name, labels)


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
    both = PeerStats(data=taken(staged=True)).aggregate(PeerStats(data={"more": [1.0]}))
    assert both.reduce()["Num staged transfers"] == 4
    exported.metrics.observe(both.data)
    odd = {"transfer_duration": 3, "num_late_reads": [1.0], "num_invalid_params": "many"}
    exported.metrics.observe(odd)
    assert exported.value("vllm:kvconnect_num_late_reads_total") == 0


def test_counts_are_summed_and_times_are_seconds():
    exported = Exported(OFFLOAD)
    both = OffloadStats(data={"load_us": 2_000_000, "chunks_failed": 1})
    more = OffloadStats(data={"load_us": 1, "chunks_failed": 2})
    exported.metrics.observe(both.aggregate(more).data)
    exported.metrics.observe({"chunks_without_room": 4})
    assert exported.value("vllm:kv_offload_load_time_total") == pytest.approx(2.000001)
    assert exported.value("vllm:kvconnect_offload_failed_chunks_total") == 7
    assert exported.value("vllm:kvconnect_offload_chunks_without_room_total") == 4


SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in ROOT.rglob("*.py")
    if path.name != "metrics.py"
}
TABLES = {
    "peer": (PEER, ("mover.py", "stats.py", "consumer/", "producer/", "vllm/scheduler.py")),
    "offload": (OFFLOAD, ("offload/", "vllm/offload/")),
    "chain": (CHAIN, ("chain/", "vllm/multi/")),
}


def names_counted(text):
    """Keys of counts and arguments of `Stats.count` and `average`; what a table of names holds."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Subscript(value=ast.Name(id=owner) | ast.Attribute(attr=owner), slice=key):
                if owner.endswith("counts"):
                    yield key
            case ast.Call(func=ast.Attribute(attr="count" | "average"), args=[key, *_]):
                yield key
            case ast.Call(func=ast.Name(id="Counter"), keywords=found):
                yield from (ast.Constant(keyword.arg) for keyword in found)


def literal(key, text):
    """The names that an expression can be; a table's are those of its values."""
    match key:
        case ast.Constant(value=str(name)):
            return {name}
        case ast.IfExp(body=one, orelse=other):
            return literal(one, text) | literal(other, text)
        case ast.Subscript(value=ast.Name(id=table)):
            for node in ast.walk(ast.parse(text)):
                match node:
                    case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(values=values)):
                        if name == table:
                            return {value.value for value in values}
    return set()


def counted(places):
    found = set()
    for path, text in SOURCES.items():
        if not path.startswith(places):
            continue
        for key in names_counted(text):
            names = literal(key, text)
            tiers = ("host_", "disk_") if path == "offload/cache.py" else ("",)
            found |= {tier + name for name in names for tier in tiers}
    return found


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_counted_is_exported(kind):
    """23 of 45 counts of offloading reached nobody."""
    table, places = TABLES[kind]
    assert counted(places) <= {key for metric in table for key in metric.keys}


NEVER_COUNTED = {
    "num_failed_notifications": "in-tree's, for dashboards: it stays 0, for we send none",
}
HANDED_ON = {*OBSERVED, "num_failed_transfers", "num_failed_handshakes"}  # out of a tuple of names


def test_the_proxy_looks_for_a_metric_of_ours():
    assert READS_EARLY.decode() in {metric.name for metric in PEER}


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_exported_is_counted(kind):
    table, places = TABLES[kind]
    exported = {key for metric in table for key in metric.keys} - NEVER_COUNTED.keys()
    missing = exported - counted(places)
    assert missing <= HANDED_ON
    texts = [text for path, text in SOURCES.items() if path.startswith(places)]
    assert [key for key in missing if not any(f'"{key}"' in text for text in texts)] == []


def test_no_two_metrics_have_a_name():
    names = [(metric.name, metric.labels) for metric in PEER + OFFLOAD + CHAIN]
    assert len(names) == len(set(names))


def test_offloading_has_in_trees_older_names_with_their_label():
    """Dashboards, and vLLM's own integration tests, read them."""
    exported = Exported(OFFLOAD)
    exported.metrics.observe({"load_bytes": 5, "store_bytes": 7, "store_us": 2_000_000})
    name = "vllm:kv_offload_total_bytes_total"
    assert exported.value(name, transfer_type="CPU_to_GPU") == 5
    assert exported.value(name, transfer_type="GPU_to_CPU") == 7
    assert exported.value(name, "1", transfer_type="GPU_to_CPU") == 0
    assert exported.value("vllm:kv_offload_total_time_total", transfer_type="GPU_to_CPU") == 2


CONNECTORS = Path(v1.__file__).parent
NO_SIZES = "ranks report sums over a step, not the size of each operation"
NO_LOOKUPS = "a lookup is one of a dictionary in the scheduler and waits for nobody"
NOT_OURS = {
    "vllm:kv_offload_size": NO_SIZES,
    "vllm:kv_offload_load_size": NO_SIZES,
    "vllm:kv_offload_store_size": NO_SIZES,
    "vllm:kv_offload_lookup_sync_delay_seconds": NO_LOOKUPS,
    "vllm:kv_offload_lookup_async_delay_seconds": NO_LOOKUPS,
    "vllm:kv_offload_config_info": "since 0.33; what was configured is in the log",
    "vllm:mooncake_num_failed_recvs": "all failures are of the reader here: "
    "vllm:nixl_num_failed_transfers",
} | {
    f"vllm:mooncake_{what}": "since 0.33; one table for all transports: vllm:nixl_"
    for what in (
        "bytes_transferred",
        "num_descriptors",
        "num_failed_transfers",
        "num_kv_expired_reqs",
        "xfer_time_seconds",
    )
}


@pytest.mark.parametrize(
    ("files", "table"),
    [
        ("nixl/*.py", PEER),
        ("mooncake/*.py", PEER),
        ("offloading/*.py", OFFLOAD),
    ],
)
def test_every_family_of_vllms_own_connector_is_ours_or_has_a_reason(files, table):
    texts = [path.read_text() for path in CONNECTORS.glob(files)]
    assert texts, "vLLM has moved its connectors; this test must follow"
    theirs = {name for text in texts for name in re.findall(r'"(vllm:[a-z_]+)"', text)}
    assert theirs - {metric.name for metric in table} - NOT_OURS.keys() == set()
