"""Servers as child processes: each in a group of its own, with a log, and none left running.

Knows nothing of vLLM. Contract:

- Leaving a Fleet, however (Ctrl-C, SIGTERM and SIGHUP included), ends every server with its
  children: SIGTERM, then SIGKILL to what is left of the group. Should this process be killed
  itself, a watchdog kills the groups.
- A server that ends before it is up is a ServerError, which tells the end of its log.
"""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

from kvconnect.errors import KvConnectError

HOST = "127.0.0.1"
GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
_TRACKERS_S = 2.0
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 2.0
_TAIL_BYTES = 64 * 1024
# Its standard input ends when this process does, by whatever signal.
_WATCHDOG = 'read -r _; kill -s KILL -- "-$1"'


class ServerError(KvConnectError):
    """A server did not come up, or ended by itself."""


class Process(Protocol):
    """Leads a session of its own; a ``subprocess.Popen`` is one."""

    pid: int

    def poll(self) -> int | None:
        """The status it ended with; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The status, once it has ended; raises subprocess.TimeoutExpired before that."""


def launch(command: Sequence[str], env: Mapping[str, str] | None, log: Path) -> Process:
    """Starts ``command`` in a session of its own; ``env`` as for Server."""
    with log.open("wb") as out:
        return subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


Launch = Callable[[Sequence[str], Mapping[str, str] | None, Path], Process]
"""`launch`, or something that does the same in its own way."""


class Server:
    """One process group that answers ``/health`` on ``url``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        launch: Launch = launch,
    ) -> None:
        """``env`` is the whole environment; None is this process's."""
        self.name = name
        self.url = f"http://{HOST}:{port}"
        self.log = log
        self._port = port
        self._gone = False
        self._process = launch(command, env, log)
        self._watchdog = subprocess.Popen(  # noqa: S603 - a constant and a number
            ["/bin/sh", "-c", _WATCHDOG, "sh", str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The leader's process id, which is the group's as well."""
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The ids of all its processes."""
        return members_of(self.pid)

    def is_up(self) -> bool:
        """Whether ``/health`` says 200; raises ServerError once the process has ended."""
        if (status := self._process.poll()) is not None:
            raise ServerError(f"{self.name} ended with {_ending(status)}; its log: {self.log}")
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def pause(self, seconds: float) -> None:
        """Returns after ``seconds``, or at once when the process ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def last_lines(self, count: int = 20) -> list[str]:
        """The end of the log."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-count:]

    def ask_to_stop(self) -> None:
        """SIGTERM to the group, stopped or not; returns at once."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the group, after which nothing of it runs. Idempotent.

        Python's resource trackers live on for a moment: they unlink the shared memory that those
        who were killed leave in /dev/shm.
        """
        if self._gone:
            return
        for pid in members_of(self.pid):
            if not _is_resource_tracker(pid):
                kill_process(pid)
        deadline = time.monotonic() + _TRACKERS_S
        while members_of(self.pid) and time.monotonic() < deadline:
            self.pause(_POLL_S)  # reaps the leader
            time.sleep(0.01)
        self._signal(signal.SIGKILL)
        self._process.wait()
        while stragglers := members_of(self.pid):
            for pid in stragglers:  # of other groups in the session, or just about to go
                kill_process(pid)
            time.sleep(0.01)
        self._gone = True
        self._watchdog.kill()
        self._watchdog.communicate()

    def _signal(self, number: signal.Signals) -> None:
        if not self._gone:  # else the number may be another group's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


class Fleet:
    """Servers that live as long as this context; their logs are in ``logs``."""

    def __init__(self, logs: Path, launch: Launch = launch) -> None:
        """``launch`` starts the processes of all its servers."""
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = logs
        self._launch = launch
        self.servers: list[Server] = []
        self._ports: set[int] = set()
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._handlers[number] = signal.signal(number, _leave)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]

    def start(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        env: Mapping[str, str] | None = None,
    ) -> Server:
        """Starts ``command(port)`` for a free port; ``env`` as for Server."""
        port = self._free_port()
        server = Server(
            name,
            command(port),
            port=port,
            log=self.logs / f"{name.replace(' ', '-')}.log",
            env=env,
            launch=self._launch,
        )
        self.servers.append(server)
        return server

    def wait_up(
        self,
        servers: Sequence[Server],
        timeout_s: float,
        seen: Callable[[Server, bool], None] | None = None,
    ) -> None:
        """Returns when all are up; ``seen`` is called with each server at every look."""
        deadline = time.monotonic() + timeout_s
        waiting = list(servers)
        while waiting:
            for server in tuple(waiting):
                up = server.is_up()
                if seen is not None:
                    seen(server, up)
                if up:
                    waiting.remove(server)
            if not waiting:
                return
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"{waiting[0].name} is not up after {timeout_s:.0f} s; its log: "
                    f"{waiting[0].log}"
                )
            waiting[0].pause(_POLL_S)

    def close(self) -> None:
        """Ends all servers. Idempotent. Interrupted, it stops being patient."""
        try:
            for server in self.servers:
                server.ask_to_stop()
            deadline = time.monotonic() + GRACE_S
            for server in self.servers:
                server.pause(max(0.0, deadline - time.monotonic()))
        finally:
            for server in self.servers:
                server.kill()

    def _free_port(self) -> int:
        while True:
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:  # given away, but perhaps not bound yet
                self._ports.add(port)
                return port


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _ending(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def members_of(leader: int) -> list[int]:
    """Who runs in the leader's session or group; nobody where there is no /proc.

    Zombies do not count: in a container there may be no init that reaps them.
    """
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group, session = stat.read_text().rpartition(")")[2].split()[:4]
            if leader in (int(group), int(session)) and state not in "ZX":
                members.append(int(stat.parent.name))
    return members


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
