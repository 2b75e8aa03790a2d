"""Engines forked from a process that has vLLM imported already: up in seconds, not in thirty.

`Nursery` is what a test sees. The process itself imports, then forks one `vllm serve` per request
on its standard input; the engine's own processes are forked likewise. An engine ends with the
nursery. What a forked engine does not show: the command line's own start, and a hash seed of
Python's (PYTHONHASHSEED) that differs from the other engines'.
"""

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_tracker

from kvconnect.cli.engines import VllmServe, engine_env
from kvconnect.cli.processes import kill_process, launch, members_of

PR_SET_PDEATHSIG = 1
ADVERTISED = "KVCONNECT_TEST_ADVERTISED_PORT"
"""Variable: the port that peers are told of an engine's control channel, where a proxy listens."""
VLLM = VllmServe.PROGRAM
IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.benchmark.main",  # `vllm` imports all its subcommands
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.renderers.hf",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.llama",
    "model_hosting_container_standards.sagemaker",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "kvconnect.vllm.nixl",
    "kvconnect.vllm.offload.connector",
)


class Nursery:
    """Starts engines as `kvconnect.cli.processes.launch` does; a context."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=engine_env(),
            start_new_session=True,  # what interrupts us is no reason for it to end before us
        )
        self._lock = threading.Lock()

    def __enter__(self):
        assert self._process.stdout.readline(), "the nursery did not come up"
        return self

    def __exit__(self, *_):
        self._process.stdin.close()  # which ends it and its engines
        self._process.stdout.close()
        self._process.wait()

    def launch(self, command, env, log):
        """A command that is no `vllm serve` is started as ever."""
        if tuple(command[: len(VLLM)]) != VLLM:
            return launch(command, env, log)
        env = dict(os.environ if env is None else env)
        arguments = list(command[len(VLLM) :])
        return Forked(self, self.ask({"arguments": arguments, "env": env, "log": str(log)}))

    def ask(self, what):
        with self._lock:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        assert answer, f"the nursery ended with status {self._process.wait()}"
        return json.loads(answer)

    def status(self, pid):
        """What an engine that has ended ended with."""
        return os.waitstatus_to_exitcode(self.ask({"ended": pid}))


class Forked:
    """An engine as a `kvconnect.cli.processes.Process`."""

    def __init__(self, nursery, pid):
        self.nursery, self.pid = nursery, pid
        self._ends = os.pidfd_open(pid)
        self._status = None

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def wait(self, timeout=None):
        if self._status is None:
            if not select.select([self._ends], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("vllm", timeout)
            self._status = self.nursery.status(self.pid)
            os.close(self._ends)
        return self._status


def send(pid, number):
    """A signal to all of an engine's processes."""
    for member in members_of(pid):
        os.kill(member, number)


def kill(pid):
    """End all of an engine's processes at once."""
    while members := members_of(pid):
        for member in members:
            kill_process(member)


def main():
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # vLLM for CPUs insists on spawn
    spare = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    for module in IMPORTED:
        __import__(module)
    gc.collect()
    gc.freeze()  # what is collected by nobody is copied by nobody
    os.write(spare, b"ready\n")
    engines = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "ended" in asked:
            answer = os.waitpid(asked["ended"], 0)[1]
            engines.remove(asked["ended"])
        elif (answer := os.fork()) == 0:
            os.close(spare)
            _serve(**asked)
        else:
            engines.add(answer)
        os.write(spare, f"{answer}\n".encode())
    for pid in engines:
        kill(pid)


def _advertise(port):
    from kvconnect.control.wire import Address
    from kvconnect.vllm import worker

    class Advertised(worker.ZmqChannel):
        def __init__(self, host, link_port, key_port, *more, **options):
            super().__init__(host, link_port or key_port, 0, *more, **options)
            self.address = Address(host, port, self.address.key)

    worker.ZmqChannel = Advertised


def _serve(arguments, env, log):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    resource_tracker.ensure_running()  # one for all of the engine's processes, as with spawn
    if ADVERTISED in env:
        _advertise(int(env[ADVERTISED]))
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
