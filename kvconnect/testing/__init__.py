"""The shipped test kit: verified fakes, and the contracts that they and the real ones are held to.

* `check_transport` holds any transport to `kvconnect.transport.base`; `check_channel` any
  control channel to `kvconnect.control.channel`. Our own run them, fakes included.
* `FakeClock`, `Network`, `Faulty`, `geometry` and `engines` let a test drive movers by `step`,
  without threads, sleeps or vLLM.
* Imports no test framework and no transport library.
"""

from kvconnect.testing.channels import check_channel
from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Fault, Faulty
from kvconnect.testing.network import Network
from kvconnect.testing.transport import check_transport

__all__ = [
    "FakeClock",
    "Fault",
    "Faulty",
    "Network",
    "check_channel",
    "check_transport",
]
