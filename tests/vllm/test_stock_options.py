"""Every option that the installed vLLM's own connectors read is one that ours know."""

import dataclasses
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
from vllm.config import CacheConfig, KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import kvconnect.vllm as ours
from kvconnect.config import MooncakeConfig, NixlConfig, parse
from kvconnect.errors import ConfigError
from kvconnect.offload.config import OffloadConfig
from kvconnect.vllm.transfer_fields import HONOURED, INERT_FIELDS

ROOT = Path(vllm.__file__).parent
CONNECTORS = ROOT / "distributed/kv_transfer/kv_connector/v1"
OFFLOADING = ROOT / "v1/kv_offload"
READ = re.compile(
    r"""(?:get_from_extra_config\(|extra_config\.get\()\s*(?:#.*\n)?\s*["'](\w+)["']"""
)

SOURCES = {
    "nixl": (NixlConfig, [CONNECTORS / "nixl"], set()),
    "mooncake": (MooncakeConfig, [CONNECTORS / "mooncake/mooncake_connector.py"], set()),
    "offloading": (
        OffloadConfig,
        [
            CONNECTORS / "offloading",
            OFFLOADING / "base.py",
            OFFLOADING / "factory.py",
            OFFLOADING / "cpu",
            OFFLOADING / "tiering/spec.py",
        ],
        {"secondary_tiers"},  # translated
    ),
}


def read_in(places):
    files = [f for place in places for f in ([place] if place.is_file() else place.rglob("*.py"))]
    return {name for file in files for name in READ.findall(file.read_text())}


@pytest.mark.parametrize("connector", SOURCES)
def test_every_option_of_vllms_own_connector_is_known(connector):
    schema, places, translated = SOURCES[connector]
    read = read_in(places)
    assert len(read) > 2, "vLLM has moved its connectors; this test must follow"
    own = getattr(schema, "own_options", None)
    known = {*schema.__struct_fields__, *(own.__struct_fields__ if own else ()), *schema.inert}
    assert read - known - translated == set()


@pytest.mark.parametrize("connector", SOURCES)
def test_the_documentation_says_what_becomes_of_each(connector):
    schema, *_ = SOURCES[connector]
    page = (Path(__file__).parents[2] / "docs/options.md").read_text()
    for name, why in schema.inert.items():
        assert f"| `{name}` | no effect: {why} |" in page


# -- the fields of --kv-transfer-config itself --------------------------------------------------

DOCUMENTED = Path(__file__).parents[2] / "docs/options.md"
CONNECTORS_OF_OURS = [
    "KVConnectNixl",
    "NixlConnector",
    "KVConnectMooncake",
    "KVConnectP2pNccl",
    "KVConnectOffloading",
    "KVConnectMulti",
]
OTHER = {"kv_buffer_device": "cuda", "enable_permute_local_kv": True, "kv_port": 21001}


def said_at_the_start(caplog, connector, role=KVConnectorRole.SCHEDULER, **fields):
    """Warnings of ``connector`` of a vLLM that has ``fields``: it stops at options it has not."""
    name = KVTransferConfig(kv_connector=connector, kv_role="kv_both", **fields)
    if connector != "KVConnectMulti":  # which stops because it has no children
        name.kv_connector_extra_config = {"not_an_option": 1}
    config = SimpleNamespace(kv_transfer_config=name, scheduler_config=None)
    with caplog.at_level(logging.WARNING, "vllm.kvconnect"), pytest.raises(ConfigError) as e:
        getattr(ours, connector)(config, role, None)
    return str(e.value), [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]


def test_every_field_that_vllm_has_is_one_that_ours_know():
    fields = {field.name for field in dataclasses.fields(KVTransferConfig)}
    assert fields - HONOURED - INERT_FIELDS.keys() == set()


@pytest.mark.parametrize("connector", CONNECTORS_OF_OURS)
def test_defaults_say_nothing(connector, caplog):
    why, said = said_at_the_start(caplog, connector)
    assert "not_an_option" in why or "connectors" in why
    assert said == []


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("connector", CONNECTORS_OF_OURS)
def test_what_is_set_is_honoured_or_refused_or_said_to_have_no_effect(connector, field, caplog):
    """vLLM's own NIXL connector has no buffers on "cuda" for an engine on a CPU either."""
    why, said = said_at_the_start(caplog, connector, **{field: OTHER[field]})
    if field == "kv_buffer_device" and "Nixl" in connector:
        assert "kv_buffer_device is 'cuda', expected 'cpu', which is the default" in why
    elif field == "kv_port" and connector == "KVConnectP2pNccl":
        assert said == []
    else:
        assert said == [
            f"{connector}: {field} ({OTHER[field]!r}) has no effect: {INERT_FIELDS[field]}"
        ]


def test_host_buffers_for_an_engine_on_a_gpu_are_refused(monkeypatch, caplog):
    """In-tree copies KV through host memory there; ours cannot, and says what to do instead."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "cuda")
    why, _ = said_at_the_start(caplog, "NixlConnector", kv_buffer_device="cpu")
    assert "kv_buffer_device is 'cpu', expected 'cuda'" in why
    assert "leave the field out" in why


def test_it_is_said_by_the_scheduler_alone(caplog):
    worker = KVConnectorRole.WORKER
    _, said = said_at_the_start(caplog, "KVConnectNixl", worker, enable_permute_local_kv=True)
    assert said == []


def test_the_documentation_has_every_field():
    page = DOCUMENTED.read_text()
    for name, why in INERT_FIELDS.items():
        assert re.search(rf"^\| `{name}` \|.*no effect: {re.escape(why)} \|$", page, re.M), name


# -- through vLLM's own configuration ------------------------------------------------------------


@pytest.mark.parametrize("gib", [1, 1.5])
def test_kv_offloading_size_is_the_memory_of_all_ranks_together(gib):
    """`--kv-offloading-size` counts in GiB; vLLM hands bytes on, as a float."""
    config = VllmConfig(
        cache_config=CacheConfig(kv_offloading_size=gib),
        kv_transfer_config=KVTransferConfig(
            kv_connector="OffloadingConnector",
            kv_connector_module_path="kvconnect.vllm",
            kv_role="kv_both",
        ),
    )
    transfer = config.kv_transfer_config
    assert transfer.kv_connector_module_path == "kvconnect.vllm"  # vLLM leaves it
    options = transfer.kv_connector_extra_config
    assert parse(options, OffloadConfig, "t").cpu_bytes_to_use == gib * (1 << 30)


def test_what_helm_writes_goes_through_vllms_own_argument():
    written = {
        "kv_connector": "OffloadingConnector",
        "kv_connector_module_path": "kvconnect.vllm",
        "kv_role": "kv_both",
        "kv_port": 14579,
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": "10GiB",
            "blocks_per_chunk": 4.0,
            "store_threshold": "2",
            "offload_prompt_only": "true",
            "disk_bytes": 2e9,
            "disk_path": "/kv",
        },
    }
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    made = parser.parse_args(["--kv-transfer-config", json.dumps(written)]).kv_transfer_config
    found = parse(made.kv_connector_extra_config, OffloadConfig, "t")
    assert (found.cpu_bytes_to_use, found.disk_bytes) == (10 << 30, 2_000_000_000)
    assert (found.blocks_per_chunk, found.store_threshold) == (4, 2)
    assert found.offload_prompt_only is True
