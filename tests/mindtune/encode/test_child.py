"""The child process of the encoder stage: its results are the encoders' outputs, and overflows are refused."""

import mindspore as ms
import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.encode import child, text_encoders
from mindtune.encode.encoder_stage import EncoderStage
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
