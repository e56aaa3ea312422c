"""LoRAs and ControlNets for published FLUX.1 pipelines: one update and an image; one is resumed."""

import numpy as np
import pytest
import real_pipelines
from safetensors.numpy import load_file

from mindtune.encode import encoder_stage, text_encoders
from mindtune.models import loading, tokenization
from mindtune.models.precision import resolve_precision

from .conftest import copy
from .verdicts import FLUX, LORA, PIPELINES

RUNS = [(name, script) for name, verdict in PIPELINES.items() for script in verdict.scripts if name.startswith("FLUX")]


@pytest.mark.parametrize("name, script", RUNS, ids=["-".join(run) for run in RUNS])
def test_it_is_trained(name, script, trains, real):
    trains(script, real(name), resume=name == "FLUX.1-dev")


@pytest.mark.parametrize("script, weights", [(LORA, "pytorch_lora_weights"), (FLUX, "diffusion_pytorch_model")])
def test_schnell_has_no_guidance_to_train(script, weights, run, real, tmp_path):
    run(script, real("FLUX.1-schnell"), tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / f"{weights}.safetensors") if "guidance" in name]


@pytest.mark.parametrize(
    "names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]], ids=" ".join
)
def test_t5s_embedding_by_either_name(names, real, encode_here, tmp_path):
    """Published files have shared.weight alone; those of others the encoder's name for it, or both."""
    folder = tmp_path / "pipeline" / "text_encoder_2"
    config = real_pipelines.PIPELINES["FLUX.1-dev"]["text_encoder_2/config.json"]
    real_pipelines.write_model(folder, config, 0)
    path = folder / "model.safetensors"
    tensors = real_pipelines.as_published(config, real_pipelines.draw(real_pipelines.small(config), 0), "")
    value = tensors.pop("shared.weight")
    real_pipelines.write_safetensors(path, {**tensors, **{f"{name}.weight": value for name in names}})
    loaded = loading.load_model(folder.parent, folder.name, resolve_precision("no"))
    np.testing.assert_array_equal(loaded.shared.embedding_table.asnumpy(), value.astype(np.float32))


def test_without_its_sentencepiece_model(run, plain_losses, real, tmp_path):
    """Because of add_prefix_space transformers makes the tokenizer from spiece.model.

    Without that file, tokenizer.json gives the same tokens.
    """
    root = copy(real("FLUX.1-dev"), tmp_path)
    whole = tokenization.load_tokenizer(root / "tokenizer_2")
    (root / "tokenizer_2" / "spiece.model").unlink()
    caption = "a photo of a red circle, on a white background"
    found = tokenization.load_tokenizer(root / "tokenizer_2")
    assert text_encoders.token_ids(found, caption, 64).tolist() == text_encoders.token_ids(whole, caption, 64).tolist()
    assert run(LORA, root, tmp_path / "out") == plain_losses(LORA, real("FLUX.1-dev"))


def test_captions_of_512_tokens(run, real, encoder_cache, tmp_path):
    """A long caption fills T5's 512 tokens, and they reach the transformer."""
    root, caption = real("FLUX.1-schnell"), "a red circle on a white background, " * 100
    run(LORA, root, tmp_path / "out", "--instance_prompt", caption, "--max_sequence_length", 512)
    stage = encoder_stage.EncoderStage(root, None, "no", encoder_cache / "mindtune", 512)
    states = stage.text(caption)["prompt_embeds"]
    assert (
        states.shape == (512, 32) and np.abs(np.diff(states[-64:], axis=0)).max(axis=1).min() > 0
    )  # no padding at its end
