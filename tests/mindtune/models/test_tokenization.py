"""The tokenizers of CLIP and T5: limits, added tokens, and damaged files."""

import json

import pytest
from conftest import edit

from mindtune.cli import UserError
from mindtune.models.loading import check_files
from mindtune.models.tokenization import load_tokenizer


def test_a_clip_tokenizer_without_a_limit(pipeline):
    """transformers uses 1e30 then, but CLIP has 77 positions."""
    path = pipeline / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "model_max_length"})
    )
    assert load_tokenizer(pipeline / "tokenizer").model_max_length == 77


@pytest.mark.parametrize("limit", [0, -1, 8192])
def test_a_clip_tokenizer_with_an_invalid_limit(pipeline, limit):
    edit(pipeline / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    assert load_tokenizer(pipeline / "tokenizer").model_max_length == 77


def test_a_tokenizer_with_more_tokens_than_the_text_encoder(pipeline):
    """Saved after add_tokens: the new ids have no embedding."""
    tokenizer = load_tokenizer(pipeline / "tokenizer")
    tokenizer.add_tokens("<sks>")
    tokenizer.save_pretrained(pipeline / "tokenizer")
    with pytest.raises(
        UserError,
        match=f"has {len(tokenizer)} tokens, but vocab_size in text_encoder/config.json is {len(tokenizer) - 1}",
    ):
        check_files(pipeline, ["tokenizer"])


def test_an_invalid_spiece_model(pipeline):
    edit(pipeline / "tokenizer_2" / "tokenizer_config.json", add_prefix_space=True)
    (pipeline / "tokenizer_2" / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="tokenizer_2: "):
        load_tokenizer(pipeline / "tokenizer_2")


def test_fluxs_t5_tokenizer_without_spiece_model(pipeline):
    """add_prefix_space would rebuild the tokenizer from spiece.model. The ids are those of tokenizer.json."""
    expected = load_tokenizer(pipeline / "tokenizer_2")("a red circle, two cats").input_ids
    edit(pipeline / "tokenizer_2" / "tokenizer_config.json", add_prefix_space=True)
    (pipeline / "tokenizer_2" / "spiece.model").unlink()
    assert load_tokenizer(pipeline / "tokenizer_2")("a red circle, two cats").input_ids == expected
