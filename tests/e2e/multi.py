"""Pairs of engines with several connectors each, and what tests ask of them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pair import PREFER_FILE, Client, Pair, Setup, eventually, words
from solo import flip_bits

from kvconnect.cli.processes import Fleet

BLOCK = 128


def child(name: str, **options: Any) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": options}


def nixl(**options: Any) -> dict[str, Any]:
    short = {"kv_lease_duration": 10, "load_timeout": 15, "handshake_timeout": 5}
    return child("KVConnectNixl", **short | options)


def mooncake(**options: Any) -> dict[str, Any]:
    return child("KVConnectMooncake", mooncake_protocol="tcp", load_timeout=15, **options)


def offloading(**options: Any) -> dict[str, Any]:
    return child("KVConnectOffloading", cpu_bytes_to_use=64 << 20, **options)


@dataclass(frozen=True)
class MultiSetup(Setup):
    """Engines that can forget; of ours, with a chain that is told what to prefer."""

    arenas: Path | None = None

    def start(self, fleet: Fleet) -> "MultiPair":
        return MultiPair(fleet, self)


def ours(model: Path, folder: Path) -> MultiSetup:
    """KVConnectMulti[KVConnectNixl, KVConnectOffloading]."""
    arenas = folder / "memory"
    return MultiSetup(
        model,
        extra={"connectors": [nixl(), offloading(persist=True, memory_path=str(arenas))]},
        policy="fail",  # the chain makes it recompute: it has a store
        arenas=arenas,
        **preferring(folder, "stores"),
    )


def two_ranked(model: Path, folder: Path) -> MultiSetup:
    """The same, decode with TP 2."""
    setup = ours(model, folder)
    # two ranks that spin leave little of two cores to anybody else: be patient
    children = [nixl(kv_lease_duration=90, handshake_timeout=10), setup.extra["connectors"][1]]
    return replace(setup, decode=["--tensor-parallel-size", "2"], extra={"connectors": children})


def coexisting(model: Path, folder: Path) -> MultiSetup:
    """KVConnectMulti[KVConnectNixl, KVConnectMooncake]; at decode the other way round."""
    # a lease that is not released outlives the tests' patience
    options = {"kv_lease_duration": 60, "handshake_timeout": 3}
    children = [nixl(**options), mooncake(**options)]
    return MultiSetup(
        model,
        extra={"connectors": children[::-1]},
        prefill_extra={"connectors": children},
        policy="recompute",
        **preferring(folder, "peers"),
    )


def preferring(folder: Path, what: str) -> dict[str, Any]:
    """Of a setup whose chains are told what to prefer, at first ``what``."""
    file = folder / "prefer"
    file.write_text(what)
    return {
        "names": {"kv_connector": "KVConnectMulti", "kv_connector_module_path": "preferring"},
        "both": ["--max-model-len", "2048"],
        "env": {
            "PYTHONPATH": str(Path(__file__).parent),
            "VLLM_SERVER_DEV_MODE": "1",
            PREFER_FILE: str(file),
        },
    }


def in_tree(model: Path) -> MultiSetup:
    """vLLM's own MultiConnector over the same two; NIXL's gets the other one's handshake."""
    return MultiSetup(
        model,
        extra={"connectors": [offloading(), nixl()]},
        policy="recompute",
        both=["--max-model-len", "2048"],
        names={"kv_connector": "MultiConnector"},
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )


class MultiPair(Pair):
    """See the module."""

    setup: MultiSetup

    def prefer(self, what: str) -> None:
        """Peers, stores, or a child by its label, at both engines."""
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

    def damage(self, ranks: int | None = None) -> None:
        """Flip a bit of every chunk in the decode engine's memory: of all ranks, or so many."""
        assert self.setup.arenas is not None
        mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in self.decode.server.pids]
        arenas = sorted(self.setup.arenas.glob("*.kvarena"))
        own = [path for path in arenas if any(str(path) in maps for maps in mapped)]
        assert len(own) == (2 if "--tensor-parallel-size" in self.setup.decode else 1)
        for path in own[:ranks]:
            flip_bits(path)


def forget(engine: Client) -> None:
    """Empty an engine's own prefix cache, once nothing is being saved any more."""

    def done() -> bool:
        return json.dumps(engine.request("POST", "/reset_prefix_cache")[1]).count("true") == 1

    eventually(done, 60, "the prefix cache is empty")


def stored(engine: Client, prompt: list[int], blocks: int) -> None:
    """Have an engine keep the KV of a prompt's first blocks in its memory, and nowhere else."""
    engine.tokens([*prompt[: blocks * BLOCK], *words(3, seed=77)], 1)
    forget(engine)
