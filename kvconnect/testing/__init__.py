"""The shipped test kit, for tests of a transport that somebody plugs in.

* `check_transport` holds any transport to `kvconnect.transport.base`; our own run it too.
* `Faulty` is a transport around another one, whose faults a test plans; `FakeClock` a clock that
  stands still. `TcpFaults` spoils TCP between processes: cuts, delays, blocks, flips.
* Imports no test framework and no transport library.
"""

from kvconnect.testing.clock import FakeClock
from kvconnect.testing.faulty import Fault, Faulty
from kvconnect.testing.tcp import TcpFaults
from kvconnect.testing.transport import check_transport

__all__ = ["FakeClock", "Fault", "Faulty", "TcpFaults", "check_transport"]
