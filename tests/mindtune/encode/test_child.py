"""The child process of the encoder stage: its results are the encoders' outputs, and overflows are refused."""

import mindspore as ms
import numpy as np
import pytest
from conftest import encode_here

from mindtune.cli import UserError
from mindtune.data.crops import pixel_values
from mindtune.data.image_sample import Sample
from mindtune.encode import child, encoder_stage, text_encoders
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.jobs import vae_batch
from mindtune.models import loading, precision, tokenization


def test_the_childs_embeddings_are_the_encoders_outputs(tiny_flux, tmp_path):
    stage = EncoderStage(tiny_flux, None, "no", tmp_path / "cache", 16)
    assert stage.prepare(["a cat", "a dog", "a cat"], []) == 2
    full = precision.resolve_precision("no")
    tokenizers = [tokenization.load_tokenizer(tiny_flux / name) for name in ("tokenizer", "tokenizer_2")]
    clip, t5 = (loading.load_model(tiny_flux, name, full) for name in ("text_encoder", "text_encoder_2"))
    for caption in ("a cat", "a dog"):
        states = t5(ms.Tensor(text_encoders.token_ids(tokenizers[1], caption, 16)[None]))[0][0].asnumpy()
        np.testing.assert_array_equal(stage.text(caption)["prompt_embeds"], states)
        pooled = text_encoders.clip_pooled(clip, tokenizers[0], caption)
        np.testing.assert_array_equal(stage.text(caption)["pooled_prompt_embeds"], pooled)
    assert stage.prepare(["a cat", "a dog"], []) == 0


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e5])
def test_an_encoder_that_overflows_is_not_cached(tiny_flux, tmp_path, value):
    """Nor a value that fits float32 alone."""
    stage = EncoderStage(tiny_flux, None, "no", tmp_path / "cache", 16)
    with pytest.raises(UserError, match=r"fp16: an encoder overflows on cat\.png"):
        child._put(stage, "key", {"moments": np.array([1.0, value])}, "fp16", "cat.png")
    assert not stage.cache.keys()


def test_a_weight_file_without_a_tensor_is_refused(pipeline):
    """Instead of starting that tensor at random."""
    from safetensors.numpy import load_file, save_file

    path = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weight files lack 1 tensors"):
        loading.load_model(pipeline, "text_encoder", precision.resolve_precision("no"))


# ---- batches of images ---------------------------------------------------------------------------


def samples(photos, count):
    return [Sample(path.name, path) for path in sorted(photos.glob("*.png"))[:count]]


@pytest.mark.parametrize("size", [32, (32, 48), 96, (64, 256)])
def test_an_images_entry_does_not_depend_on_its_batch(tiny_flux, photos, tmp_path, size):
    """Alone, in another order, and among images of other sizes: the same bits."""
    images = [(sample, size, flip) for sample in samples(photos, 5) for flip in (False, True)]
    others = [(sample, 64, False) for sample in samples(photos, 5)]
    mixed = [image for pair in zip(images, others * 2) for image in pair]
    found = []
    for number, order in enumerate([images, images[::-1], images[3:4], mixed]):
        stage = EncoderStage(tiny_flux, None, "no", tmp_path / str(number), 16)
        child.encode_images(stage, order)
        found.append({key: stage.cache.get(key)["moments"] for key in [stage.image_key(*images[3])]})
    for other in found[1:]:
        for key, value in other.items():
            np.testing.assert_array_equal(value, found[0][key])


@pytest.mark.parametrize("size, batch", [(64, 8), (256, 4), ((256, 512), 2), (512, 1), (1024, 1), ((16, 16), 8)])
def test_entries_of_a_batch_differ_little_from_those_of_one_image(tiny_flux, photos, tmp_path, size, batch):
    assert vae_batch(size) == batch
    if batch == 1:
        return
    stage = EncoderStage(tiny_flux, None, "no", tmp_path, 16)
    images = [(sample, size, False) for sample in samples(photos, 5)]
    child.encode_images(stage, images)
    vae = stage.load_vae()
    for sample, _, _ in images:
        pixels = pixel_values(sample.open(), size, "lanczos")
        alone = vae.encode(ms.Tensor(pixels[None]))[0][0].asnumpy()
        difference = np.abs(stage.moments(sample, size, False) - alone).max()
        assert difference <= 1e-6 * np.abs(alone).max()


def test_entries_that_are_not_batches_yet_are_named(tiny_flux, photos, tmp_path, capsys, monkeypatch):
    """Of version 0.1.0, which encoded each image alone. From 512 pixels on they are used."""
    monkeypatch.setattr(encoder_stage, "run_in_child", encode_here)
    stage = EncoderStage(tiny_flux, None, "no", tmp_path, 16)
    (sample,) = samples(photos, 1)
    old = {"moments": np.zeros(3, np.float32)}
    stage.cache.put(stage.image_key(sample, 64, False, batch=1), old)
    assert stage.prepare([], [(sample, 64, False)]) == 1
    assert "1 images were encoded again, in batches" in capsys.readouterr().out
    stage.cache.put(stage.image_key(sample, 512, False, batch=1), old)
    assert stage.prepare([], [(sample, 512, False)]) == 0
