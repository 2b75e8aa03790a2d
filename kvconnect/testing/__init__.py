"""The shipped test kit, for tests of a transport that somebody plugs in, and of movers over it.

* `check_transport` holds any transport to `kvconnect.transport.base`, `check_channel` any control
  channel to `kvconnect.control.channel`; our own run them too.
* `Faulty` is a transport around another one, whose faults a test plans; `FakeClock` a clock that
  stands still; `Network` has control channels in memory, whose frames a test may hold and lose.
  `TcpFaults` spoils TCP between processes: cuts, delays, blocks, flips.
* Imports no test framework and no transport library.
"""

from kvconnect.testing.channels import check_channel
from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Fault, Faulty
from kvconnect.testing.network import Network
from kvconnect.testing.tcp import TcpFaults
from kvconnect.testing.transport import check_transport

__all__ = [
    "FakeClock",
    "Fault",
    "Faulty",
    "Network",
    "TcpFaults",
    "check_channel",
    "check_transport",
]
