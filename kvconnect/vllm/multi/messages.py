"""What crosses between the halves of a connector of several: children's, side by side."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_events import KVConnectorKVEvents
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorMetadata

from kvconnect.chain.load import CancelLoad, ChainedLoad


@dataclass
class MultiMetadata(MultiKVConnectorMetadata):
    """A step's metadata of every child, and what the chain of ours is to load."""

    chain: list[ChainedLoad | CancelLoad] = field(default_factory=list)

    def take(self) -> list[ChainedLoad | CancelLoad]:
        """The chain's, the first time."""
        taken, self.chain = self.chain, []
        return taken


@dataclass
class Handshakes(KVConnectorHandshakeMetadata):
    """The handshakes of every child of one rank; None where it has none."""

    children: tuple[KVConnectorHandshakeMetadata | None, ...]


class MultiEvents(KVConnectorKVEvents):
    """KV events of workers, by child: each keeps its own kind, and counts its own workers."""

    def __init__(self, children: dict[int, KVConnectorKVEvents]) -> None:
        self.children = children

    def get_all_events(self) -> list[Any]:
        """Pairs (child, its events), for `add_events` of another."""
        return list(self.children.items())

    def add_events(self, events: list[Any]) -> None:
        for child, theirs in events:
            if child in self.children:
                self.children[child].add_events(theirs.get_all_events())
                self.children[child].increment_workers(1)
            else:
                self.children[child] = theirs

    def increment_workers(self, count: int = 1) -> None:
        """`add_events` has done so, child by child."""

    def get_number_of_workers(self) -> int:
        return max((one.get_number_of_workers() for one in self.children.values()), default=0)

    def aggregate(self) -> "MultiEvents":
        return MultiEvents({child: one.aggregate() for child, one in self.children.items()})

    def clear_events(self) -> None:
        for one in self.children.values():
            one.clear_events()
