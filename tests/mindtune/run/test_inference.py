"""What the inference scripts share: bounds of flags, prompts and conditions, the prompt cache, saved images."""

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.grids import image_grid
from mindtune.run import inference


def test_bounds_of_counts():
    inference.require_positive(num_images_per_prompt=1, num_inference_steps=28)
    with pytest.raises(UserError, match="--num_inference_steps 0: must be at least 1"):
        inference.require_positive(num_images_per_prompt=1, num_inference_steps=0)


@pytest.mark.parametrize("side", [40, 0, -64])
def test_a_side_that_is_not_a_multiple_or_too_small(side):
    with pytest.raises(UserError, match=f"--height {side}: must be divisible by 64 and at least 64"):
        inference.require_side("--height", side, multiple=64, least=64)
    inference.require_side("--height", 128, multiple=64, least=64)


@pytest.mark.parametrize("tokens, message", [(0, "must be at least 1"), (513, "at most 512 T5 tokens")])
def test_a_t5_length_out_of_bounds(tokens, message):
    inference.require_t5_length(512)
    with pytest.raises(UserError, match=f"--max_sequence_length {tokens}: .*{message}"):
        inference.require_t5_length(tokens)


def test_one_condition_for_all_prompts(tmp_path):
    """The shorter side is the resolution, the longer one the nearest multiple: 60 x 90 becomes 64 x 96."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "tall.png")
    pairs = inference.pair_conditions(["a cat", "a dog"], [str(tmp_path / "tall.png")], 64, multiple=8)
    assert [(prompt, image.size) for prompt, image in pairs] == [("a cat", (64, 96)), ("a dog", (64, 96))]


def test_masks_get_the_size_of_their_images(tmp_path):
    """One for all rows, or one each. Gray, the middle is kept: of 40 x 20 pixels, the middle 20 x 20."""
    wide, bar = Image.new("RGB", (16, 16)), np.zeros((20, 40), np.uint8)
    bar[:, :10], bar[:, 10:20] = 200, 255
    Image.fromarray(bar).save(tmp_path / "bar.png")
    Image.new("RGB", (8, 8), "black").save(tmp_path / "none.png")
    pairs, (one, none) = [("a", wide), ("b", wide)], [str(tmp_path / f"{name}.png") for name in ("bar", "none")]
    for paths in ([one], [one, none]):
        found = inference.pair_masks(pairs, paths)
        assert [(prompt, image is wide, mask.mode, mask.size) for prompt, image, mask in found] == [
            (prompt, True, "L", (16, 16)) for prompt in "ab"
        ]
        first, second = (np.asarray(mask) for _, _, mask in found)
        assert first[:, :6].min() > 250 and first[:, 10:].max() < 5
        assert second.max() == (255 if len(paths) == 1 else 0)
    with pytest.raises(UserError, match="--mask_image has 3 for 2 rows of prompt and image"):
        inference.pair_masks(pairs, [one] * 3)


def test_labels_of_rows_with_and_without_an_adapter(monkeypatch):
    """The model has its adapter, or not, while the row with that label is made."""
    enabled = []
    monkeypatch.setattr(inference.lora, "enable_lora", lambda model, on: enabled.append((model, on)))
    found = [(label, enabled[-1]) for label in inference.adapter_labels("a cat", ["model"], compare=True)]
    assert found == [("a cat (base)", ("model", False)), ("a cat (adapter)", ("model", True))]
    assert list(inference.adapter_labels("a cat", ["model"], compare=False)) == ["a cat"] and enabled[-1][1]


def test_the_prompt_cache_is_kept_only_below_a_cache_dir(tmp_path):
    with inference.prompt_cache(str(tmp_path)) as kept:
        assert kept == tmp_path / "mindtune"
    with inference.prompt_cache(None) as temporary:
        temporary.mkdir()
    assert not temporary.parent.exists()


def test_one_image_is_the_output_itself(tmp_path, capsys):
    image = Image.new("RGB", (4, 4), "red")
    inference.save_rows([inference.Row("a cat", [image])], tmp_path / "cat.png", [])
    assert np.array_equal(Image.open(tmp_path / "cat.png"), image)
    assert capsys.readouterr().out == f"{tmp_path / 'cat.png'}\n"


def test_several_images_and_their_grid_with_conditions(tmp_path, capsys):
    red, blue, black = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "black"))
    rows = [inference.Row("a cat", [red], black), inference.Row("a dog", [blue], black)]
    singles = [tmp_path / "x-1.png", tmp_path / "x-2.png"]
    inference.save_rows(rows, tmp_path / "x.png", singles)
    assert [Image.open(path).getpixel((0, 0)) for path in singles] == [(255, 0, 0), (0, 0, 255)]
    grid = image_grid([[black, red], [black, blue]], ["a cat", "a dog"])
    assert np.array_equal(Image.open(tmp_path / "x.png"), grid)
    assert capsys.readouterr().out.splitlines() == [str(path) for path in (*singles, tmp_path / "x.png")]
