"""Pairs of engines with several connectors each, and what tests ask of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pair import PREFER_FILE, Client, Pair, Setup, eventually, words
from solo import flip_bits

from kvconnect.cli.processes import Fleet

BLOCK = 128
NIXL = {
    "kv_connector": "KVConnectNixl",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "kv_lease_duration": 10,
        "load_timeout": 15,
        "handshake_timeout": 5,
    },
}


def offloading(**options: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KVConnectOffloading",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20, **options},
    }


@dataclass(frozen=True)
class MultiSetup(Setup):
    """Engines that can forget; of ours, with a chain that is told what to prefer."""

    arenas: Path | None = None

    def start(self, fleet: Fleet) -> "MultiPair":
        return MultiPair(fleet, self)


def ours(model: Path, folder: Path, here: Path) -> MultiSetup:
    """KVConnectMulti[KVConnectNixl, KVConnectOffloading]."""
    arenas = folder / "memory"
    children = [NIXL, offloading(persist=True, memory_path=str(arenas))]
    (folder / "prefer").write_text("stores")
    return MultiSetup(
        model,
        extra={"connectors": children},
        policy="fail",  # the chain makes it recompute: it has a store
        both=["--max-model-len", "2048"],
        names={"kv_connector": "KVConnectMulti", "kv_connector_module_path": "preferring"},
        env={
            "PYTHONPATH": str(here),
            "VLLM_SERVER_DEV_MODE": "1",
            PREFER_FILE: str(folder / "prefer"),
        },
        arenas=arenas,
    )


def in_tree(model: Path) -> MultiSetup:
    """vLLM's own MultiConnector over the same two; NIXL's gets the other one's handshake."""
    return MultiSetup(
        model,
        extra={"connectors": [offloading(), NIXL]},
        policy="recompute",
        both=["--max-model-len", "2048"],
        names={"kv_connector": "MultiConnector"},
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )


class MultiPair(Pair):
    """See the module."""

    setup: MultiSetup

    def prefer(self, what: str) -> None:
        """Peers or stores, at both engines."""
        Path(self.setup.env[PREFER_FILE]).write_text(what)

    def chained(self, name: str) -> float:
        """A counter of the decode engine's chain."""
        return self.decode.metric(f"vllm:kvconnect_chain_{name}_total")

    def seen(self) -> dict[str, float]:
        """What the decode engine's prompts were had from, and what went wrong, so far."""
        names = ("tokens_from_peers", "tokens_from_host", "tokens_lost", "fallbacks")
        found = {name: self.chained(name) for name in names}
        return found | {"computed": self.computed_at_decode()}

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """What was added to `seen`, without what was not."""
        return {n: v - before[n] for n, v in self.seen().items() if v != before[n]}

    def damage(self) -> None:
        """Flip a bit of every chunk in every engine's memory."""
        assert self.setup.arenas is not None
        paths = list(self.setup.arenas.glob("*.kvarena"))
        assert len(paths) == 2
        for path in paths:
            flip_bits(path)


def forget(engine: Client) -> None:
    """Empty an engine's own prefix cache, once nothing is being saved any more."""

    def done() -> bool:
        return json.dumps(engine.request("POST", "/reset_prefix_cache")[1]).count("true") == 1

    eventually(done, 20, "the prefix cache is empty")


def stored(engine: Client, prompt: list[int], blocks: int) -> None:
    """Have an engine keep the KV of a prompt's first blocks in its memory, and nowhere else."""
    engine.tokens([*prompt[: blocks * BLOCK], *words(3, seed=77)], 1)
    forget(engine)
