"""Checkpoints with nothing but files in them, for tests of what tells weights apart."""

import json
import random
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save_file


def tensor(seed, nbytes=64):
    return np.frombuffer(random.Random(seed).randbytes(nbytes), np.uint8)


def write(folder, seeds, name="model.safetensors", nbytes=64):
    """A file of tensors, of so many bytes each; equal seeds, equal tensors."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor(seed, nbytes) for key, seed in seeds.items()}, path)
    return path


def write_index(folder, files):
    """``files``: tensor → file."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def load_config(load_format="auto", **changes):
    """As vLLM's, by default."""
    fields = {
        "load_format": load_format,
        "download_dir": None,
        "ignore_patterns": ["original/**/*"],
        "model_loader_extra_config": {},
    }
    return SimpleNamespace(**fields | changes)
