"""Real vLLM engines on this machine: what to run and how, for the demo, benchmarks and tests.

Does not import vLLM, and does not know how processes live and die: that is ``processes``.

    with Fleet(logs) as fleet:
        engine = VllmServe(model, transfer_config("nixl", "prefill"))
        server = fleet.start("prefill", engine.command, engine_env())
        fleet.wait_up([server], START_TIMEOUT_S)
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvconnect.cli.processes import HOST
from kvconnect.errors import ConfigError

START_TIMEOUT_S = 300.0

# -P: a folder named vllm where we happen to run is not vLLM.
_PYTHON = (sys.executable, "-P", "-m")

# What scripts/env.sh sets, where it was not sourced. What is set already stays.
_DEFAULT_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": "0",
    "NO_COLOR": "1",
}
# An operator sets these for one engine: two would take the same port, or ask for a key.
_NOT_INHERITED = (
    "VLLM_NIXL_SIDE_CHANNEL_PORT",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT",
    "VLLM_PORT",
    "VLLM_API_KEY",
    "KVCONNECT_API_KEY",
)


@dataclass(frozen=True)
class Connector:
    """A connector as the command line knows it."""

    kv_connector: str
    module: str
    """What must be importable beside vLLM."""
    metrics: str
    """How the names of its transfer metrics start."""
    options: Mapping[str, str] = field(default_factory=dict)
    kv_port: int | None = None
    """0: a free one, where vLLM's default would be every engine's."""


CONNECTORS = {
    "nixl": Connector("KVConnectNixl", module="nixl", metrics="vllm:nixl"),
    "mooncake": Connector(
        "KVConnectMooncake",
        module="mooncake",
        metrics="vllm:nixl",
        options={"mooncake_protocol": "tcp"},
    ),
    "ucx": Connector(
        "KVConnectNixl", module="ucxx", metrics="vllm:nixl", options={"transport": "ucx"}
    ),
    "p2p": Connector("KVConnectP2pNccl", module="ucxx", metrics="vllm:nixl", kv_port=0),
}
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def transfer_config(connector: str, role: str) -> dict[str, Any]:
    """``--kv-transfer-config`` for a role of ROLES and a connector of CONNECTORS."""
    chosen = CONNECTORS[connector]
    config: dict[str, Any] = {"kv_connector": chosen.kv_connector, "kv_role": ROLES[role]}
    if chosen.kv_port is not None:
        config["kv_port"] = chosen.kv_port
    return config | ({"kv_connector_extra_config": chosen.options} if chosen.options else {})


def offload_config(**options: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` of an engine that offloads, with these options."""
    config = {"kv_connector": "KVConnectOffloading", "kv_role": "kv_both"}
    return config | {"kv_connector_extra_config": options}


def multi_config(**options: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` of either engine of a pair that hands over, and offloads so."""
    children = [transfer_config("nixl", "decode"), offload_config(**options)]
    children[0] |= {"kv_role": "kv_both", "kv_connector_extra_config": {"handshake_timeout": 3}}
    config = {"kv_connector": "KVConnectMulti", "kv_role": "kv_both"}
    return config | {"kv_connector_extra_config": {"connectors": children}}


@dataclass(frozen=True)
class VllmServe:
    """A ``vllm serve`` whose answers can be compared: float32, computed eagerly."""

    model: Path
    transfer: Mapping[str, Any] | None = None
    options: Sequence[str] = ()
    """More arguments of ``vllm serve``; they win."""
    PROGRAM: ClassVar = (*_PYTHON, "vllm.entrypoints.cli.main")

    @property
    def model_name(self) -> str:
        """The name of the model in requests."""
        return self.model.name

    def command(self, port: int) -> list[str]:
        """The whole command line."""
        arguments = [str(self.model), "--served-model-name", self.model_name]
        arguments += ["--host", HOST, "--port", str(port)]
        arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
        arguments += ["--gpu-memory-utilization", "0.3"]  # where there is a GPU, engines share it
        if self.transfer is not None:
            arguments += ["--kv-transfer-config", json.dumps(self.transfer)]
        # for developers: what all engines of the demo, benchmarks and tests get too
        more = os.environ.get("KVCONNECT_ENGINE_OPTIONS", "").split()
        return [*self.PROGRAM, "serve", *arguments, *self.options, *more]


def engine_env(**more: str) -> dict[str, str]:
    """The environment of an engine or a proxy: ours, with defaults; ``more`` wins."""
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    return _DEFAULT_ENV | inherited | more


def proxy_command(
    prefill: Sequence[str], decode: Sequence[str], options: Sequence[str] = ()
) -> Callable[[int], list[str]]:
    """``kvconnect proxy`` between the engines at these URLs, by its port."""
    engines = [f"--prefill={url}" for url in prefill] + [f"--decode={url}" for url in decode]
    start = [*_PYTHON, "kvconnect.cli", "proxy", f"--host={HOST}", *engines, *options]
    return lambda port: [*start, f"--port={port}"]


def check_installed(connector: str) -> None:
    """Raises ConfigError if an engine with this connector could not start."""
    needed = [("vllm", "`make setup` installs it for CPUs")]
    if connector in CONNECTORS:
        needed.append((CONNECTORS[connector].module, f"`pip install 'kvconnect[{connector}]'`"))
    for module, remedy in needed:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed for {sys.executable}; {remedy}")


def check_model(model: Path | None) -> Path:
    """The folder of a model; raises ConfigError."""
    remedy = "`make setup` makes the one of the demo, --model names another"
    if model is None:
        raise ConfigError(f"neither --model nor KVCONNECT_MODEL names a model; {remedy}")
    if not (model / "config.json").is_file():
        raise ConfigError(f"there is no model at {model} (no config.json); {remedy}")
    return model.resolve()
