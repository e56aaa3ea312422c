"""How much memory of an Ascend device a training step needs beside weights, gradients and optimizer state.

The numbers are fitted to a simulated device: MindSpore's own Ascend backend, which plans memory and launches nothing
(benchmarks/memory_plan.py --ascend). On an NPU we measured none of them.
"""

from __future__ import annotations

# What the backward pass keeps of a block, by name, in tensors of the size of its output, in half precision. A FLUX
# block computes an MLP of four times its width.
DOUBLE = {
    "input of the first norm": 1.0,
    "query and key before their norm": 2.0,
    "query, key and value of the attention": 3.0,
    "output of the attention, and its softmax statistics": 1.25,
    "input of the second norm": 1.0,
    "input of the GELU": 4.0,
}
SINGLE = {name: size for name, size in DOUBLE.items() if name != "input of the second norm"}
