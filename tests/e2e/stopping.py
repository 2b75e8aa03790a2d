"""Connectors whose engine stops itself, or the engine that it reads, amid a transfer.

The file named by STOP_FILE says once which: "GROUP PORT", the engine's process group and the port
of its control channel. It is looked at whenever a transfer starts or a chunk is asked for.
"""

import os
import signal
from pathlib import Path

import kvconnect.consumer.fetch
import kvconnect.vllm.worker
from kvconnect.consumer.stage import ChunkReceiver
from kvconnect.vllm.mooncake.connector import KVConnectMooncake
from kvconnect.vllm.nixl import KVConnectNixl
from kvconnect.vllm.p2p.connector import KVConnectP2pNccl

__all__ = ["KVConnectMooncake", "KVConnectNixl", "KVConnectP2pNccl"]

STOP_FILE = "KVCONNECT_TEST_STOP_FILE"
FILE = Path(os.environ.get(STOP_FILE, "/nowhere"))


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


original_make = kvconnect.vllm.worker.make_transport
kvconnect.vllm.worker.make_transport = make_transport
kvconnect.consumer.fetch.ChunkReceiver = StoppingReceiver
