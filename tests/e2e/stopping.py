"""Connectors whose engine stops itself, or the engine that it reads, amid a transfer.

The file named by STOP_FILE says once which: "GROUP PORT", the engine's process group and the port
of its control channel. It is looked at whenever a transfer starts or a chunk is asked for.

A worker whose mover is in one step for longer than a second says `STOOD_STILL` in its log, and
where; one that ran no Python for so long says that it did not. (`faulthandler` would say where that
was, but reads the frames of running threads: it ended workers that went on after a stop.)
"""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import kvconnect.consumer.reads
import kvconnect.vllm.worker
from kvconnect.consumer.stage import ChunkReceiver
from kvconnect.mover import Mover
from kvconnect.vllm.mooncake.connector import KVConnectMooncake
from kvconnect.vllm.nixl import KVConnectNixl
from kvconnect.vllm.p2p.connector import KVConnectP2pNccl

__all__ = ["KVConnectMooncake", "KVConnectNixl", "KVConnectP2pNccl"]

STOP_FILE = "KVCONNECT_TEST_STOP_FILE"
FILE = Path(os.environ.get(STOP_FILE, "/nowhere"))
STOOD_STILL = "stood still for longer than a second"
LONGEST_S, LOOK_S = 1.0, 0.25


def stop_if_told(peer: str) -> None:
    """``peer``: whom the transfer reads."""
    try:
        group, port = FILE.read_text().split()
        if int(group) == os.getpgrp() or f":{port}#" in peer:
            FILE.unlink()  # of two that see it one stops the engine
            os.killpg(int(group), signal.SIGSTOP)
    except (FileNotFoundError, ValueError):
        pass


def make_transport(*arguments):
    transport = original_make(*arguments)
    submit = transport.submit

    def submit_and_look(work):
        transfer_id = submit(work)
        stop_if_told(work.peer)
        return transfer_id

    transport.submit = submit_and_look
    return transport


class StoppingReceiver(ChunkReceiver):
    def _ask(self, *arguments):
        super()._ask(*arguments)
        stop_if_told("")


class WatchedMover(Mover):
    """Its steps, but for their wait for a frame, are timed."""

    def start(self, on_start=lambda: None):
        self.late_at, self.thread = float("inf"), 0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        super().start(on_start)

    def step(self, wait_s=0.0):
        self.thread, self.late_at = threading.get_ident(), time.monotonic() + wait_s + LONGEST_S
        try:
            return super().step(wait_s)
        finally:
            self.late_at = float("inf")

    def _watch(self):
        told = 0.0
        while not self._closed:
            looked = time.monotonic()
            time.sleep(LOOK_S)
            late_at, frames, now = self.late_at, sys._current_frames(), time.monotonic()
            if now - looked > LOOK_S + LONGEST_S:
                print(f"all of Python {STOOD_STILL}", file=sys.stderr, flush=True)
            elif told != late_at < now and self.thread in frames:
                told = late_at
                where = "".join(traceback.format_stack(frames[self.thread]))
                print(f"the mover's step {STOOD_STILL}:\n{where}", file=sys.stderr, flush=True)


kvconnect.vllm.worker.Mover = WatchedMover
original_make = kvconnect.vllm.worker.make_transport
kvconnect.vllm.worker.make_transport = make_transport
kvconnect.consumer.reads.ChunkReceiver = StoppingReceiver
