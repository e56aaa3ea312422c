"""Merging into a component's files: memory, and tensors that are no weights."""

import tracemalloc

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file

from mindtune.models.lora_edit import Pair
from mindtune.models.merged_pipeline import write_merged
from mindtune.models.safetensors_file import write_safetensors

ENTRIES = {f"layer{n}.weight": ("F16", (512, 1024)) for n in range(20)}


def write_component(root, name, entries, arrays):
    (root / "base" / name).mkdir(parents=True)
    (root / "merged" / name).mkdir(parents=True)
    stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
    write_safetensors(root / "base" / name / f"{stem}.safetensors", entries, arrays)
    return root / "base", root / "merged"


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """20 MB of weights. A tensor is 1 MB, and 2 MB in float32, in which it is added to a product of the same size."""
    base, merged = write_component(
        tmp_path, "transformer", ENTRIES, (np.full((512, 1024), 0.5, np.float16) for _ in ENTRIES)
    )
    pairs = {f"layer{n}": Pair(np.ones((4, 1024), np.float32), np.ones((512, 4), np.float32)) for n in range(20)}
    calls = []
    tracemalloc.start()
    write_merged(base, merged, "transformer", None, pairs, None, calls.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 and calls == [1] * 20
    for value in load_file(merged / "transformer" / "diffusion_pytorch_model.safetensors").values():
        assert value.dtype == np.float16 and np.all(value == 4.5)


def test_integers_keep_their_dtype(tmp_path):
    """CLIP's files may hold the positions 0, 1, 2 ..."""
    ids = np.arange(7)
    entries = {"position_ids": ("I64", (1, 7)), "scale": ("F32", ())}
    base, merged = write_component(tmp_path, "text_encoder", entries, [ids[None], np.array(0.1, np.float32)])
    write_merged(base, merged, "text_encoder", None, {}, ms.bfloat16, lambda count: None)
    found = load_file(merged / "text_encoder" / "model.safetensors")
    assert found["position_ids"].dtype == np.int64 and np.array_equal(found["position_ids"], ids[None])
    assert found["scale"].shape == () and float(found["scale"]) == 0.10009765625
