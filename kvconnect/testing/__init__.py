"""The shipped test kit: verified fakes, and the contracts that they and the real ones are held to.

* `check_transport` holds any transport to `kvconnect.transport.base`; `check_channel` any
  control channel to `kvconnect.control.channel`; `check_vault` any rank's stored KV to
  `kvconnect.offload.store.hand.Vault`. Our own run them, fakes included.
* `FakeClock`, `Network`, `Faulty`, `geometry` and `engines` let a test drive movers by `step`,
  without threads, sleeps or vLLM.
* Imports no test framework and no transport library.
"""

from kvconnect.testing.channels import check_channel
from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Fault, Faulty
from kvconnect.testing.network import Network
from kvconnect.testing.transport import check_transport
from kvconnect.testing.vault import FakeVault, VaultFault
from kvconnect.testing.vault_contract import check_vault

__all__ = [
    "FakeClock",
    "FakeVault",
    "Fault",
    "Faulty",
    "Network",
    "VaultFault",
    "check_channel",
    "check_transport",
    "check_vault",
]
