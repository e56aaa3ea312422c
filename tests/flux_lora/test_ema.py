"""--use_ema of the LoRA script: the result is the average of the weights, the checkpoints have the weights."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindtune import rng
from mindtune.models.lora_files import LORA_FILE


@pytest.mark.parametrize("mode", [0, 1], ids=["graph", "pynative"])
def test_the_result_is_the_moving_average_of_all_updates(lora, tmp_path, mode):
    flags = ["--use_ema", "--ema_decay", 0.3, "--checkpointing_steps", 1, "--max_train_steps", 3, "--cache_latents"]
    flags += ["--mindspore_mode", mode, "--train_text_encoder"]
    out = lora(tmp_path, *flags, "--learning_rate", 1e-2)
    steps = [load_file(out / f"checkpoint-{number}" / LORA_FILE) for number in (1, 2, 3)]
    result = load_file(out / LORA_FILE)
    assert set(result) == set(steps[0]) and any(name.startswith("text_encoder.") for name in result)
    for name, found in result.items():
        layer = name.split(".", 1)[1]
        average = np.zeros(found.shape)
        if ".lora_A." in name:
            average = (rng.normal(0, f"lora/{layer}", shape=found.shape) / 4).astype(np.float64)
        for step, weights in enumerate(steps, 1):
            decay = min(0.3, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weights[name].astype(np.float64)
        np.testing.assert_allclose(found, average, atol=2e-7)
    moved = [name for name in result if not np.allclose(result[name], steps[-1][name], atol=1e-6)]
    assert any(".lora_B." in name for name in moved)
