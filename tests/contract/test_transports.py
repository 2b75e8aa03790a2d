"""Every transport keeps the same contract, the fakes included."""

import gc
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from passive_rank import contents, make

from kvconnect.errors import ConfigError
from kvconnect.geometry.blocks import Region
from kvconnect.geometry.rows import RowTable
from kvconnect.testing import Faulty, check_transport
from kvconnect.testing.transport import CHECKS
from kvconnect.transport import registry
from kvconnect.transport.base import Op, Work
from kvconnect.transport.loopback import Fabric, LoopbackTransport
from kvconnect.transport.mooncake import transport as mooncake
from kvconnect.transport.registry import make_transport

LIBRARY = {"nixl": "nixl", "mooncake": "mooncake.engine", "ucx": "ucxx", "nccl": "fake_gpu"}
RANK = Path(__file__).with_name("passive_rank.py")
ROW, ROWS = 1 << 16, 512

every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


def real(name):
    """A transport's name as a parameter; skipped, with the reason, where its library is not."""
    before = dict(os.environ)
    try:
        if name == "ucx":
            importlib.import_module("libucx").load_library()
        importlib.import_module(LIBRARY[name])
        why_not = ""
    except ImportError as e:
        why_not = f"{name}: {e}"
    finally:  # ucxx sets variables that keep NIXL's UCX from using shared memory
        os.environ.clear()
        os.environ.update(before)
    return pytest.param(
        name, marks=[pytest.mark.slow, pytest.mark.skipif(bool(why_not), reason=why_not)]
    )


def _has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(autouse=True)
def fakes(request, monkeypatch):
    """What `make` wants for nccl; and NIXL reads even where its host has TCP alone."""
    monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("name") == "nccl":
        request.getfixturevalue("gpu")
        monkeypatch.setenv("FAKE_GPU", str(request.getfixturevalue("fake_gpu_folder")))


each_real = pytest.mark.parametrize("name", [real(name) for name in LIBRARY])


def loopback(ours, theirs):
    fabric = Fabric()
    return LoopbackTransport(ours, fabric), LoopbackTransport(theirs, fabric)


def faulty_loopback(ours, theirs):
    acting, passive = loopback(ours, theirs)
    return Faulty(acting), Faulty(passive)


@every_check
def test_loopback_keeps_the_contract(check):
    check(loopback)


@every_check
def test_faulty_without_faults_keeps_the_contract(check):
    check(faulty_loopback)


@each_real
@every_check
def test_it_keeps_the_contract(name, check):
    check(lambda *sides: [make(name, regions) for regions in sides])


def test_the_whole_suite_is_one_call():
    check_transport(loopback)


def test_the_suite_notices_a_transport_that_moves_nothing():
    class Idle(LoopbackTransport):
        def _move(self, work):
            return None

    def idle(ours, theirs):
        fabric = Fabric()
        return Idle(ours, fabric), Idle(theirs, fabric)

    with pytest.raises(AssertionError, match="other bytes changed"):
        check_transport(idle)


class Reader:
    """A transport of ours, and one that it reads from in another process."""

    def __init__(self, name):
        self.memory = np.zeros(ROW * ROWS, np.uint8)
        region = Region(int(self.memory.ctypes.data), self.memory.nbytes)
        self.transport = make(name, [region])
        self.process = subprocess.Popen(
            [sys.executable, RANK, name, str(self.memory.nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stdout:  # libraries print things, too
            if line.startswith("rank "):
                break
        _, address, hello = line.split()
        self.address, self.hello = int(address), bytes.fromhex(hello)
        self.transport.add_peer("peer", self.hello)

    def close(self):
        self.transport.close()
        self.process.kill()
        self.process.communicate()

    def submit(self, shift=0):
        """Transfer to read every row of theirs into the one ``shift`` places later of ours."""
        index = np.arange(ROWS, dtype=np.int32)
        ours, theirs = (
            RowTable(np.array([[at, ROW, ROW, ROWS]]), np.zeros(1, np.int64), "DRAM", 0)
            for at in (int(self.memory.ctypes.data), self.address)
        )
        shifted = np.roll(index, -shift)
        return self.transport.submit(
            Work(Op.READ, "peer", ours, shifted, theirs, index, self.memory.nbytes)
        )

    def poll(self, until, seconds=60.0):
        """Poll until so many transfers have ended; those that have."""
        ended, deadline = [], time.monotonic() + seconds
        while len(ended) < until and time.monotonic() < deadline:
            ended += self.transport.poll()
            time.sleep(100e-6)
        return ended

    def read_all(self):
        self.submit()
        (done,) = self.poll(1)
        assert done.error is None, done.error
        assert np.array_equal(self.memory, contents(self.memory.nbytes))


@pytest.fixture
def reader(name):
    reader = Reader(name)
    yield reader
    reader.close()


@each_real
def test_a_peer_that_is_killed_ends_its_transfers(name, reader):
    reader.read_all()
    transfers = [reader.submit(shift) for shift in range(1, 4)]
    early = reader.poll(1, seconds=0.002)  # so that it is amid them, unless it is very fast
    reader.process.kill()
    reader.process.wait()
    late = reader.submit()
    ended = [*early, *reader.poll(4 - len(early), seconds=5)]
    if len(ended) < 4:  # silence is allowed; being told is not to be ignored
        reader.transport.drop_peer("peer")
        ended += reader.poll(4 - len(ended))
    assert sorted(done.transfer_id for done in ended) == [*transfers, late]
    assert next(done for done in ended if done.transfer_id == late).error
    before = reader.memory.copy()
    assert reader.poll(1, seconds=0.3) == []
    assert np.array_equal(reader.memory, before), "memory changed after the transfers' end"


class Rank:
    """One of the scripts beside this file."""

    def __init__(self, script, *args):
        self.process = subprocess.Popen(
            [sys.executable, RANK.with_name(script), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self, word):
        """The rest of the next line that begins with it; libraries print things, too."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise AssertionError(f"it ended, with {self.process.wait()}, and did not say {word}")

    def tell(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        self.process.kill()
        self.process.communicate()


OVER_TCP = pytest.param("nixl", {"UCX_TLS": "tcp"}, marks=real("nixl").marks, id="nixl-tcp")
READERS = [pytest.param(*real(n).values, {}, marks=real(n).marks, id=n) for n in LIBRARY]


@pytest.mark.parametrize(("name", "env"), [*READERS, OVER_TCP])
def test_a_reader_that_is_killed_does_not_end_the_peer_it_reads(name, env, monkeypatch):
    """What UCX 1.23 emulates by messages, as NIXL's reads over TCP, ends the process read."""
    monkeypatch.delenv("UCX_PROTO_EMULATION_ENABLE")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    nbytes = ROW * ROWS
    peer, readers = Rank("passive_rank.py", name, nbytes), []
    try:
        where = peer.says("rank").split()
        for _ in range(2):
            readers.append(Rank("reading_rank.py", name, nbytes, *where))
            error = readers[-1].says("ended")
            if name != "nixl":
                assert error == "None"
            elif env:
                assert error != "None", "it was emulated"
            os.kill(peer.process.pid, signal.SIGSTOP)
            readers[-1].tell()
            readers[-1].says("reading")
            readers[-1].end()
            os.kill(peer.process.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert peer.process.poll() is None, "the peer has ended"
    finally:
        for rank in (peer, *readers):
            rank.end()


@pytest.mark.parametrize("name", [real("mooncake"), real("ucx"), real("nccl")])
def test_a_peer_that_is_stopped_is_fenced_off_and_may_come_back(name, reader, monkeypatch):
    monkeypatch.setattr(mooncake, "FENCE_S", 0.5)
    reader.read_all()
    transfers = [reader.submit(shift) for shift in range(1, 4)]
    early = reader.poll(1, seconds=0.002)
    os.kill(reader.process.pid, signal.SIGSTOP)
    early += reader.poll(3, seconds=0.2)
    reader.transport.drop_peer("peer")
    ended = [*early, *reader.poll(3 - len(early))]
    assert sorted(done.transfer_id for done in ended) == transfers
    assert ended[-1].error
    before = reader.memory.copy()
    os.kill(reader.process.pid, signal.SIGCONT)
    assert reader.poll(1, seconds=0.5) == []
    assert np.array_equal(reader.memory, before), "memory changed after the transfers' end"
    reader.transport.add_peer("peer", reader.hello)
    reader.read_all()


@pytest.mark.parametrize("name", [real("nixl")])
def test_a_nixl_backend_that_is_absent_is_a_startup_error(name):
    with pytest.raises(ConfigError, match="NOPE"):
        make_transport(name, [], "127.0.0.1", {"backends": ["NOPE"]})


@pytest.mark.parametrize("name", [real("mooncake")])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mooncake_protocol": "rmda"}, "rmda"),
        ({"devicename": "mlx5_0"}, "did you mean 'device_name'"),
        ({"metadata_server": "http://127.0.0.1:1/metadata"}, "127.0.0.1:1"),
    ],
)
def test_what_mooncake_cannot_do_is_a_startup_error(name, options, reason):
    with pytest.raises(ConfigError, match=reason):
        make_transport(name, [], "127.0.0.1", {"mooncake_protocol": "tcp", **options})


def http_server(port, folder):
    command = [sys.executable, "-m", "mooncake.http_metadata_server", "--port", str(port)]
    return command, f"http://127.0.0.1:{port}/metadata"


def etcd(port, folder):
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd here (Debian: etcd-server)")
    urls = [f"http://127.0.0.1:{one}" for one in (port, free_port())]
    clients = [f"--{kind}-client-urls={urls[0]}" for kind in ("listen", "advertise")]
    peers = [f"--{kind}-peer-urls={urls[1]}" for kind in ("listen", "initial-advertise")]
    among = f"--initial-cluster=default={urls[1]}"
    return ["etcd", f"--data-dir={folder}", *clients, *peers, among], f"etcd://127.0.0.1:{port}"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("name", [real("mooncake")])
@pytest.mark.parametrize("kind", [http_server, etcd])
def test_mooncake_engines_find_each_other_through_a_metadata_server(name, kind, tmp_path):
    command, url = kind(free_port(), tmp_path)
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    options = {"mooncake_protocol": "tcp", "metadata_server": url}
    deadline = time.monotonic() + 60

    def make_rig(*sides):
        while True:  # until the server is up
            try:
                made = [make_transport(name, regions, "127.0.0.1", options) for regions in sides]
            except ConfigError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
                continue
            return made

    try:
        CHECKS["a_read_moves_exactly_the_rows_named"](make_rig)
    finally:
        server.kill()
        server.wait()


ON_IPV6 = """
import sys
from kvconnect.testing.transport import CHECKS
from kvconnect.transport.registry import make_transport

options = {"mooncake_protocol": "tcp"} if sys.argv[1] == "mooncake" else {}
CHECKS["a_read_moves_exactly_the_rows_named"](
    lambda *sides: [make_transport(sys.argv[1], regions, "::1", options) for regions in sides]
)
"""


@pytest.mark.skipif(not _has_ipv6(), reason="this host has no IPv6 loopback address")
@pytest.mark.parametrize("name", [real("nixl"), real("mooncake"), real("ucx")])
def test_peers_are_reached_by_an_ipv6_address(name):
    """Mooncake took ::1:15000 for no address. A process of its own: it reads how to once."""
    subprocess.run([sys.executable, "-c", ON_IPV6, name], check=True, timeout=110)


@pytest.mark.parametrize("name", [real("nixl"), real("mooncake"), real("ucx")])
def test_a_transfer_of_many_rows_keeps_nobody_waiting(name):
    """NIXL posted all rows in submit, 1.7 µs each, and its thread answered nobody meanwhile."""
    rows, size = 200_000, 128
    memory = [np.zeros(2 * rows * size, np.uint8) for _ in range(2)]
    ours, theirs = (make(name, [Region(int(m.ctypes.data), m.nbytes)]) for m in memory)
    ours.add_peer("p", theirs.hello())
    tables = [
        RowTable(np.array([[m.ctypes.data, size, 2 * size, rows]]), np.zeros(1, int), "DRAM", 0)
        for m in memory
    ]
    gc.collect()  # what this thread does for the transport, and for nothing else
    gc.disable()
    longest, ended, index = 0.0, [], np.arange(rows, dtype=np.int32)
    work = Work(Op.READ, "p", tables[0], index, tables[1], index, rows * size)
    for step in range(200):
        began = time.thread_time()
        if step == 0:
            ours.submit(work)
        else:
            ended = ours.poll()
        longest = max(longest, time.thread_time() - began)
        theirs.poll()
        if ended:
            break
    gc.enable()
    ours.close()
    theirs.close()
    assert not ended or ended[0].error is None
    assert longest < 0.15, "all at once took 0.34 s"


@pytest.mark.parametrize("name", [real("mooncake")])
@pytest.mark.skipif(os.path.isdir("/sys/class/infiniband"), reason="this host may have RDMA")
def test_mooncake_does_not_take_tcp_for_rdma(name):
    """It does so by itself, without a word."""
    with pytest.raises(ConfigError, match="no RDMA device"):
        make_transport(name, [], "127.0.0.1", {})


@pytest.mark.parametrize(
    ("name", "mistyped", "said"),
    [
        ("nixl", "backend", "did you mean 'backends'"),
        ("mooncake", "protocol", "did you mean 'mooncake_protocol'"),
        ("nccl", "num_channels", "did you mean 'nccl_num_channels'"),
        ("ucx", "tls", "there are no options"),
    ],
)
def test_an_option_that_a_transport_has_not_is_a_startup_error_naming_the_nearest(
    name, mistyped, said
):
    reason = f"transport {name}: unknown option '{mistyped}' in transport_options; {said}"
    with pytest.raises(ConfigError, match=reason):
        make_transport(name, [], "127.0.0.1", {mistyped: "x"})


def test_device_memory_is_refused_by_ucx_at_startup():
    with pytest.raises(ConfigError, match="host memory only"):
        make_transport("ucx", [Region(4096, 4096, "VRAM")], "127.0.0.1", {})


def test_an_unknown_transport_is_a_startup_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match="mooncake, nccl, nixl, ucx"):
        make_transport("nope", [], "127.0.0.1", {})


def test_another_package_can_add_a_transport(tmp_path, monkeypatch):
    metadata = tmp_path / "acme-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{registry.GROUP}]\nacme = acme:make\nbroken = acme:absent\nnixl = acme:make\n"
    )
    (tmp_path / "acme.py").write_text("def make(*given): return given\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert make_transport("acme", [], "a-host", {"x": 1}) == ([], "a-host", {"x": 1})
    with pytest.raises(ConfigError, match="absent"):
        make_transport("broken", [], "a-host", {})
