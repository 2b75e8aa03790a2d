"""pytest plugin: points vLLM's own tests of MultiConnector at ours of that name.

The in-tree class is replaced where it is defined, before the tests import it from there; so the
name "MultiConnector" gives ours too. Configurations name a small local model instead of a hub's.
"""

import os

from tests.v1.kv_connector.unit import utils
from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector

from kvconnect.vllm.multi.connector import MultiConnector

_create = utils.create_vllm_config
_init = MultiConnector.__init__
_made = 0


def _create_small(*args, **options):
    options.setdefault("model", os.environ["KVCONNECT_TP_MODEL"])
    return _create(*args, **options)


def _counting_init(self, *args, **options):
    global _made
    _made += 1
    _init(self, *args, **options)


utils.create_vllm_config = _create_small
multi_connector.MultiConnector = MultiConnector
MultiConnector.__init__ = _counting_init


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"our connector was made {_made} times")
