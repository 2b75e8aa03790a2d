"""Prefill and decode engines that find each other by the ids of a router that they ping."""

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pair import Client

from kvconnect.cli.engines import ROLES, START_TIMEOUT_S, VllmServe, engine_env
from kvconnect.cli.processes import Fleet, Server

HERE = Path(__file__).parent


@dataclass(frozen=True)
class XpydSetup:
    """``prefill`` and ``decode``: arguments of each engine."""

    model: Path
    prefill: Sequence[Sequence[str]]
    decode: Sequence[Sequence[str]]
    both: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def start(self, fleet: Fleet) -> "Xpyd":
        return Xpyd(fleet, self)


class Xpyd:
    """The engines and the router of one setup."""

    def __init__(self, fleet: Fleet, setup: XpydSetup) -> None:
        self.fleet = fleet
        self.setup = setup
        self.discovery_port = free_port()
        self.kv_ports = [free_port() for _ in setup.prefill]
        prefills = [self._start("prefill", i, o) for i, o in enumerate(setup.prefill)]
        decodes = [self._start("decode", i, o) for i, o in enumerate(setup.decode)]
        self.prefills = [Client(server, setup.model.name) for server in prefills]
        self.decodes = [Client(server, setup.model.name) for server in decodes]
        self.router = self.start_router()
        fleet.wait_up([*prefills, *decodes, self.router.server], START_TIMEOUT_S)

    def start_router(self) -> Client:
        """Ours; not waited for."""
        script = str(HERE / "xpyd_router.py")
        wanted = [self.discovery_port, len(self.prefills), len(self.decodes)]
        return self.start(
            "router", lambda port: [sys.executable, script, *map(str, [port, *wanted])]
        )

    def start(self, name: str, command: Callable[[int], Sequence[str]]) -> Client:
        """A router; not waited for."""
        server = self.fleet.start(name, command, engine_env())
        return Client(server, self.setup.model.name)

    def end(self, router: Client) -> None:
        router.server.kill()
        self.fleet.servers.remove(router.server)

    def _start(self, role: str, number: int, options: Sequence[str]) -> Server:
        kv_port = self.kv_ports[number] if role == "prefill" else 0  # 0: a free one

        def command(port: int) -> list[str]:
            config = {
                "kv_connector": "P2pNcclConnector",
                "kv_role": ROLES[role],
                "kv_port": kv_port,
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "proxy_ip": "127.0.0.1",
                    "proxy_port": str(self.discovery_port),
                    "http_port": str(port),
                    "send_type": "PUT_ASYNC",
                    "kv_buffer_size": "1e1" if role == "prefill" else "8e9",
                    "nccl_num_channels": "16",
                    **self.setup.extra,
                },
            }
            return VllmServe(self.setup.model, config, [*self.setup.both, *options]).command(port)

        return self.fleet.start(f"{role} {number}", command, engine_env())

    def at_decode(self, source: str) -> float:
        """Prompt tokens of the decode engines, by where vLLM counts that they came from."""
        name = "vllm:prompt_tokens_by_source_total"
        return sum(client.metric(name, source=source) for client in self.decodes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
