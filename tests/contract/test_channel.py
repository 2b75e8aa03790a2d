"""ZMQ and the in-memory network keep the same contract."""

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from kvconnect.control.channel import FILES, UNACKNOWLEDGED_MS, ZmqChannel
from kvconnect.control.wire import Address
from kvconnect.errors import ConfigError, WireError
from kvconnect.testing.channels import CHECKS, check_channel
from kvconnect.testing.network import Network

every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@every_check
def test_the_in_memory_network_keeps_the_contract(check):
    check(Network().channel)


@every_check
def test_zmq_keeps_the_contract(check):
    check(lambda: ZmqChannel("127.0.0.1", 0))


def test_a_name_that_is_slow_to_look_up_keeps_no_other_peer_waiting(monkeypatch):
    """ZMQ looks names up in its I/O thread; what a client sends may be such a name."""
    ours, theirs = ZmqChannel("127.0.0.1", 0), ZmqChannel("127.0.0.1", 0)
    contexts = []
    make = zmq.Context.socket

    def noted(context, kind, *more, **options):
        if kind == zmq.DEALER:  # of a link that is dialled
            contexts.append(context)
        return make(context, kind, *more, **options)

    monkeypatch.setattr(zmq.Context, "socket", noted)
    for host in ("localhost", "127.0.0.1", "::1", "[::1]", "fe80::1%lo"):
        ours.dial(Address(host, theirs.address.port))
    named, shared, *others = contexts
    assert named is not shared and others == [shared] * 3
    ours.close()
    theirs.close()
    assert named.closed and shared.closed


def test_who_listens_everywhere_names_one_address_and_is_reached_at_all():
    channel = ZmqChannel("127.0.0.1", 0, bind="0.0.0.0")
    try:
        assert channel.address.host == "127.0.0.1"
        socket.create_connection(("127.0.0.2", channel.address.port), 5).close()
    finally:
        channel.close()


def test_a_default_port_that_is_taken_is_another_engines(caplog):
    """Used to be: two KVConnectP2pNccl engines on a host did not start."""
    first = ZmqChannel("127.0.0.1", 0)
    port = first.key_address.port
    with pytest.raises(ConfigError, match=str(port)):
        ZmqChannel("127.0.0.1", key_port=port)
    second = ZmqChannel("127.0.0.1", key_port=port, or_another=True)
    try:
        assert second.key_address.port != port
        socket.create_connection(("127.0.0.1", second.key_address.port), 5).close()
        assert f"port {port}, the default, is taken" in caplog.text
    finally:
        first.close()
        second.close()


def test_the_name_of_a_link_cannot_be_guessed():
    """ZMQ counts its links, and gives the name of one that has ended to whoever asks for it."""
    ours, theirs = ZmqChannel("127.0.0.1"), ZmqChannel("127.0.0.1")
    try:
        names = set()
        for _ in range(3):
            link = ours.dial(theirs.address)
            ours.send(link, b"hello")
            (frame,) = _first(theirs, lambda f: f.data)
            names.add(frame.link.key)
        assert len(names) == 3 and all(len(name) == 32 and name.isalnum() for name in names)
    finally:
        ours.close()
        theirs.close()


def test_the_whole_suite_is_one_call():
    check_channel(Network().channel)


def test_a_port_that_is_taken_is_a_startup_error():
    network = Network()
    taken = network.channel().address
    with pytest.raises(ConfigError, match="taken"):
        network.channel(taken.host, taken.port)
    channel = ZmqChannel("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="VLLM_NIXL_SIDE_CHANNEL_PORT"):
        ZmqChannel("127.0.0.1", channel.address.port)
    channel.close()


def test_a_held_network_delivers_drops_and_repeats_what_the_test_names():
    network = Network(held=True)
    ours, theirs = network.channel(), network.channel()
    link = ours.dial(theirs.address)
    for data in (b"a", b"b", b"c"):
        ours.send(link, data)
    assert theirs.poll(0) == []
    network.repeat(2)
    network.deliver(2)
    network.drop(0)
    network.flush()
    assert [f.data for f in theirs.poll(0)] == [b"c", b"c", b"b"]


def test_a_thousand_ranks_can_be_dialled():
    """Used to be: 340, and then "Too many open files" for ever."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"the system allows {hard} files")
    near, far = ZmqChannel("127.0.0.1", 0), ZmqChannel("127.0.0.1", 0)
    try:
        for port in range(1000):
            near.dial(Address("127.0.0.1", 20_000 + port))
        link = near.dial(far.address)
        near.send(link, b"hello")
        (frame,) = _first(far, lambda f: f.data)
        far.send(frame.link, b"and back")
        arrived = _first(near, lambda f: f.link == link and f.data)
        assert [f.data for f in arrived] == [b"and back"]
    finally:
        near.close()
        far.close()


def _first(channel, wanted):
    """What is wanted of the first poll that has any; a loaded host takes long to dial 1,000."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if arrived := [frame for frame in channel.poll(0.1) if wanted(frame)]:
            return arrived
    return []


def test_hosts_that_are_not_found_leave_no_files_open(monkeypatch):
    """Used to be one for each: clients name hosts, and a process may have so many files."""
    monkeypatch.setattr("kvconnect.control.channel.NAMES", 4)
    channel, files = ZmqChannel("127.0.0.1", 0), Path("/proc/self/fd")
    before = len(list(files.iterdir()))
    for number in range(40):
        link = channel.dial(Address(f"kvconnect-no-host-{number}", 1))
        channel.send(link, b"hello")
        channel.poll(0)
        channel.drop(link)
    until = time.monotonic() + 60.0
    while (left := len(list(files.iterdir())) - before) > 20:  # ten of them are ZMQ's threads'
        assert time.monotonic() < until, f"{left} files are left open"
        time.sleep(0.1)
    channel.close()


FLOODED = """
import time
from kvconnect.control.channel import ZmqChannel
ours, theirs = ZmqChannel("127.0.0.1", 0), ZmqChannel("127.0.0.1", 0)
link = theirs.dial(ours.address)
theirs.send(link, b"x")
while not ours.poll(0.1):
    pass
for _ in range(5000):
    theirs.send(link, bytes(5000))
time.sleep(0.5)
theirs.close()
time.sleep(7.0)
print(sum(len(ours.poll(0.1)) for _ in range(20)))
"""


EXHAUSTED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from kvconnect.control.channel import ZmqChannel
from kvconnect.control.wire import Address
from kvconnect.errors import WireError
channel, links, refused = ZmqChannel("127.0.0.1", 0), [], 0
for number in range(300):
    host = "127.0.0.1" if number % 5 else f"kvconnect-no-host-{number}"
    try:
        links.append(channel.dial(Address(host, 1 + number)))
    except WireError:
        refused += 1
files = [open("/dev/null") for _ in range(32)]
for link in links:
    channel.drop(link)
print(len(links), refused)
"""


def test_a_process_without_files_dials_nobody_and_lives():
    """Used to be: libzmq aborted it, where a host had to be looked up; clients name hosts."""
    ended = subprocess.run(
        [sys.executable, "-c", EXHAUSTED], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    dialled, refused = map(int, ended.stdout.split())
    assert dialled and refused, "it did not run out of files"


def test_files_that_others_take_just_then_fail_a_dial_as_any_other(monkeypatch):
    """Used to be: libzmq's own error ended the mover's thread, and with it the engine."""

    def no_files(*_):
        raise zmq.ZMQError(errno.EMFILE)

    channel = ZmqChannel("127.0.0.1", 0)
    with monkeypatch.context() as patch:
        patch.setattr(zmq.Socket, "get_monitor_socket", no_files)
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(WireError, match="Too many open files"):
                channel.dial(Address(host, 1))
    channel.drop(channel.dial(Address("localhost", channel.address.port)))
    channel.close()


def test_a_peer_that_floods_us_and_goes_ends_nothing():
    """With heartbeats, libzmq aborted the process of a mover that was busy meanwhile."""
    ended = subprocess.run(
        [sys.executable, "-c", FLOODED], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0, "nothing arrived"


def test_hosts_that_vanish_are_noticed_by_tcp():
    """Else what they dialled stays open for ever: nobody sends anything over it."""
    ours, theirs = ZmqChannel("127.0.0.1", 0), ZmqChannel("127.0.0.1", 0)
    theirs.send(theirs.dial(ours.address), b"x")
    deadline = time.monotonic() + 60
    while timers_of(ours.address.port) != ["02", "02"]:  # once what was sent is acknowledged
        assert time.monotonic() < deadline, "TCP keeps no watch over both ends of the connection"
        ours.poll(0.1)
    for channel in (ours, theirs):
        channel.close()


def test_links_over_which_nothing_is_acknowledged_are_noticed_by_tcp():
    """Keepalive waits while something is under way: a dead link with renewals stayed for 15 min."""
    ours, theirs = ZmqChannel("127.0.0.1", 0), ZmqChannel("127.0.0.1", 0)
    link = theirs.dial(ours.address)
    deadline = time.monotonic() + 60
    while not ours.poll(0.1):
        assert time.monotonic() < deadline, "nothing arrived"
        theirs.send(link, b"x")
    assert waits_of(ours.address.port) == [UNACKNOWLEDGED_MS, UNACKNOWLEDGED_MS]
    for channel in (ours, theirs):
        channel.close()


def waits_of(port):
    """For how long our connections from or to a port wait until what was sent is acknowledged."""
    found = []
    for file in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(file)) as one:
            if port in (one.getsockname()[1], one.getpeername()[1]):
                found.append(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


def timers_of(port):
    """Of TCP connections from or to a port, the timers that run: 02 is keepalive's (proc(5))."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for t in tables if t.exists() for line in t.read_text().splitlines()]
    ends = (f for f in lines if f[3] == "01" and f":{port:04X}" in (f[1][-5:], f[2][-5:]))
    return [f[5][:2] for f in ends]
