"""One real engine that offloads, and what tests ask of it."""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pair import Client, eventually

from kvconnect.cli.engines import START_TIMEOUT_S, VllmServe, engine_env, offload_config
from kvconnect.cli.processes import Fleet, Server
from kvconnect.offload.store.header import read_head


@dataclass(frozen=True)
class SoloSetup:
    """What differs between the engines of the tests."""

    model: Path
    extra: Mapping[str, Any]
    options: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def start(self, fleet: Fleet) -> "Solo":
        return Solo(fleet, self)

    def launch(self, fleet: Fleet) -> Server:
        """An engine; not waited for."""
        config = offload_config(**self.extra) | dict(self.names)
        command = VllmServe(self.model, config, self.options).command
        env = engine_env(VLLM_SERVER_DEV_MODE="1")  # for /reset_prefix_cache
        return fleet.start(f"engine {len(fleet.servers)}", command, env)


@dataclass(frozen=True)
class SharersSetup(SoloSetup):
    """Two engines of one setup, which share its folders."""

    def start(self, fleet: Fleet) -> "tuple[Solo, Solo]":  # type: ignore[override]
        servers = [self.launch(fleet), self.launch(fleet)]
        fleet.wait_up(servers, START_TIMEOUT_S)
        first, second = (Solo(fleet, self, server) for server in servers)
        return first, second


class Solo(Client):
    """An engine of a setup; `restart` replaces it."""

    def __init__(self, fleet: Fleet, setup: SoloSetup, server: Server | None = None) -> None:
        """``server``: one that is up already."""
        self.fleet = fleet
        self.setup = setup
        if server is None:
            server = setup.launch(fleet)
            fleet.wait_up([server], START_TIMEOUT_S)
        super().__init__(server, setup.model.name)

    def restart(self) -> None:
        """Kill it without a warning, and start another like it."""
        self.server.kill()
        self.__init__(self.fleet, self.setup)

    def forget(self) -> None:
        """Empty the engine's own prefix cache, once nothing is being saved any more."""
        eventually(self._reset, 60, "the prefix cache is empty")

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

    def files(self, folder: str) -> list[Path]:
        """Arenas in the folder that an option names."""
        return sorted(Path(self.setup.extra[folder]).glob("*.kvarena"))

    def damage(self) -> int:
        """Flip a bit of every slot's payload, in memory and on disk; how many files that was."""
        files = [*self.files("memory_path"), *self.files("disk_path")]
        for path in files:
            flip_bits(path)
        return len(files)

    def empty_disk_files(self) -> None:
        """Cut off all payloads, as a repair of the filesystem might."""
        for path in self.files("disk_path"):
            with path.open("r+b") as file:
                spec, _ = read_head(file.read(4096))
                file.truncate(spec.payload_offset)

    def limit_files(self, nbytes: int) -> None:
        """No process of the engine can write behind ``nbytes`` of a file any more: EFBIG.

        What a full disk is to an engine whose room was not really reserved.
        """
        for pid in self.server.pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (nbytes, hard))

    def _reset(self) -> bool:
        _, answer = self.request("POST", "/reset_prefix_cache")
        return json.dumps(answer).count("true") == 1


def flip_bits(arena: Path) -> None:
    """One of every slot's payload."""
    with arena.open("r+b") as file:
        spec, _ = read_head(file.read(4096))
        for slot in range(spec.slots):
            place = spec.payload_offset + slot * spec.stride + 1000
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 16]))
