"""Models and adapters that are told apart by their content alone."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 8


def copy_of(model: Path, folder: Path, scaled: float = 1.0) -> Path:
    """The model in a folder of its name in ``folder``; ``scaled``: how its middle layer's values
    are, which changes no file's name or size."""
    path = folder / model.name
    shutil.copytree(model, path)
    if scaled != 1.0:
        weights = path / "model.safetensors"
        tensors = load_file(weights)
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        tensors[f"model.layers.{layers // 2}.self_attn.v_proj.weight"] *= scaled
        weights.unlink()
        save_file(tensors, weights, {"format": "pt"})
    return path


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """A random adapter of all query and value projections, as PEFT saves one."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_key_value_heads"]
    sizes = {"q_proj": hidden, "v_proj": heads * config["head_dim"]}
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, size in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=random) * 0.05
            tensors[f"{name}.lora_B.weight"] = torch.randn(size, RANK, generator=random) * 0.05
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder
