"""The encode stage: what an entry's name depends on, what the child does when it cannot, and what T5 keeps wide."""

import shutil
import subprocess
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data.image_sample import Sample
from mindtune.encode import child, encoder_stage, text_encoders
from mindtune.models import loading, precision


@pytest.fixture
def stage(tiny_flux, tmp_path):
    """stage(**changes): a stage on the tiny pipeline with some settings changed."""

    def make(**changes):
        settings = {
            "root": tiny_flux,
            "variant": None,
            "precision": "no",
            "folder": tmp_path / "cache",
            "max_sequence_length": 16,
        }
        return encoder_stage.EncoderStage(**{**settings, **changes})

    return make


def changed_copy(root, out, part, name):
    """The pipeline with one bit of one weight changed."""
    shutil.copytree(root, out)
    content = bytearray((out / part / name).read_bytes())
    content[-5] ^= 1
    (out / part / name).write_bytes(content)
    return out


@pytest.mark.parametrize("encoder, tokenizer", [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")])
def test_a_captions_name_depends_on_all_that_shapes_its_embedding(stage, tiny_flux, tmp_path, encoder, tokenizer):
    def key(caption="a cat", **changes):
        return stage(**changes).text_key(encoder, caption)

    root = changed_copy(tiny_flux, tmp_path / "flux", encoder, "model.safetensors")
    config = Path(shutil.copytree(tiny_flux, tmp_path / "other")) / tokenizer / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    others = [key("a dog"), key(precision="fp16"), key(root=root), key(root=tmp_path / "other")]
    assert len({key(), *others}) == 5
    assert (key(max_sequence_length=8) == key()) == (encoder == "text_encoder")  # CLIP always takes its 77 tokens
    assert key(folder=tmp_path / "elsewhere", interpolation="nearest") == key()


def test_a_pictures_name_depends_on_its_bytes_and_its_preprocessing(stage, photos, tiny_flux, tmp_path):
    one, two = (Sample(path.name, path) for path in sorted(photos.glob("*.png"))[:2])
    root = changed_copy(tiny_flux, tmp_path / "vae", "vae", "diffusion_pytorch_model.safetensors")
    jobs = [
        (one, 32, False),
        (one, 32, True),
        (two, 32, False),
        (one, 64, False),
        (one, (32, 48), False),
        (one, (48, 32), False),
    ]
    keys = [stage().image_key(*job) for job in jobs]
    keys += [
        s.image_key(one, 32, False) for s in (stage(interpolation="nearest"), stage(precision="fp16"), stage(root=root))
    ]
    assert len(set(keys)) == 9
    renamed = tmp_path / "renamed.png"
    renamed.write_bytes(one.read())
    assert stage().image_key(Sample("another name", renamed), 32, False) == keys[0]


def test_captions_that_an_encoder_cuts_off_are_counted(stage, tiny_flux):
    """Against the tokenizer's own count; a caption is counted once however often it is used."""
    long = " ".join(["circle"] * 40)
    tokens = len(loading.load_tokenizer(tiny_flux / "tokenizer_2")(long + " cat").input_ids)
    (said,) = stage().long_captions(["a cat", long, long, long + " cat"])
    assert said.startswith(f"2 captions are longer than T5 reads: 16 tokens, the longest has {tokens}.")
    assert "Raise --max_sequence_length" in said
    assert stage(max_sequence_length=tokens).long_captions([long, long + " cat"]) == []
    (said,) = stage(system="sd").long_captions([" ".join(["circle"] * 100)])
    assert said.startswith("1 caption is longer than CLIP reads: 77 tokens") and "--max_sequence_length" not in said


def test_the_childs_embeddings_are_those_of_the_encoders_called_here(stage, tiny_flux):
    made = stage()
    assert made.prepare(["a cat", "a dog", "a cat"], []) == 2
    full = precision.resolve_precision("no")
    for caption in ("a cat", "a dog"):
        ids = text_encoders.token_ids(loading.load_tokenizer(tiny_flux / "tokenizer_2"), caption, 16)
        states = loading.load_model(tiny_flux, "text_encoder_2", full)(ms.Tensor(ids[None]))[0][0].asnumpy()
        np.testing.assert_array_equal(made.text(caption)["prompt_embeds"], states)
        clip = loading.load_model(tiny_flux, "text_encoder", full)
        pooled = text_encoders.clip_pooled(clip, loading.load_tokenizer(tiny_flux / "tokenizer"), caption)
        np.testing.assert_array_equal(made.text(caption)["pooled_prompt_embeds"], pooled)
    assert made.prepare(["a cat", "a dog"], []) == 0


@pytest.mark.parametrize(
    "code, sentence", [(-9, "killed by signal 9"), (1, "failed with exit code 1"), (2, "its message is above")]
)
def test_a_child_that_fails_ends_the_run_with_a_sentence(stage, monkeypatch, code, sentence):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code))
    with pytest.raises(UserError, match=sentence):
        stage().prepare(["a cat"], [])


def test_an_encoder_that_overflows_is_not_cached():
    with pytest.raises(UserError, match=r"fp16: an encoder overflows on cat\.png"):
        child._check_finite({"moments": np.array([1.0, np.inf])}, "cat.png", "fp16")


def test_t5_in_fp16_keeps_its_overflowing_layer_in_fp32(tiny_flux):
    """`wo` is what T5's authors name; with weights as large as the real ones' it overflows in fp16."""
    half = precision.resolve_precision("fp16")
    encoder = loading.load_model(tiny_flux, "text_encoder_2", half)
    types = {name: parameter.dtype for name, parameter in encoder.parameters_and_names()}
    assert {dtype for name, dtype in types.items() if ".wo." in name} == {ms.float32}
    assert {dtype for name, dtype in types.items() if ".wo." not in name} == {ms.float16}


@pytest.mark.parametrize(
    "part, file",
    [("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_a_file_that_lacks_a_tensor_is_not_filled_with_random_numbers(tiny_flux, tmp_path, part, file):
    from safetensors.numpy import load_file, save_file

    root = Path(shutil.copytree(tiny_flux, tmp_path / "flux"))
    path = root / part / f"{file}.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weight files lack 1 tensors"):
        loading.load_model(root, part, precision.resolve_precision("no"))
