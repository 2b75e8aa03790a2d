"""Engines forked from a process that has vLLM imported already: up in seconds, not in thirty.

`Nursery` is what a test sees. The process itself imports, then forks one `vllm serve` per line of
its standard input; the engine's own processes are forked likewise. An engine ends with the nursery.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys

from kvconnect.cli.engines import engine_env
from kvconnect.cli.processes import _kill, _members

PR_SET_PDEATHSIG = 1
IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "kvconnect.vllm",
)


class Nursery:
    """Starts engines and kills them -9; a context."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=engine_env(),
        )
        self._pids = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in list(self._pids):
            self.kill(pid)
        self._process.stdin.close()
        self._process.wait()

    def start(self, arguments, log):
        """Run ``vllm`` with these arguments; its process id, which is its session's too."""
        print(json.dumps([list(arguments), str(log)]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the nursery ended with status {self._process.wait()}"
        pid = int(answer)
        self._pids.add(pid)
        return pid

    def kill(self, pid):
        """End all of an engine's processes at once."""
        self._pids.discard(pid)
        while members := _members(pid):
            for member in members:
                _kill(member)


def main():
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # vLLM for CPUs insists on spawn
    spare = os.dup(1)
    os.dup2(2, 1)  # what imports print is no process id
    for module in IMPORTED:
        __import__(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    for line in sys.stdin:
        arguments, log = json.loads(line)
        if (pid := os.fork()) == 0:
            _serve(arguments, log)
        os.write(spare, f"{pid}\n".encode())


def _serve(arguments, log):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", *arguments]
    status = 1
    with contextlib.suppress(BaseException):
        try:
            vllm()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
    os._exit(status)


if __name__ == "__main__":
    main()
