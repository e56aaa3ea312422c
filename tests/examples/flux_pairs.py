"""What the tests of the Kontext and Control-LoRA scripts share: folders of pairs, and stand-ins for models."""

import functools
import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from PIL import Image
from safetensors.numpy import save_file

from mindtune.cli import UserError
from mindtune.models import lora

SHIFT, SCALE = 0.1159, 0.3611  # of a stand-in for the VAE's config
SIGMAS = (np.arange(1000, 0, -1) / 1000).astype(np.float32)[None]
VAE_CONFIG = {"latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}


def marked(number, height, width):
    """uint8 [height, width, 3]: red is the column, green the row, blue the number of the image."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 20 * number)], axis=2).astype(np.uint8)


def write_pairs(folder, pairs):
    """A folder that --train_data_dir reads, from (image, condition or None, caption) with uint8 arrays."""
    rows = []
    for number, (image, condition, caption) in enumerate(pairs):
        row = {"file_name": f"images/{number}.png", "text": caption}
        if condition is not None:
            row["conditioning_image_file_name"] = f"conditioning/{number}.png"
        for key, pixels in (("file_name", image), ("conditioning_image_file_name", condition)):
            if pixels is not None:
                (folder / row[key]).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / row[key])
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


class LinearFlux(nn.Cell):
    """Stands in for the transformer with a formula that NumPy can repeat.

    A token is the trained gain times its first 64 values, and the mean of all values of all tokens, its place and
    numbers of its sample are added.
    """

    def __init__(self, guidance=True):
        super().__init__()
        self.gain = ms.Parameter(ms.Tensor(0.5, ms.float32), name="gain")
        self.config = {"guidance_embeds": guidance}

    def construct(self, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids,
                  return_dict):  # fmt: skip
        number = timestep + encoder_hidden_states.mean(axis=(1, 2)) - pooled_projections.mean(axis=1)
        number = number if guidance is None else number + 0.01 * guidance
        number = number + 3.0 * hidden_states.mean(axis=(1, 2))
        place = (0.7 * img_ids[:, 0] + 0.1 * img_ids[:, 1] - 0.2 * img_ids[:, 2]).reshape((1, -1, 1))
        return (self.gain * hidden_states[:, :, :64] + number.reshape((-1, 1, 1)) + place,)


class Encoder(nn.Cell):
    """Stands in for the VAE: its mean and log-variance are pixels, every eighth one of each row and column."""

    def encode(self, images):
        corner = images[:, :1, ::8, ::8]
        return (ms.ops.cat([corner] * 16 + [0.1 * corner] * 16, 1),)


def numpy_moments(images):
    """What `Encoder` makes of pixels [B, 3, H, W]."""
    corner = images[:, :1, ::8, ::8]
    return np.concatenate([corner] * 16 + [0.1 * corner] * 16, axis=1)


def latents_of(moments, noise):
    """Scaled latents in float64, straight from the formulas; `noise` 0 gives the mean."""
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=1)
    return (mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise - SHIFT) * SCALE


def packed(latents):
    """[B, C, H, W] to tokens [B, H/2 * W/2, 4C] by slicing: the corners of 2x2 squares, channels outermost."""
    corners = np.stack([latents[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)], axis=2)
    return corners.reshape(*corners.shape[:1], -1, corners.shape[3] * corners.shape[4]).transpose(0, 2, 1)


def unpacked(tokens, height, width):
    """The inverse of `packed`, float64."""
    corners = tokens.transpose(0, 2, 1).reshape(len(tokens), -1, 4, height // 2, width // 2)
    latents = np.empty((len(tokens), corners.shape[1], height, width))
    for k in range(4):
        latents[:, :, k // 2 :: 2, k % 2 :: 2] = corners[:, :, k]
    return latents


# ---- both modes ----------------------------------------------------------------------------------


def updates_in_modes(make_step, batch):
    """run(mode): losses and gradient norms of two updates [2, 2], and the weights that train. Each mode runs once.

    `make_step()` returns a step and its transformer.
    """

    @functools.cache
    def run(mode):
        before = ms.get_context("mode")
        ms.set_context(mode=mode)
        step, transformer = make_step()
        inputs = [ms.Tensor(part) for part in batch]
        seen = [(float(step(*inputs)[1]), float(step.grad_clipper.norm)) for _ in range(2)]
        weights = {name: p.asnumpy() for name, p in lora.lora_parameters(transformer).items()}
        ms.set_context(mode=before)
        return np.array(seen), weights

    return run


def assert_modes_agree(run):
    """Asserts that `updates_in_modes` are the same in both modes. Returns the weights."""
    (seen, weights), (graph_seen, graph_weights) = run(ms.PYNATIVE_MODE), run(ms.GRAPH_MODE)
    np.testing.assert_allclose(seen, graph_seen, rtol=1e-4)
    for name, value in weights.items():
        np.testing.assert_allclose(value, graph_weights[name], atol=1e-4 * np.abs(value).max(), err_msg=name)
    return weights


# ---- bad input -----------------------------------------------------------------------------------


def files_of(*folders):
    """Path -> content of every file; but for what was learnt of images, which stays."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths if path.name != "images.jsonl"}


def message_of(script, arguments, *folders):
    """The message of the UserError with which a script ends. No model was loaded, and no file in `folders` changed."""

    def never(*_, **__):
        pytest.fail("a model was loaded before the input was checked")

    before, mode = files_of(*folders), ms.get_context("mode")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr("mindtune.models.loading.load_model", never)
        patch.setattr("mindtune.encode.encoder_stage.run_in_child", never)
        script.main([str(word) for word in arguments])
    ms.set_context(mode=mode)
    assert files_of(*folders) == before
    message = str(caught.value)
    assert message.endswith((".", ")")) or "\n" in message, message  # lists end with their last line
    return message


def write_adapter(path, layers, norms=None):
    """A LoRA file of rank 2 with (inputs, outputs) of layers by name, and norms by name with their widths."""
    random, tensors = np.random.default_rng(0), {}
    for layer, (inputs, outputs) in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = random.standard_normal((2, inputs)).astype(np.float32)
        tensors[f"transformer.{layer}.lora_B.weight"] = random.standard_normal((outputs, 2)).astype(np.float32)
    for name, width in (norms or {}).items():
        tensors[f"transformer.{name}"] = random.uniform(0.5, 1.5, width).astype(np.float32)
    save_file(tensors, path)
    return path
