"""What the examples say when they cannot start; deploy/README.md has what they do when they can."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*/*.sh"))


def run(script, tmp_path, **env):
    return subprocess.run(
        ["bash", script],
        env=os.environ | {"LOGS": str(tmp_path / "logs"), "VLLM": "existing"} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def free_ports():
    """Bases of ports that nobody has, for a role each."""
    bases = {"PREFILL_PORT": "0", "DECODE_PORT": "0", "PROXY_PORT": "0"}
    for name in bases:
        with socket.create_server(("127.0.0.1", 0)) as server:
            bases[name] = str(server.getsockname()[1])
    return bases


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("role", ["PREFILL_PORT", "DECODE_PORT", "PROXY_PORT"])
def test_a_port_that_is_taken_is_named(script, role, tmp_path, free_ports):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(script, tmp_path, **free_ports | {role: str(port)})
    assert done.returncode == 1
    assert f"port {port}, of" in done.stderr
    assert f"set {role}" in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_gpus_that_are_not_there_are_counted(script, tmp_path, free_ports):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(script, tmp_path, MODEL="a/model", TP="2", PATH=path, **free_ports)
    engines = {"1p1d": 2, "xp1d": 3, "xpyd": 4}[script.parent.name]
    assert done.returncode == 1
    assert f"need {engines * 2} GPUs, nvidia-smi finds 1" in done.stderr


def test_an_engine_that_does_not_come_up_is_shown(tmp_path, free_ports):
    for name in ("vllm", "nvidia-smi"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'GPU {name}'; echo 'GPU of no use'\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(
        EXAMPLES / "1p1d/disagg_example_1p1d.sh", tmp_path, MODEL="m", PATH=path, **free_ports
    )
    assert done.returncode == 1
    assert "GPU of no use" in done.stderr
    assert "prefill0 ended before it was up" in done.stderr
