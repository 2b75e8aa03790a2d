"""What crosses between the scheduler's and the workers' half of the offloading connector."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvconnect.offload.jobs import Job, Loss, Save
from kvconnect.vllm.adapter_reports import AdapterReport, merged


@dataclass
class StoreHandshake(KVConnectorHandshakeMetadata):
    """What a rank can hold, and what it held when the engine started."""

    slots: int
    disk_slots: int
    host: list[bytes]
    """Keys, oldest first."""
    disk: list[bytes]


class WantedChunk(NamedTuple):
    """A chunk that a chain asks for, by its number in a group; ``blocks`` as of `KeyedChunk`."""

    group: int
    number: int
    blocks: tuple[int, ...]


class Loading(NamedTuple):
    """A request's load: numbers of its fills, and why some chunk has failed already, if one has."""

    fills: tuple[int, ...]
    problem: str = ""


@dataclass
class StepJobs(KVConnectorMetadata):
    """A step's jobs, scheduler → every rank; a rank takes them once."""

    jobs: list[Job] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    """Saves of KV that is there once the step has run."""
    loads: dict[str, Loading] = field(default_factory=dict)
    step: int = 0

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.jobs or self.saves or self.loads)


@dataclass
class WorkerResults(KVConnectorWorkerMetadata):
    """What ranks have done: each answer counts ranks, and those of them where it failed."""

    answers: dict[int, tuple[int, int]] = field(default_factory=dict)
    declined: Counter[int] = field(default_factory=Counter)
    """How many of those ranks were not to carry it out: another source gave the chunk."""
    found: dict[int, StoreHandshake] = field(default_factory=dict)
    """By rank, once: for a scheduler that did not hear of it at the start."""
    lost: list[Loss] = field(default_factory=list)
    gained: Counter[bytes] = field(default_factory=Counter)
    gone: Counter[bytes] = field(default_factory=Counter)
    adapters: AdapterReport | None = None
    """With every step's results, where adapters are served."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerResults":
        assert isinstance(other, WorkerResults)
        answers = dict(self.answers)
        for number, (ranks, failures) in other.answers.items():
            before = answers.get(number, (0, 0))
            answers[number] = before[0] + ranks, before[1] + failures
        return WorkerResults(
            answers,
            self.declined + other.declined,
            self.found | other.found,
            self.lost + other.lost,
            self.gained + other.gained,
            self.gone + other.gone,
            merged(self.adapters, other.adapters),
        )
