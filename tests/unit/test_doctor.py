"""``kvconnect doctor``: each planted fault is named, with its remedy."""

import importlib.metadata
import json
import os
import resource
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from kit.running import HOST, KNOWN, running_engines
from typer.testing import CliRunner

from kvconnect.cli import main
from kvconnect.cli.doctor import show
from kvconnect.config import SECRET_VARIABLE, NixlConfig
from kvconnect.control.wire import Address
from kvconnect.doctor import host, network, options, peer, software, speed
from kvconnect.doctor.checks import OF_HAND_OVERS, Wanted, checks
from kvconnect.doctor.finding import Finding, Verdict, fault, findings
from kvconnect.doctor.link import LinkJob, LinkRate, measure
from kvconnect.errors import ConfigError
from kvconnect.testing.tcp import TcpFaults
from kvconnect.vllm import CONNECTORS

OURS = NixlConfig(transport="loopback")
NIXL = {"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}
OFFLOADING = NIXL | {
    "kv_connector": "KVConnectOffloading",
    "kv_connector_extra_config": {"cpu_bytes_to_use": "1GiB"},
}
NETWORK_OF_TESTS = "203.0.113.7"  # RFC 5737: nobody has it

# A fresh environment: what is refused there is not installed.
WITHOUT = """
import importlib.metadata, sys
ABSENT = {"torch", "vllm", "nixl"}
found = importlib.metadata.version
def version(name):
    if name.partition("-")[0] in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def start():
    with running_engines() as make:
        yield make


def only(found, verdict):
    return [one for one in found if one.verdict is verdict]


def the_fault(found):
    (one,) = only(found, Verdict.FAULT)
    assert one.remedy, "a fault without a remedy"
    return one


def the_warning(found):
    (one,) = only(found, Verdict.WARNING)
    assert one.remedy, "a warning without a remedy"
    return one


def plant(root, files):
    """Files of a /proc or /sys; of a path that ends with / the folder."""
    for name, text in files.items():
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(text)
    return root


# -- the machine ------------------------------------------------------------------------------


def test_a_taken_port_is_named_with_who_to_ask():
    with socket.create_server((HOST, 0)) as server:
        port = str(server.getsockname()[1])
        environ = {network.HOST: HOST, network.PORT: port}
        one = the_fault(network.ports(NIXL, environ))
        assert one.subject == network.PORT and "something listens there" in one.fact
        assert f"sport = :{port}" in one.remedy
    (freed,) = network.ports(NIXL, environ)
    assert freed.verdict is Verdict.OK
    assert "no port" in the_fault(network.ports(NIXL, {network.PORT: "many"})).fact


def test_an_address_of_nobody_here_is_named():
    one = the_fault(network.advertised({network.HOST: NETWORK_OF_TESTS}))
    assert "no address of this host" in one.fact and network.HOST in one.remedy
    assert "looked up" in the_fault(network.advertised({network.HOST: "x" * 64})).fact
    assert "other hosts" in the_warning(network.advertised({network.HOST: "localhost"})).fact


def test_too_little_locked_memory_is_a_fault_where_rdma_needs_it(tmp_path):
    """It used to be a warning where nothing is locked, and a fault for whoever has a GPU."""
    gpu = {"vendor": "0x10de", "class": "0x030200"}
    plant(tmp_path, {f"sys/bus/pci/devices/0000:01:00.0/{k}": v for k, v in gpu.items()})
    assert len(host.gpus(tmp_path)) == 1
    (one,) = host.memlock(64 << 10, 1 << 30, tmp_path)
    assert one.verdict is Verdict.OK
    plant(tmp_path, {"sys/class/infiniband/mlx5_0/": "", "dev/infiniband/uverbs0": ""})
    one = the_fault(host.memlock(64 << 10, 1 << 30, tmp_path))
    assert "64 KiB" in one.fact and "ulimit -l" in one.remedy
    for enough in (resource.RLIM_INFINITY, 1 << 30):
        (one,) = host.memlock(enough, 1 << 30, tmp_path)
        assert one.verdict is Verdict.OK


def test_limits_and_memory_of_a_host_that_has_little(tmp_path):
    plant(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(1 << 30)})
    plant(tmp_path, {"dev/shm/": "", "sys/kernel/mm/transparent_hugepage/enabled": "a [never]"})
    assert "cpu_bytes_to_use" in the_fault(host.memory(2 << 30, tmp_path)).remedy
    assert not only(host.memory(1 << 20, tmp_path), Verdict.FAULT)
    assert "medium Memory" in the_warning(host.shared_memory(tmp_path, 1 << 60)).remedy
    assert "madvise" in the_warning(host.huge_pages(tmp_path)).remedy
    assert "takes five" in the_warning(host.files(1024)).remedy


def test_rdma_of_the_host_that_is_kept_from_a_container(tmp_path):
    """It used to be said to work: /sys shows the host's devices in any container."""
    plant(tmp_path, {"sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE"})
    one = the_warning(host.rdma(tmp_path))
    assert "the host has mlx5_0" in one.fact and "--device /dev/infiniband" in one.remedy
    plant(tmp_path, {"dev/infiniband/uverbs0": ""})
    assert not only(host.rdma(tmp_path), Verdict.WARNING)


def test_rdma_without_a_port_and_gpus_that_it_does_not_reach(tmp_path):
    nic, near, far = "pci0000:00/0000:00:01.0/0000:01:00.0", "0000:02:00.0", "0000:81:00.0"
    gpu = {"vendor": "0x10de", "class": "0x030200", "numa_node": "0"}
    places = {
        near: f"pci0000:00/0000:00:01.0/{near}",
        far: f"pci0000:80/0000:80:01.0/{far}",
    }
    for name, place in places.items():
        plant(tmp_path, {f"sys/devices/{place}/{k}": v for k, v in gpu.items()})
        plant(tmp_path, {"sys/bus/pci/devices/": ""})
        (tmp_path / f"sys/bus/pci/devices/{name}").symlink_to(tmp_path / f"sys/devices/{place}")
    (tmp_path / f"sys/devices/{places[far]}/numa_node").write_text("1")
    plant(tmp_path, {f"sys/devices/{nic}/numa_node": "0"})
    plant(tmp_path, {"sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN"})
    plant(tmp_path, {"dev/infiniband/uverbs0": ""})
    (tmp_path / "sys/class/infiniband/mlx5_0/device").symlink_to(tmp_path / f"sys/devices/{nic}")
    assert "1: DOWN" in the_warning(host.rdma(tmp_path)).fact
    found = list(host.gpu_direct(tmp_path))
    assert "modprobe nvidia-peermem" in the_fault(found).remedy
    assert the_warning(found).subject == f"GPU {far}" and "another NUMA" in the_warning(found).fact
    (close,) = only(found, Verdict.OK)
    assert close.subject == f"GPU {near}" and "same PCIe switch" in close.fact
    plant(tmp_path, {"sys/module/nvidia_peermem/": ""})
    assert not only(host.gpu_direct(tmp_path), Verdict.FAULT)


# -- its software -----------------------------------------------------------------------------


def versions(**there):
    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    return version


def test_a_missing_library_is_a_fault_only_where_it_is_wanted():
    one = the_fault(software.libraries("nixl", 0, versions()))
    assert one.subject == "library of nixl" and "pip install 'kvconnect[nixl]'" in one.remedy
    assert not only(software.libraries("nixl", 0, versions(nixl="1.5")), Verdict.FAULT)


def test_the_plugins_of_a_library_are_told():
    files = {"nixl-cu12": ["a/libplugin_UCX.so", "b/libplugin_UCX.so", "b/libplugin_GDS.so.1"]}
    found = software.plugins(("nixl", "nixl-cu12"), lambda name: files.get(name, ()))
    assert found == ["UCX"]
    assert software.plugins(("no such library",)) == []


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("0.29.1", "FAULT"), ("0.30.0", "OK"), ("0.33.2", "OK"), ("0.34.0", "WARNING")],
)
def test_vllm_outside_the_range_that_was_tested(version, verdict):
    (_, one) = software.vllm(versions(vllm=version))
    assert one.verdict.name == verdict and version in one.fact
    (_, none) = software.vllm(versions())
    assert none.verdict is Verdict.WARNING


def test_a_torch_that_does_not_see_the_gpus():
    seen = SimpleNamespace(device_count=lambda: 0)
    for cuda, verdict in (("12.8", Verdict.FAULT), (None, Verdict.WARNING)):
        torch = SimpleNamespace(__version__="2.13", version=SimpleNamespace(cuda=cuda), cuda=seen)
        (one,) = software.cuda(1, "NVRM version: 580.65.06", lambda torch=torch: torch)
        assert one.verdict is verdict and "0 of 1 GPUs" in one.fact and "580.65" in one.fact


# -- the configuration ------------------------------------------------------------------------


def test_every_misspelt_option_is_named_with_the_nearest():
    extra = {"kv_lease_duraton": 3, "staging_byts": "1GiB", "num_threads": 4, "drain_timeout": 9}
    found = options.explain(NIXL | {"kv_connector_extra_config": extra}).findings
    wrong = {one.subject: one.remedy for one in only(found, Verdict.FAULT)}
    assert wrong == {
        "kv_lease_duraton": "did you mean 'kv_lease_duration'?",
        "staging_byts": "did you mean 'staging_bytes'?",
    }
    told = {one.subject: one.fact for one in found}
    assert "no effect" in told["num_threads"]
    assert told["drain_timeout"] == "9.0 (set)" and told["load_timeout"] == "60.0 (default)"


def test_fields_connectors_and_roles_that_there_are_not():
    found = options.explain({"kv_conector": "x", "kv_connector": "KVConectNixl"}).findings
    assert ["did you mean" in one.remedy for one in only(found, Verdict.FAULT)] == [True, True]
    assert the_fault(options.explain(NIXL | {"kv_role": "prefill"}).findings).subject == "kv_role"
    in_tree = options.explain(NIXL | {"kv_connector": "NixlConnector"}).findings
    assert "kv_connector_module_path" in the_warning(in_tree).remedy
    bad = NIXL | {"kv_connector_extra_config": {"load_timeout": -1}}
    assert "load_timeout" in only(options.explain(bad).findings, Verdict.FAULT)[0].fact


def test_a_transport_that_there_is_not_and_values_that_cannot_be_have_a_remedy():
    """The first used to be explained with status 0, the second without a remedy."""
    for extra, said in (
        ({"transport": "mooncak"}, "did you mean 'mooncake'?"),
        ({"transport": "nixl", "handshake_timeout": "soon"}, "docs/options.md"),
    ):
        found = options.explain(NIXL | {"kv_connector_extra_config": extra}).findings
        assert said in the_fault(found).remedy
    foreign = options.explain(NIXL | {"kv_connector": "LMCacheConnectorV1"}).findings
    assert "did you mean" not in the_fault(foreign).remedy


def test_every_connector_is_explained():
    assert options.SCHEMAS.keys() == CONNECTORS.keys()


def test_children_of_several_connectors_are_explained_each():
    child = {
        "kv_connector": "KVConnectOffloading",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": "1GiB", "persist": True, "lazy": 1},
    }
    several = {"kv_connector": "KVConnectMulti", "kv_role": "kv_both"}
    extra = {"kv_connector_extra_config": {"connectors": [NIXL, child]}}
    found = options.explain(several | extra)
    assert the_fault(found.findings).subject == "connectors[1].lazy"
    assert found.host_bytes == 1 << 30 and found.peer is not None
    assert "PYTHONHASHSEED" in the_warning(options.hash_seed(found.configs, {})).remedy
    assert not only(options.hash_seed(found.configs, {"PYTHONHASHSEED": "0"}), Verdict.WARNING)
    assert the_fault(options.explain(several).findings).subject == "connectors"


def test_children_of_others_are_left_alone_and_what_is_none_is_named():
    """Each used to be a fault or a traceback."""
    extra = {"connectors": [NIXL, {"kv_connector": "LMCacheMPConnector"}]}
    several = {"kv_connector": "KVConnectMulti", "kv_role": "kv_both"}
    found = options.explain(several | {"kv_connector_extra_config": extra}).findings
    assert not only(found, Verdict.FAULT)
    extra = {"connectors": [NIXL, "KVConnectNixl"]}
    found = options.explain(several | {"kv_connector_extra_config": extra}).findings
    assert the_fault(found).subject == "connectors[1]"
    assert "did you mean" in the_fault(options.explain(NIXL | {"kv_rle": 1}).findings).remedy
    assert the_fault(options.explain(NIXL | {1: 2}).findings).subject == "1"


def test_failed_loads_of_stored_kv_are_recomputed_whatever_is_said():
    """Of a chain it used to say that the client gets an error."""
    chain = {"kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [NIXL, OFFLOADING]}}
    for transfer, said in (
        (NIXL, "fail"),
        (NIXL | {"kv_connector_extra_config": {"bidirectional_kv_xfer": True}}, "recompute"),
        (OFFLOADING, "recompute"),
        (chain | {"kv_connector": "KVConnectMulti"}, "recompute"),
        (chain | {"kv_connector": "MultiConnector"}, "fail"),
    ):
        (one,) = options.load_failures(transfer, options.explain(transfer).configs)
        assert one.fact.startswith(said)


def test_what_only_hand_overs_need_is_not_asked_of_offloading_alone():
    """Without nixl it used to be a fault."""
    alone, pair = (
        checks(Wanted(options.explain(transfer), True, [], None, None), {})
        for transfer in (OFFLOADING, NIXL)
    )
    assert pair.keys() - alone.keys() == set(OF_HAND_OVERS)
    assert {"libraries", "this host"} <= set(OF_HAND_OVERS)
    assert alone["configuration"]()


def test_a_configuration_in_a_file(tmp_path):
    for name, text in (
        ("plain.json", json.dumps(NIXL)),
        ("vllm.yaml", f"model: m\nkv-transfer-config: '{json.dumps(NIXL)}'\n"),
    ):
        (tmp_path / name).write_text(text)
        assert options.read_config(str(tmp_path / name)) == NIXL
    (tmp_path / "bad.yaml").write_text("kv-transfer-config: '{bad'\n")
    for wrong in ("{", str(tmp_path / "none"), str(tmp_path / "bad.yaml")):
        with pytest.raises(ConfigError, match="--config"):
            options.read_config(wrong)


def test_what_the_environment_adds(tmp_path, monkeypatch):
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    path = tmp_path / "secret"
    path.write_text("sixteen bytes at the least")
    path.chmod(0o644)
    told = NixlConfig(auth_secret_file=str(path))
    assert "chmod 600" in the_warning(options.secret(told, {})).remedy
    path.chmod(0o600)
    assert not only(options.secret(told, {}), Verdict.WARNING)
    path.write_text("short")
    one = the_fault(findings({"secret": lambda: options.secret(told, {})}))
    assert "openssl rand" in one.remedy
    for name in options.ALLOCATORS:
        environ = {name: "expandable_segments:True"}
        assert name in the_warning(options.allocator(1, "auto", environ)).remedy
        assert not only(options.allocator(1, "staged", environ), Verdict.WARNING)
    assert the_fault(options.load_failures({"kv_load_failure_policy": "hope"}, []))


# -- peers and links --------------------------------------------------------------------------


def look(engine, config=OURS, secret=KNOWN, ours=(), at=None):
    (mover, *_) = engine.movers
    return list(peer.look(at or mover.key_address, secret, config, dict(ours), None, []))


def test_a_peer_is_described_and_the_path_to_it(start):
    found = look(start(mode="staged"), ours={"model": "m"})
    assert not only(found, Verdict.FAULT)
    told = {one.subject.partition(" ")[2].partition(" ")[2]: one.fact for one in found}
    assert "3 layers of 8 blocks of 4 tokens" in told["geometry"]
    assert told["model"] == "the same model"
    assert told["path"] == "staged only, by its transfer_mode"


def test_a_peer_of_another_model_is_named_by_the_field(start):
    engine = start(mode="staged")
    one = the_fault(look(engine, ours={"model": "ours"}))
    assert "model is 'm', ours is 'ours'" in one.fact and "same model" in one.remedy
    assert not only(look(engine), Verdict.FAULT), "a model that is not named is not compared"


@pytest.mark.parametrize(
    ("secret", "why"), [(b"another secret, of our own", "another secret"), (b"", "we have none")]
)
def test_a_wrong_secret_is_named_and_nothing_else_is_learnt(start, secret, why):
    (one,) = look(start(), secret=secret)
    assert why in the_fault([one]).fact


def test_a_peer_of_another_transport_or_mode_has_no_path(start):
    assert "same transport" in the_fault(look(start(mode="staged"), config=NixlConfig())).remedy
    direct = NixlConfig(transport="loopback", transfer_mode="direct")
    assert "transfer_mode to auto" in the_fault(look(start(mode="staged"), config=direct)).remedy


def test_nobody_at_an_address_is_a_fault_in_time():
    with socket.create_server((HOST, 0)) as server:
        address = Address(HOST, server.getsockname()[1])
    config = NixlConfig(handshake_timeout=0.3)
    one = the_fault(peer.look(address, KNOWN, config, {}, None, []))
    assert "is the engine up" in one.remedy


def test_a_slow_link_is_told_by_its_round_trip(start):
    engine = start(mode="staged")
    at = engine.movers[0].address
    with TcpFaults((HOST, at.port), seed=1) as link:
        link.delay_s = peer.SLOW_S
        one = the_warning(look(engine, at=Address(HOST, link.address[1], at.key)))
        assert "round trip" in one.subject and "a slow link" in one.fact


def test_what_was_expected_of_a_link_is_said_where_it_is_slower():
    slow, fast = LinkRate(0.5, "READ"), LinkRate(7.0, "READ")
    one = the_warning([speed.judge("peer", slow, 9.0, 40.0)])
    assert "0.5 GB/s" in one.fact and "where 40 were expected" in one.fact
    assert speed.judge("peer", fast, 9.0, None).verdict is Verdict.OK
    assert speed.judge("peer", LinkRate(0.1), 9.0, None).verdict is Verdict.WARNING
    assert the_fault([speed.judge("peer", LinkRate(error="x; do y"), 9.0, None)]).remedy == "do y"


def test_two_peers_are_compared_as_their_movers_would(start):
    engines = []
    for engine in (start(mode="staged"), start(mode="staged", fingerprint={"model": "other"})):
        list(peer.look(engine.movers[0].key_address, KNOWN, OURS, {}, None, engines))
    assert "'other'" in only(peer.both(engines), Verdict.FAULT)[0].fact


def test_a_transport_that_cannot_start_or_that_ends_its_process_is_a_finding():
    absent = measure(LinkJob("no such transport", {}, HOST))
    assert "expected one of" in absent.error
    bad = measure(LinkJob("nixl", {"backends": 1}, HOST))
    assert "backends" in bad.error


# -- the command ------------------------------------------------------------------------------


def test_a_check_that_raises_is_a_finding_and_the_others_go_on(capsys):
    def broken():
        raise OSError("no such machine")

    found = list(findings({"a": broken, "b": lambda: [Finding("b", "fine")]}))
    assert "OSError: no such machine" in the_warning(found).fact and found[1].fact == "fine"
    assert show(lambda _: found, as_json=False) == 1
    capsys.readouterr()
    assert show(lambda _: [*found, fault("c", "seen; do this")], as_json=True) == 2
    told = json.loads(capsys.readouterr().out)["findings"]
    assert told[-1] == {"subject": "c", "fact": "seen", "verdict": "fault", "remedy": "do this"}


def test_config_explain_exits_with_the_worst_verdict():
    def explained(*arguments):
        return CliRunner().invoke(main, ["config", "explain", *arguments])

    assert explained(json.dumps(NIXL)).exit_code == 0
    bad = json.dumps(NIXL | {"kv_connector_extra_config": {"backend": ["UCX"]}})
    shown = explained(bad, "--json")
    assert shown.exit_code == 2
    told = json.loads(shown.stdout)
    assert told["worst"] == 2
    assert any("'backends'" in one["remedy"] for one in told["findings"])
    assert explained("{").exit_code == 2


def test_a_model_without_a_peer_is_not_left_out_in_silence():
    done = CliRunner().invoke(main, ["doctor", "--model", "m"])
    assert done.exit_code == 2 and "give --peer" in done.output


@pytest.mark.slow
def test_doctor_works_in_an_environment_without_vllm_torch_and_nixl(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "kvconnect.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)["findings"]
    faults = {one["subject"]: one["remedy"] for one in found if one["verdict"] == "fault"}
    assert (
        "pip install" in faults["library of nixl"] and "pip install" in faults["nixl on this host"]
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert next(one for one in found if one["subject"] == "vLLM")["verdict"] == "warning"
