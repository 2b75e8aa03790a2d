"""Our stats as vLLM's API server exports them, on real Prometheus metrics."""

import ast
import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector import v1

import kvconnect
from kvconnect.consumer.failures import FailureCause, count_failure
from kvconnect.costs import Costs
from kvconnect.proxy.requests.early import READS_EARLY
from kvconnect.stats import OBSERVED, PeerRead, Stats
from kvconnect.vllm.held import HeldBlocks
from kvconnect.vllm.metrics import MAX_PEERS, OTHER_PEERS, Metrics
from kvconnect.vllm.mooncake.connector import KVConnectMooncake
from kvconnect.vllm.multi.metrics import CHAIN, MultiStats
from kvconnect.vllm.nixl import KVConnectNixl
from kvconnect.vllm.offload.metrics import OFFLOAD, OffloadStats
from kvconnect.vllm.p2p.connector import KVConnectP2pNccl
from kvconnect.vllm.peer_metrics import PEER, PeerStats

MIB = 1 << 20
ROOT = Path(kvconnect.__file__).parent

_spec = importlib.util.spec_from_file_location(
    "metrics_page", ROOT.parent / "scripts/metrics_page.py"
)
metrics_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(metrics_page)


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


def read(peer, nbytes=4 * MIB, seconds=0.5, path="staged"):
    return PeerRead("r", path, peer, nbytes, 10.0, 10.0 + seconds)


def test_reads_are_counted_by_path_and_peer():
    stats, exported = Stats(), Exported()
    for path in ("staged", "direct", "direct"):
        stats.read(read("10.0.0.1:7", path=path))
    exported.metrics.observe(stats.take())
    labels = {"path": "direct", "peer": "10.0.0.1:7"}
    assert exported.value("vllm:kvconnect_reads_total", **labels) == 2
    assert exported.value("vllm:kvconnect_read_bytes_total", **labels) == 8 * MIB
    assert exported.value("vllm:kvconnect_read_seconds_total", **labels) == 1.0
    assert exported.value("vllm:kvconnect_read_bytes_per_second", **labels) == 8 * MIB
    labels["path"] = "staged"
    assert exported.value("vllm:kvconnect_reads_total", **labels) == 1


def test_peers_have_so_many_labels_and_no_more():
    """Peers come and go, and Prometheus never forgets one."""
    exported = Exported()
    for number in range(3 * MAX_PEERS):
        stats = Stats()
        stats.read(read(f"10.0.0.1:{number}"))
        exported.metrics.observe(stats.take())
    peers = {
        sample.labels["peer"]
        for family in exported.registry.collect()
        for sample in family.samples
        if "peer" in sample.labels
    }
    assert len(peers) == MAX_PEERS + 1
    rest = exported.value("vllm:kvconnect_reads_total", path="staged", peer=OTHER_PEERS)
    assert rest == 2 * MAX_PEERS
    assert exported.value("vllm:kvconnect_reads_total", path="staged", peer="10.0.0.1:0") == 1


def test_a_peer_s_name_cannot_make_other_labels():
    exported, stats = Exported(), Stats()
    stats.read(read("evil|staged|x"))
    exported.metrics.observe(stats.take())
    assert exported.value("vllm:kvconnect_reads_total", path="staged", peer="evil_staged_x") == 1


def test_causes_are_there_before_anything_fails_for_an_increase_to_be_seen():
    exported, stats = Exported(), Stats()
    cause = {"cause": "checksum"}
    assert exported.value("vllm:kvconnect_failed_loads_total", **cause) == 0
    count_failure(stats, FailureCause.CHECKSUM)
    exported.metrics.observe(stats.take())
    assert exported.value("vllm:kvconnect_failed_loads_total", **cause) == 1
    assert exported.value("vllm:kvconnect_checksum_failures_total") == 1
    assert exported.value("vllm:nixl_num_failed_transfers_total") == 1


def test_held_blocks_and_the_oldest_of_them_are_gauges_by_cause():
    now = [100.0]
    held, stats, exported = HeldBlocks(lambda: now[0]), Stats(), Exported()
    held.hold("leased", "a", 5)
    now[0] += 2
    held.hold("leased", "b", 7)
    held.hold("loading", "c", 1)
    held.report(stats)
    exported.metrics.observe(stats.take())
    blocks, oldest = "vllm:kvconnect_held_blocks", "vllm:kvconnect_held_oldest_seconds"
    assert exported.value(blocks, cause="leased") == 12
    assert exported.value(oldest, cause="leased") == 2
    assert exported.value("vllm:kvconnect_leases_standing") == 2
    held.report(stats)
    assert stats.take() is None, "nothing has changed, and no second has passed"
    now[0] += 3
    assert held.free("leased", "a") == 5
    assert held.free("leased", "a") is None
    held.report(stats)
    exported.metrics.observe(stats.take())
    assert exported.value(blocks, cause="leased") == 7
    assert exported.value(oldest, cause="leased") == 3
    assert exported.value(blocks, cause="loading") == 1
    now[0] += 1
    held.report(stats)
    exported.metrics.observe(stats.take())
    assert exported.value(oldest, cause="loading") == 4


ODD = [
    None,
    3,
    "many",
    [],
    {"num_late_reads": {"a": 1}},
    {"num_late_reads": [1.0], "transfer_duration": 3},
    {"num_late_reads": -1, "read_rate|a": [1.0], "num_reads|a|b|c": 1, "num_reads": 1},
    {"transfer_duration": ["long", None, {}], "num_descriptors": [object()]},
    {"transfer_duration": [math.inf, math.nan, 10**400], "num_invalid_params": 10**400},
    {"num_late_reads": math.nan, 7: 7, None: [1.0], "": 1, "|": 1, "read_rate||": [1.0]},
    {"transfer_duration": np.ones(3), "num_late_reads": np.ones(2)},
    {"staged_seconds_per_byte": [5e-324], "descriptor_seconds": [True]},
    {"transfer_duration": (1.0, 2.0), "load_us": "2"},
]


@pytest.mark.parametrize("kind", [PeerStats, OffloadStats])
@pytest.mark.parametrize("odd", ODD)
def test_stats_never_raise(kind, odd):
    """An exception in stats ends the API server's output loop, and with it every request."""
    exported = Exported(kind.metrics)
    for one, other in ((odd, odd), ({"num_late_reads": 1}, odd), (odd, {"num_late_reads": [1]})):
        stats = kind(data=one)
        stats.is_empty()
        stats.reduce()
        both = stats.aggregate(kind(data=other))
        both.reduce()
        exported.metrics.observe(one)
        exported.metrics.observe(both.to_dict())
        exported.metrics.observe(both.to_dict(), engine_idx=7)
    multi = MultiStats()
    multi.put("one", KVConnectNixl, kind(data=odd))
    multi.aggregate(multi)
    multi.aggregate(kind(data=odd))
    multi.reduce()
    multi.is_empty()


def test_a_count_adds_to_an_average_of_another_version():
    """A whole number replaced what was counted as a fraction before."""
    both = PeerStats(data={"num_late_reads": 1.5}).aggregate(PeerStats(data={"num_late_reads": 2}))
    assert both.data == {"num_late_reads": 3.5}


@pytest.mark.parametrize(
    ("connector", "can"),
    [(KVConnectNixl, True), (KVConnectMooncake, True), (KVConnectP2pNccl, False)],
)
def test_only_a_connector_that_reads_while_prefill_computes_says_so(connector, can):
    """The proxy asks both engines at once where decode exports it; P2pNccl has no such form."""
    exported = {metric.name for metric in connector.exported_metrics()}
    assert (READS_EARLY.decode() in exported) is can
    assert len(exported) >= len({m.name for m in PEER}) - 1


def test_the_page_of_metrics_is_current():
    assert metrics_page.PAGE.read_text() == metrics_page.page(), "run scripts/metrics_page.py"


def test_every_metric_says_what_it_means_and_what_to_do():
    for metric in PEER + OFFLOAD + CHAIN:
        assert len(metric.help) > 10, metric.name
        assert len(metric.advice) > 10, metric.name


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
    if not path.name.endswith("metrics.py")
}
TABLES = {
    "peer": (
        PEER,
        (
            "mover.py",
            "stats.py",
            "consumer/",
            "producer/",
            "vllm/scheduler.py",
            "vllm/worker.py",
            "vllm/held.py",
        ),
    ),
    "offload": (OFFLOAD, ("offload/", "vllm/offload/")),
    "chain": (CHAIN, ("chain/", "vllm/multi/")),
}


def names_counted(text):
    """Keys of counts and arguments of `Stats.count` and `observe`; what a table of names holds."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Subscript(value=ast.Name(id=owner) | ast.Attribute(attr=owner), slice=key):
                if owner.endswith(("counts", "taken")):
                    yield key
            case ast.Call(
                func=ast.Attribute(attr="count" | "observe" | "_count") | ast.Name(id="labelled"),
                args=[key, *_],
            ):
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
                    case ast.Assign(targets=[ast.Name(id=name)], value=ast.DictComp() as made):
                        if name == table:
                            return set(eval(ast.unparse(made)).values())
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
