"""Every option that the installed vLLM's own connectors read is one that ours know."""

import re
from pathlib import Path

import pytest
import vllm

from kvconnect.config import MooncakeConfig, NixlConfig
from kvconnect.offload.config import OffloadConfig

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
