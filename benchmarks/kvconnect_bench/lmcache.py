"""LMCache's own server and vLLM connector, which ours is measured and tested beside.

Its wheel (0.5.6) is not installed but unpacked, and ``PYTHONPATH`` names the folder: what it
depends on would replace what our engines run with.
"""

import importlib.util
import os
import socket
import sys
import time
from typing import Any

from kvconnect.cli.engines import START_TIMEOUT_S
from kvconnect.cli.processes import HOST, Fleet, ServerError
from kvconnect.errors import ConfigError

CHUNK_TOKENS = 128


def check_unpacked() -> None:
    """Raises ConfigError if engines would not find LMCache."""
    if importlib.util.find_spec("lmcache") is None:
        raise ConfigError(
            f"lmcache is not on the path of {sys.executable}; `pip install --no-deps --target "
            "FOLDER lmcache==0.5.6`, and PYTHONPATH=FOLDER"
        )


def start_lmcache(fleet: Fleet, folder: str = "") -> int:
    """The port on which a server of LMCache listens; ``folder`` of its wheel, if not on the path.

    Raises ServerError if it does not come up.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    env = os.environ | {"LMCACHE_DISABLE_BANNER": "1"}
    server = fleet.start(
        "lmcache",
        lambda http_port: [
            *(sys.executable, "-m", "lmcache.cli.main", "server"),
            *("--host", HOST, "--port", str(port), "--http-port", str(http_port)),
            *("--chunk-size", str(CHUNK_TOKENS), "--l1-size-gb", "1", "--eviction-policy", "LRU"),
            *("--supported-transfer-mode", "auto", "--disable-observability"),
        ],
        env | ({"PYTHONPATH": folder} if folder else {}),
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        server.is_up()  # raises once it has ended; it has no /health
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return port
        server.pause(0.25)
    raise ServerError(f"LMCache's server does not listen; its log: {server.log}")


def lmcache_config(port: int) -> dict[str, Any]:
    """``--kv-transfer-config`` of an engine that stores at the server on ``port``."""
    at = {"lmcache.mp.host": f"tcp://{HOST}", "lmcache.mp.port": port}
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": at,
    }
