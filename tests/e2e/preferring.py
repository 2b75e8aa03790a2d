"""KVConnectMulti whose chain prefers what the file named by PREFER_FILE says: peers, stores, or
one child, by its label.

Which is the cheaper is measured, and another machine measures otherwise.
"""

import os
from pathlib import Path

from pair import PREFER_FILE

import kvconnect.chain.load
from kvconnect.chain.load import STORES_S
from kvconnect.chain.plan import Rates
from kvconnect.vllm.multi.connector import KVConnectMulti

__all__ = ["KVConnectMulti"]


class Preferring(Rates):
    """Measures nothing."""

    def start_s(self, source: str) -> float:
        return 0.0

    def seconds(self, source: str, nbytes: int) -> float:
        preferred = Path(os.environ[PREFER_FILE]).read_text()
        kind = "stores" if source in STORES_S else "peers"
        return 1e-9 if preferred in (kind, source) else float(nbytes)


kvconnect.chain.load.Rates = Preferring
