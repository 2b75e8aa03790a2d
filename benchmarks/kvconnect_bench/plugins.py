"""Functions of ours that vLLM calls in each process of an engine, as its general plugins."""

import os
from pathlib import Path


def plugged(folder: Path, name: str, function: str) -> dict[str, str]:
    """Environment of an engine that calls ``function``, a ``module:name``, in every process.

    ``folder``, which must be there, then is on the engine's path and has the entry point.
    """
    plugin = folder / f"{name.replace('-', '_')}-0.dist-info"
    plugin.mkdir(exist_ok=True)
    (plugin / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    entry = f"[vllm.general_plugins]\n{name.replace('-', '_')} = {function}\n"
    (plugin / "entry_points.txt").write_text(entry)
    ours = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(folder), str(ours), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}
