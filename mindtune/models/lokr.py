"""LoKr, an adapter whose weight change is a Kronecker product: its shapes, initial values and files. Pure NumPy.

The weight of a layer with l k outputs and m n inputs changes by scale * w1 ⊗ w2, where w1 is [l, m] and w2 is [k, n].
w2 may be the product of w2_a [k, rank] and w2_b [rank, n]; then the scale is alpha / rank, otherwise 1.

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (arXiv
2309.14859), section 3.4. The shapes, the initial values and the names are those of LyCORIS (`lycoris/modules/lokr.py`).
"""

from __future__ import annotations

import math

import numpy as np

from mindtune import rng


def factorise(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `dimension`, the smaller one first, as near to its square root as possible.

    A positive `factor` is one of them if it divides `dimension`; otherwise it bounds the smaller one.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    largest = math.isqrt(dimension) if factor < 0 else min(math.isqrt(dimension), factor)
    small = next(divisor for divisor in range(largest, 0, -1) if dimension % divisor == 0)
    return small, dimension // small


def shapes(outputs: int, inputs: int, rank: int, factor: int = -1) -> dict[str, tuple[int, int]]:
    """The shapes of a layer's factors by name. w2 is one matrix if `rank` is at least half of its larger side."""
    (left, right), (middle, last) = factorise(outputs, factor), factorise(inputs, factor)
    if rank >= max(right, last) / 2:
        return {"lokr_w1": (left, middle), "lokr_w2": (right, last)}
    return {"lokr_w1": (left, middle), "lokr_w2_a": (right, rank), "lokr_w2_b": (rank, last)}


def initial_value(seed: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    """The initial value of the parameter `name`: 0 for w2 and w2_b, so that a new adapter has no effect.

    The others are uniform within 1 / sqrt(columns), as PyTorch's kaiming_uniform_(a=sqrt(5)) makes them.
    """
    if name.endswith((".lokr_w2", ".lokr_w2_b")):
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    return rng.generator(seed, f"lora/{name}").uniform(-bound, bound, shape).astype(np.float32)


def with_scale(factors: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """The factors of a layer as `shapes` names them, with the scale multiplied into w1.

    LyCORIS may also store w1 as a product of two factors; it is multiplied out. Raises ValueError, the end of a
    sentence, unless they are factors of a linear layer.
    """
    sizes = {name: value.shape for name, value in factors.items()}
    first = ("lokr_w1",) if "lokr_w1" in factors else ("lokr_w1_a", "lokr_w1_b")
    second = ("lokr_w2",) if "lokr_w2" in factors else ("lokr_w2_a", "lokr_w2_b")
    if sizes.keys() != {*first, *second} or any(len(size) != 2 or 0 in size for size in sizes.values()):
        raise ValueError(f"factors of shapes {sizes}, which are not those of a linear layer")
    ranks = {sizes[pair[1]][0] for pair in (first, second) if len(pair) == 2}
    if len(ranks) > 1 or any(len(pair) == 2 and sizes[pair[0]][1] not in ranks for pair in (first, second)):
        raise ValueError(f"factors of shapes {sizes}, which do not have one rank")
    scale = np.float32(alpha / ranks.pop() if ranks else 1.0)
    left = factors[first[0]]
    if len(first) == 2:
        left = left.astype(np.float32) @ factors[first[1]].astype(np.float32)
    return {
        "lokr_w1": left if scale == 1.0 else left.astype(np.float32) * scale,
        **{name: factors[name] for name in second},
    }


def to_lycoris(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts `transformer.<layer>.lokr_w1` ... to LyCORIS' names, and those of CLIP to kohya's, which ComfyUI reads.

    Adds alpha, which is the rank, so that the scale is 1.
    """
    prefixes, found = {"transformer": "lycoris_", "text_encoder": "lora_te1_"}, {}
    for name, value in tensors.items():
        layer, _, factor = name.rpartition(".")
        model, _, layer = layer.partition(".")
        module = prefixes[model] + layer.replace(".", "_")
        found[f"{module}.{factor}"] = value
        if factor in ("lokr_w2", "lokr_w2_b"):
            found[f"{module}.alpha"] = np.array(value.shape[0] if factor == "lokr_w2_b" else 1, np.float32)
    return found
