"""pytest plugin: points vLLM's own connector tests at our class.

Their factory ``create_vllm_config`` names ``NixlConnector`` by default; here that is ours, by
module path, on a small local model instead of one from a hub. Everything else is theirs.
"""

import functools
import os

from tests.v1.kv_connector.unit import utils

from kvconnect.vllm.nixl import NixlConnector

_create = utils.create_vllm_config
_init = NixlConnector.__init__
_made = 0


@functools.wraps(_create)
def _create_with_ours(*args, **options):
    options.setdefault("model", os.environ["KVCONNECT_TP_MODEL"])
    if options.get("kv_connector", "NixlConnector") == "NixlConnector":
        options |= {"kv_connector": "NixlConnector", "kv_connector_module_path": "kvconnect.vllm"}
    return _create(*args, **options)


def _counting_init(self, *args, **options):
    global _made
    _made += 1
    _init(self, *args, **options)


utils.create_vllm_config = _create_with_ours
NixlConnector.__init__ = _counting_init


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"our connector was made {_made} times")
