"""LoRA files for the tests: files as other tools write them, and the weight changes that a file stands for."""

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mindtune.models import lora_files

WIDTH = 32  # of the tiny transformer
Q0 = "transformer_blocks.0.attn.to_q"
Q1 = "transformer_blocks.1.attn.to_q"
SINGLE = "single_transformer_blocks.0.attn.to_q"


def write_adapter(path, ranks, metadata=None, extra=None):
    """Writes a file with `ranks` (layer -> rank) and the tensors `extra`. Returns the path and the tensors A and B."""
    rng, tensors = np.random.default_rng(0), {}
    for layer, rank in ranks.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = rng.standard_normal((rank, WIDTH)).astype(np.float32) * 0.2
        tensors[f"transformer.{layer}.lora_B.weight"] = rng.standard_normal((WIDTH, rank)).astype(np.float32) * 0.2
    save_file({**tensors, **(extra or {})}, path, metadata=metadata)
    return path, tensors


def weight_changes(path):
    """scale * B A of every layer in a file, float64."""
    tensors, alphas = lora_files.read_lora(path, "--lora")
    layers = [name[: -len(".lora_A.weight")] for name in tensors if name.endswith(".lora_A.weight")]
    changes = {}
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        changes[layer] = alphas[layer] / len(a) * (b @ a)
    return changes


def header(path):
    with safe_open(path, framework="numpy") as file:
        return file.metadata()
