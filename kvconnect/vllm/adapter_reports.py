"""What ranks say of the adapters that they loaded; and engines that serve none.

`kvconnect.vllm.adapters` finds out what adapters are. It is loaded where vLLM serves some.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kvconnect.vllm.adapters import Adapters, LoadedAdapters


class Loaded(NamedTuple):
    """What an adapter's number stands for on one rank."""

    digest: str
    """"": not known."""
    changes: int
    """How often it was something else before."""


@dataclass
class AdapterReport:
    """What ranks have loaded, as of a step's results."""

    step: int
    """The step: all that was loaded before it ran is in this report or one before."""
    loaded: dict[int, dict[int, Loaded]] = field(default_factory=dict)
    """By adapter's number and rank."""


def merged(one: AdapterReport | None, other: AdapterReport | None) -> AdapterReport | None:
    """One report with the ranks of both; None where neither is there."""
    if one is None or other is None:
        return one or other
    numbers = one.loaded.keys() | other.loaded.keys()
    both = {n: one.loaded.get(n, {}) | other.loaded.get(n, {}) for n in numbers}
    return AdapterReport(min(one.step, other.step), both)


class NoAdapters:
    """Stands for `Adapters` and for `LoadedAdapters` in an engine that serves no adapters.

    Requests have none then. One that names one all the same has KV that is nobody else's.
    """

    def next_step(self) -> int:
        return 0

    def bound(self, step: int) -> None:
        pass

    def take(self, rank: int) -> None:  # noqa: ARG002 - as `LoadedAdapters` has it
        return None

    def received(self, report: AdapterReport | None) -> None:
        pass

    def arrived(self, request: Any) -> None:
        pass

    def ended(self, request_id: str) -> None:
        pass

    def cached(self, request: Any, tokens: int) -> None:
        pass

    def undecided(self, request: Any) -> bool:  # noqa: ARG002 - as `Adapters` has it
        return False

    def digest(self, request: Any) -> str | None:
        return None if request.lora_request is None else ""

    begin = digest

    def mixed(self, request: Any) -> bool:  # noqa: ARG002 - as `Adapters` has it
        return False


def scheduler_adapters(vllm_config: Any) -> "Adapters | NoAdapters":
    """What a scheduler's half asks about requests' adapters."""
    if vllm_config.lora_config is None:
        return NoAdapters()
    from kvconnect.vllm.adapters import Adapters

    return Adapters(vllm_config.parallel_config.world_size, _applied(vllm_config.lora_config))


def _applied(config: Any) -> str:
    """To which of a model's modules this engine applies adapters; "": to all that they are for."""
    modules = sorted(getattr(config, "target_modules", None) or ())
    encoders = " and encoders" if getattr(config, "enable_tower_connector_lora", False) else ""
    return f"{' '.join(modules)}{encoders}"


def worker_adapters(vllm_config: Any) -> "LoadedAdapters | NoAdapters":
    """What a worker's half says of the adapters that its process loads, from now on."""
    if vllm_config.lora_config is None:
        return NoAdapters()
    from kvconnect.vllm.adapters import LoadedAdapters

    return LoadedAdapters()
