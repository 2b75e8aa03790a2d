"""Lends Mooncake the libibverbs that NIXL's wheel brings, on a host that has none of its own.

    .venv/bin/python scripts/link_ibverbs.py        after installing both; does nothing twice

Mooncake's wheel expects libibverbs.so.1 of the host (Debian: libibverbs1) even for TCP. Hosts with
RDMA have it; one that only runs tests need not be changed, and need no root, for this. The links
go where Mooncake's engine looks first, beside the libraries of its own wheel.
"""

import ctypes
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def main() -> None:
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        pass
    else:
        return  # the host's own, which knows its devices
    lenders = sorted(SITE.glob("nixl_cu1*.libs/libibverbs-*"))
    for borrower in SITE.glob("mooncake_transfer_engine*.libs"):
        for lender in lenders[:1]:
            for found, name in [
                (lender, "libibverbs.so.1"),
                *((needed, needed.name) for needed in lender.parent.glob("libnl-*")),
            ]:
                (borrower / name).unlink(missing_ok=True)
                (borrower / name).symlink_to(found)


if __name__ == "__main__":
    main()
