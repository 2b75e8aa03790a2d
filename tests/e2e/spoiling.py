"""A prefill engine's connector that spoils chunks on their way, as a broken machine would.

Which way, the file named by SPOIL_FILE says; it is looked at for every chunk. "stopped N" stops the
processes of group N, once, when a chunk is about to be written.
"""

import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from pair import SPOIL_FILE

import kvconnect.mover
import kvconnect.producer.stage
from kvconnect.producer.stage import ChunkSender
from kvconnect.vllm import KVConnectNixl

LATE_S = 20.0  # longer than the decode engine's load_timeout


def fault() -> str:
    path = Path(os.environ[SPOIL_FILE])
    return path.read_text() if path.exists() else ""


class SpoilingSender(ChunkSender):
    """Does what it should, but for the fault of the day."""

    def _gather(self, link, want):
        if fault() == "out of range":
            found = kvconnect.producer.stage.segments

            def beyond(*args):
                chosen = found(*args)
                chosen[-1, 0] = 1 << 30
                return chosen

            kvconnect.producer.stage.segments = beyond
            try:
                super()._gather(link, want)
            finally:
                kvconnect.producer.stage.segments = found
        else:
            super()._gather(link, want)

    def _write(self, filling):
        kind = fault()
        start, nbytes = self._slots.address(filling.slot), filling.want.nbytes
        chunk = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(start), dtype=np.uint8)
        if kind == "flipped":
            chunk[nbytes // 2] ^= 1
        elif kind == "swapped":
            size = nbytes // 4
            a, b = chunk[:size].copy(), chunk[size : 2 * size].copy()
            chunk[:size], chunk[size : 2 * size] = b, a
        elif kind == "late":
            if not hasattr(filling, "not_before"):
                filling.not_before = time.monotonic() + LATE_S
            if time.monotonic() < filling.not_before:
                return
        elif kind.startswith("stopped "):
            Path(os.environ[SPOIL_FILE]).write_text("")
            os.killpg(int(kind.split()[1]), signal.SIGSTOP)
        submit = self._transport.submit

        def half(work):
            keep = len(work.local_index) // 2
            return submit(
                replace(
                    work,
                    local_index=work.local_index[:keep],
                    remote_index=work.remote_index[:keep],
                )
            )

        if kind == "truncated":
            self._transport.submit = half
        try:
            super()._write(filling)
        finally:
            self._transport.__dict__.pop("submit", None)


kvconnect.mover.ChunkSender = SpoilingSender


class SpoilingConnector(KVConnectNixl):
    """For ``kv_connector_module_path``."""
