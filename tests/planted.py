"""Eight faults planted one after the other, and what ``kvconnect doctor`` says of each.

    python tests/planted.py

Runs the command as an operator does, in a process of its own. Prints docs/doctor.md's table: what
was planted, the verdict with fact and remedy, and the seconds of the whole command; exits with 1
if a fault was not named, had no remedy, was not the exit status, or ended in a traceback. The slow
link is a shaped one (``tc`` in a network namespace of its own), where that is allowed and
installed; else a relay that delays what passes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kit.running import HOST, KNOWN, running_engines

from kvconnect.config import SECRET_VARIABLE
from kvconnect.control.wire import Address
from kvconnect.doctor import network, peer
from kvconnect.testing.tcp import TcpFaults

COMMAND = (sys.executable, "-m", "kvconnect.cli", "doctor", "--json")
LIMIT_S = 120
NOT_INSTALLED = """
import sys, importlib.metadata
found = importlib.metadata.version
def version(name):
    if name.startswith("nixl"):
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("nixl"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""
RDMA_PORT = "sys/class/infiniband/mlx5_0/ports/1/state"
WITH_RDMA = """
import functools, pathlib, sys
from kvconnect.doctor import checks, host
checks.checks = functools.partial(checks.checks, root=pathlib.Path(sys.argv.pop(1)))
from kvconnect.cli import main
main()
"""
RELAYED = """
import importlib, sys
from kvconnect.control.wire import Address
host, port, key = sys.argv[1:4]  # an engine tells its own port, where no relay is
relay = Address(host, int(port), key)
importlib.import_module("kvconnect.cli.inspect").address_of = lambda _: relay
del sys.argv[1:4]
from kvconnect.cli import main
main()
"""
SHAPED = "ip link set lo up && tc qdisc add dev lo root tbf rate 200mbit burst 1mb latency 100ms"


class Planted(NamedTuple):
    """One row."""

    what: str
    subject: str
    """How the finding begins that is looked for."""
    verdict: str
    found: Mapping[str, Any]
    """That finding; empty if there was none."""
    status: int
    trace: bool
    seconds: float

    @property
    def right(self) -> bool:
        """Whether doctor said what it has to."""
        wanted = {"warning": 1, "fault": 2}[self.verdict]
        return bool(self.found.get("remedy")) and self.status >= wanted and not self.trace

    def row(self) -> str:
        """Of a Markdown table."""
        one = self.found or {"subject": "NOT NAMED", "fact": "", "remedy": ""}
        fact = f"{self.verdict}: {one['subject']}: {one['fact'][:160]} → {one['remedy']}"
        return f"| {self.what} | {fact} | {self.seconds:.1f} |"


def planted(
    what: str,
    subject: str,
    verdict: str = "fault",
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> Planted:
    """Run doctor; look for the first finding of that subject and verdict."""
    began = time.monotonic()
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | dict(environ or {}),
        timeout=LIMIT_S,
    )
    seconds = time.monotonic() - began
    said = json.loads(done.stdout)["findings"] if done.stdout.startswith("{") else []
    hits = [one for one in said if (one["verdict"], subject in one["subject"]) == (verdict, True)]
    trace = "Traceback" in done.stdout + done.stderr
    return Planted(what, subject, verdict, (*hits, {})[0], done.returncode, trace, seconds)


def config(**options: object) -> list[str]:
    """A configuration as an argument."""
    given = {"kv_connector": "KVConnectNixl", "kv_role": "kv_both"}
    return ["--config", json.dumps(given | {"kv_connector_extra_config": options})]


def of_this_host(folder: Path) -> list[Planted]:
    """Port, library, locked memory, address, option."""
    (folder / "sitecustomize.py").write_text(NOT_INSTALLED)
    without = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    for name, text in {RDMA_PORT: "4: ACTIVE", "dev/infiniband/uverbs0": ""}.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("proc", "sys/devices", "sys/bus", "sys/kernel", "dev/shm"):
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path("/", name))
    locked = ("prlimit", f"--memlock={64 << 10}", sys.executable, "-c", WITH_RDMA)
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        environ = {network.PORT: port, network.HOST: HOST}
        rows = [planted(f"`{network.PORT}` is taken", network.PORT, environ=environ)]
    return [
        *rows,
        planted("no nixl", "library of nixl", environ={"PYTHONPATH": without}),
        planted(
            "`ulimit -l 64`, an RDMA device in a copy of /sys",
            "memlock",
            command=(*locked, str(folder / "root"), "doctor", "--json"),
        ),
        planted(f"`{network.HOST}=203.0.113.7`", "host 203", environ={network.HOST: "203.0.113.7"}),
        planted("`kv_lease_duraton`", "duraton", arguments=config(kv_lease_duraton=20)),
    ]


def of_a_peer() -> list[Planted]:
    """Another model, another secret, a slow link; of engines that run beside."""
    with running_engines() as make:
        engine = make(mode="staged", fingerprint={"model_id": "SmolLM2"})
        known = {SECRET_VARIABLE: KNOWN.decode()}
        ours = config(transport="loopback", model_id="Qwen3")
        at = ["--peer", engine.address]
        rows = [
            planted("a peer of another `model_id`", "model", arguments=ours + at, environ=known),
            planted(
                "another secret",
                "peer",
                arguments=ours + at,
                environ={SECRET_VARIABLE: "a secret of our own, of 32 bytes"},
            ),
        ]
        if can_shape():
            return [*rows, shaped()]
        return [*rows, relayed(engine.movers[0].address, at, known)]


def relayed(address: Address, at: Sequence[str], known: Mapping[str, str]) -> Planted:
    """A peer behind a relay that keeps all that passes for a while."""
    with TcpFaults((HOST, address.port), seed=1) as link:
        link.delay_s = peer.SLOW_S
        through = (HOST, str(link.address[1]), address.key)
        return planted(
            f"a relay that keeps all for {peer.SLOW_S * 1e3:g} ms",
            "round trip",
            "warning",
            [*config(transport="loopback"), *at],
            known,
            (sys.executable, "-c", RELAYED, *through, "doctor", "--json"),
        )


def can_shape() -> bool:
    """Whether a network namespace with a shaped link can be made here."""
    if not all(map(shutil.which, ("unshare", "ip", "tc"))):
        return False
    return (
        subprocess.run(["unshare", "-n", "sh", "-c", SHAPED], capture_output=True).returncode == 0
    )


def shaped() -> Planted:
    """Loopback at 200 Mbit/s, over TCP, in a namespace that nobody else has."""
    command = ("unshare", "-n", "sh", "-c", f'{SHAPED} && exec "$@"', "sh", *COMMAND)
    return planted(
        "`tc qdisc add dev lo root tbf rate 200mbit …`, `UCX_TLS=tcp,self`",
        "nixl on this host",
        "warning",
        environ={"UCX_TLS": "tcp,self", network.HOST: HOST},
        command=command,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [*of_this_host(Path(folder)), *of_a_peer()]
    print("| Planted | Verdict, fact → remedy | Seconds |\n|---|---|---|")
    for one in rows:
        print(one.row())
    wrong = [one for one in rows if not one.right]
    print(f"{len(rows) - len(wrong)} of {len(rows)} named, with a remedy", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
