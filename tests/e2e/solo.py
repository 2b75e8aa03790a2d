"""One real engine that offloads, and what tests ask of it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pair import Client, eventually

from kvconnect.cli.engines import START_TIMEOUT_S, Engine, engine_env, offload_config
from kvconnect.cli.processes import Fleet
from kvconnect.tier.store.header import read_head


@dataclass(frozen=True)
class SoloSetup:
    """What differs between the engines of the tests."""

    model: Path
    extra: Mapping[str, Any]
    options: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def start(self, fleet: Fleet) -> "Solo":
        return Solo(fleet, self)


class Solo(Client):
    """An engine of a setup; `restart` replaces it."""

    def __init__(self, fleet: Fleet, setup: SoloSetup) -> None:
        self.fleet = fleet
        self.setup = setup
        config = offload_config(**setup.extra) | dict(setup.names)
        command = Engine(setup.model, config, setup.options).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        server = fleet.start(f"engine {len(fleet.servers)}", command, env)
        fleet.wait_up([server], START_TIMEOUT_S)
        super().__init__(server, setup.model.name)

    def restart(self) -> None:
        """Kill it without a warning, and start another like it."""
        self.server.kill()
        self.__init__(self.fleet, self.setup)

    def forget(self) -> None:
        """Empty the engine's own prefix cache, once nothing is being saved any more."""
        eventually(self._reset, 20, "the prefix cache is empty")

    def wait_written(self) -> None:
        """Until nothing more is written to disk: an engine goes on stepping until then."""
        last = -1.0
        while (now := self.offloaded("disk_writes")) != last:
            last = now
            time.sleep(0.5)

    def tokens_from(self, source: str) -> float:
        """Prompt tokens by vLLM's own count: local_compute or external_kv_transfer.

        vLLM counts the last token of a full hit, which is computed again, as external.
        """
        return self.metric("vllm:prompt_tokens_by_source_total", source=source)

    def offloaded(self, name: str) -> float:
        """A counter of ours."""
        return self.metric(f"vllm:kvconnect_offload_{name}_total")

    def damage(self) -> int:
        """Flip a bit of every slot's payload, in memory and on disk; how many files that was."""
        files = list(Path(self.setup.extra["disk_path"]).parent.rglob("*.kvarena"))
        for path in files:
            with path.open("r+b") as file:
                spec, _ = read_head(file.read(4096))
                for slot in range(spec.slots):
                    place = spec.payload_offset + slot * spec.stride + 1000
                    file.seek(place)
                    byte = file.read(1)[0]
                    file.seek(place)
                    file.write(bytes([byte ^ 16]))
        return len(files)

    def _reset(self) -> bool:
        _, answer = self.request("POST", "/reset_prefix_cache")
        return json.dumps(answer).count("true") == 1
