"""The rows of a validation: the flags' prompts, and the lines of --validation_file, with what is wrong with them."""

import json

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.run.validation_rows import Row, Settings, captions, load_conditions, read, with_size

DEFAULTS = {"seed": 7, "num_inference_steps": 20, "guidance_scale": 3.0, "num_validation_images": 2}


@pytest.fixture
def image(tmp_path):
    """A path of an image of 80 x 40 pixels, black on the left and white on the right."""
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    return str(tmp_path / "half.png")


def lora(**values):
    return Settings(system="flux_lora", **{**DEFAULTS, **values})


def control(system="controlnet", **values):
    return Settings(system=system, **{**DEFAULTS, "controlnet_conditioning_scale": 0.9, **values})


@pytest.fixture
def rows_of(tmp_path):
    """rows_of(content, settings): the rows of a file. `content`: bytes, or a list of objects."""

    def make(content, settings=None, name="rows.jsonl"):
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(each).encode() + b"\n" for each in content)
        path = tmp_path / name
        path.write_bytes(content)
        return read((settings or lora())._replace(validation_file=str(path)))

    return make


# ---- values --------------------------------------------------------------------------------------


def test_prompts_of_the_flags_have_the_values_of_the_flags_and_a_number_per_image():
    rows = read(lora(validation_prompt=["a cat", "a dog"]))
    expected = [(prompt, number) for prompt in ("a cat", "a dog") for number in (0, 1)]
    assert rows == [Row(prompt, 7, 20, 3.0, number=number) for prompt, number in expected]
    assert read(lora()) == read(control()) == []


def test_a_line_has_its_own_values_or_those_of_the_flags(rows_of, image):
    lines = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "seed": -3, "width": 48, "height": 96, "steps": 4, "guidance": 0},
        {"prompt": "a cow", "size": 16, "guidance": 2.5},
    ]
    assert rows_of(lines) == [
        Row("a cat", 7, 20, 3.0, place=1),
        Row("a dog", -3, 4, 0, (96, 48), place=2),
        Row("a cow", 7, 20, 2.5, (16, 16), place=3),
    ]
    assert [row.size for row in with_size(rows_of(lines), (32, 64))] == [(32, 64), (96, 48), (16, 16)]
    both = rows_of(lines, lora(validation_prompt=["a fox"]))  # the lines after the flags' images
    assert [(row.prompt, row.place, row.number) for row in both[:3]] == [
        ("a fox", 0, 0),
        ("a fox", 0, 1),
        ("a cat", 1, 0),
    ]
    line = {"prompt": "a cat", "image": "half.png", "scale": -0.5, "negative_prompt": "", "size": 72}
    assert rows_of([line, {"prompt": "b", "image": image}], control()) == [
        Row("a cat", 7, 20, 3.0, (72, 72), negative_prompt="", image=image, scale=-0.5, place=1),
        Row("b", 7, 20, 3.0, None, image=image, scale=0.9, place=2),
    ]


def test_one_validation_image_without_a_prompt_is_that_of_the_lines(rows_of, image):
    (row,) = rows_of([{"prompt": "a"}], control(validation_image=[image]))
    assert row.image == image and row.place == 1
    with pytest.raises(UserError, match=r"--validation_image .*half.png: every line .* names its own image"):
        rows_of([{"prompt": "a", "image": "half.png"}], control(validation_image=[image]))
    with pytest.raises(UserError, match="--validation_prompt has 0 and --validation_image 2"):
        rows_of([{"prompt": "a", "image": "half.png"}], control(validation_image=[image, image]))
    with pytest.raises(UserError, match="line 1: image is missing: name a condition image"):
        rows_of([{"prompt": "a"}], control(validation_image=[image], validation_prompt=["x"]))


def test_prompts_and_condition_images_are_matched(image):
    def pairs(prompts, images):
        settings = control(validation_prompt=prompts, validation_image=images, num_validation_images=1)
        return [(row.prompt, row.image) for row in read(settings)]

    other = image.replace("half", "other")
    Image.new("RGB", (80, 40), "white").save(other)
    assert pairs(["x", "y"], [image, other]) == [("x", image), ("y", other)]
    assert pairs(["x"], [image, other]) == [("x", image), ("x", other)]
    assert pairs(["x", "y"], [image]) == [("x", image), ("y", image)]
    with pytest.raises(UserError, match="--validation_prompt has 3 and --validation_image 2"):
        pairs(["x", "y", "z"], [image, other])
    with pytest.raises(UserError, match="--validation_image .*absent.png"):
        pairs(["x"], [image.replace("half", "absent")])


def test_masks_are_matched_by_position(image, tmp_path):
    """An image that is given twice may have two masks. A mask that cannot be read is named by its row."""
    masks = [str(tmp_path / f"mask-{name}.png") for name in "ab"]
    for path in masks:
        Image.new("L", (80, 40), 255).save(path)

    def found(prompts, images, masks):
        flags = {"validation_prompt": prompts, "validation_image": images, "validation_mask": masks}
        rows = read(control("flux_control", fill=True, num_validation_images=1, **flags))
        return [(row.prompt, row.image, row.mask) for row in rows]

    assert found(["x"], [image, image], masks) == [("x", image, masks[0]), ("x", image, masks[1])]
    assert found(["x", "y"], [image, image], masks) == [("x", image, masks[0]), ("y", image, masks[1])]
    assert found(["x", "y"], [image], masks[:1]) == [("x", image, masks[0]), ("y", image, masks[0])]
    with pytest.raises(UserError, match="--validation_mask: 2 for 1 of --validation_image"):
        found(["x", "y"], [image], masks)


def test_the_lines_of_one_image_may_have_masks_of_their_own(rows_of, image):
    (row,) = rows_of([{"prompt": "a", "mask": image}], control("flux_control", fill=True, validation_image=[image]))
    assert row.image == row.mask == image
    with pytest.raises(UserError, match="line 1: mask is missing"):
        rows_of([{"prompt": "a"}], control("flux_control", fill=True, validation_image=[image]))


def test_a_mask_of_a_file_that_cannot_be_used_is_named_by_its_row(rows_of, image, tmp_path):
    Image.fromarray(np.full((40, 80), 0.5, np.float32)).save(tmp_path / "float.tif")
    rows = rows_of([{"prompt": "a", "image": image, "mask": "float.tif"}], control("flux_control", fill=True))
    with pytest.raises(UserError, match="--validation_file, row 1: .*float.tif: cannot be read"):
        load_conditions(rows, 32, 16, "white")


def test_conditions_are_resized_to_the_resolution_or_to_the_size_of_the_line(rows_of, image, capsys):
    lines = [{"prompt": "a", "image": "half.png"}, {"prompt": "b", "image": "half.png", "width": 64, "height": 128}]
    rows = rows_of(lines, control("flux_controlnet", validation_image=[image], validation_prompt=["x"]))
    first, second, wide, tall = load_conditions(rows, [32, 48], 16, "white")  # of several resolutions the largest
    assert first.condition is second.condition is wide.condition  # read once
    assert wide.condition.size == (96, 48) and wide.size == (48, 96)
    assert tall.condition.size == (64, 128) and tall.size == (128, 64)
    middle = np.asarray(tall.condition)[64, :, 0]  # cropped to the middle: still black on the left
    assert middle[:28].max() < 20 and middle[-28:].min() > 235
    assert load_conditions([], 48, 16, "white") == []


def test_a_description_has_all_that_the_image_depends_on(rows_of, image):
    line = {"prompt": "ein Bär", "seed": 1, "width": 96, "height": 64, "steps": 4, "guidance": 2.5, "image": image}
    line.update(scale=0.5, negative_prompt="a fox")
    (row,) = rows_of([line], control())
    assert row.describe() == line
    assert captions([row, row._replace(negative_prompt=None)]) == ["ein Bär", "a fox", "ein Bär"]


# ---- images to edit, conditions and masks of FLUX ------------------------------------------------


def flux(system, **values):
    return Settings(system=system, **{**DEFAULTS, "num_validation_images": 1, **values})


def test_images_to_edit_may_be_left_out(rows_of, image):
    """In the flags and in a line. A row without one keeps its size, or gets that of `with_size`."""
    prompts = ["a", "b"]
    alone = read(flux("flux_kontext", validation_prompt=prompts))
    assert [(row.prompt, row.image) for row in alone] == [("a", None), ("b", None)]
    pairs = read(flux("flux_kontext", validation_prompt=prompts, validation_image=[image]))
    assert [(row.prompt, row.image) for row in pairs] == [("a", image), ("b", image)]
    lines = [{"prompt": "c"}, {"prompt": "d", "size": 48}, {"prompt": "e", "image": image}]
    rows = load_conditions(rows_of(lines, flux("flux_kontext")), 32, 16, "white")
    assert [row.condition and row.condition.size for row in rows] == [None, None, (64, 32)]
    assert [row.size for row in with_size(rows, (16, 32))] == [(16, 32), (48, 48), (32, 64)]
    assert [row.scale for row in rows] == [None] * 3 and "scale" not in rows[2].describe()


def test_what_a_row_is_sampled_with(rows_of):
    (row,) = rows_of([{"prompt": "a", "size": 32, "steps": 3, "guidance": 2, "seed": 9}], flux("flux_kontext"))
    assert row.sampling() == {"size": (32, 32), "seed": 9, "number": 0, "steps": 3, "guidance": 2}


@pytest.mark.parametrize("system", ["flux_kontext", "flux_control"])
@pytest.mark.parametrize("key, value", [("scale", 0.5), ("mask", "half.png"), ("negative_prompt", "x")])
def test_keys_that_a_system_does_not_have(rows_of, image, system, key, value):
    with pytest.raises(UserError, match=f"line 1: {key} is no key"):
        rows_of([{"prompt": "a", "image": image, key: value}], flux(system))


def test_a_control_lora_needs_a_condition(rows_of):
    with pytest.raises(UserError, match="line 1: image is missing: name a condition image"):
        rows_of([{"prompt": "a"}], flux("flux_control"))


@pytest.fixture
def masks(tmp_path):
    """Paths of two masks of 20 x 10 pixels, white above and white below."""
    paths = []
    for number in range(2):
        pixels = np.zeros((10, 20), np.uint8)
        pixels[5 * number : 5 * number + 5] = 255
        Image.fromarray(pixels).save(tmp_path / f"mask-{number}.png")
        paths.append(str(tmp_path / f"mask-{number}.png"))
    return paths


def fill(**values):
    return flux("flux_control", fill=True, **values)


def test_masks_that_do_not_match_or_cannot_be_read(image, masks):
    for chosen in ([], [*masks, masks[0]]):
        with pytest.raises(UserError, match=f"--validation_mask: {len(chosen)} for 2 .* Give one each, or one for all"):
            read(fill(validation_prompt=["a"], validation_image=[image, image], validation_mask=chosen))
    with pytest.raises(UserError, match="--validation_mask .*absent.png: cannot be read as an image"):
        absent = masks[0].replace("mask-0", "absent")
        read(fill(validation_prompt=["a"], validation_image=[image], validation_mask=[absent]))


def test_a_line_has_its_own_mask_or_that_of_the_flags(rows_of, image, masks):
    lines = [{"prompt": "a", "image": "half.png"}, {"prompt": "b", "image": "half.png", "mask": "mask-1.png"}]
    rows = rows_of(lines, fill(validation_mask=masks[:1]))
    assert [row.mask for row in rows] == masks
    whole = rows_of([{"prompt": "a"}], fill(validation_image=[image], validation_mask=masks[:1]))
    assert [(row.image, row.mask) for row in whole] == [(image, masks[0])]
    with pytest.raises(UserError, match="line 1: mask is missing: name the mask of the image, or one for all lines"):
        rows_of(lines, fill())
    with pytest.raises(UserError, match=r"line 1: mask absent.png cannot be read \(missing"):
        rows_of([{**lines[0], "mask": "absent.png"}], fill())
    (row,) = with_size(rows[1:], (32, 64))
    assert row.describe()["mask"] == masks[1]


def test_a_mask_has_the_size_of_its_image_in_gray(rows_of, image, masks):
    rows = read(fill(validation_prompt=["a"], validation_image=[image, image], validation_mask=masks))
    above, below = load_conditions(rows, 32, 16, "white")
    assert above.condition.size == above.mask_image.size == (64, 32) and above.mask_image.mode == "L"
    values = [np.asarray(row.mask_image) for row in (above, below)]
    assert values[0][:14].min() > 200 and values[0][18:].max() < 50
    np.testing.assert_allclose(values[0][::-1].astype(int), values[1], atol=2)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "\xe7\x8c\xab"}\r\n\r\n  \r\n{"prompt": "b", "seed": null}',
        '{"prompt": "猫"}\n{"prompt": "b", "steps": 20.0}\n'.encode("utf-16"),
        b'{"prompt": "\\u732b"}\n\n\n{"prompt": "b", "steps": 20}\n\n',
    ],
    ids=["byte order mark, Windows, blank lines, null", "UTF-16 of Windows, 20.0", "escapes, blank lines"],
)
def test_files_of_many_tools_are_read(rows_of, content):
    assert rows_of(content) == [Row("猫", 7, 20, 3.0, place=1), Row("b", 7, 20, 3.0, place=2)]


def test_equal_lines_and_images_in_the_spelling_of_windows(rows_of, image):
    rows = rows_of([{"prompt": "a", "image": ".\\HALF.png"}] * 2, control())
    assert [row.image for row in rows] == [image] * 2 and [row.place for row in rows] == [1, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has no rows. Write one object per line"),
        (b"\n \r\n", "has no rows"),
        (b"{'prompt': 'a'}", r"line 1: not JSON .*Write one object per line"),
        (b"a cat\n", "line 1: not JSON"),
        (b'"a cat"\n', "line 1: not a JSON object"),
        (b'[{"prompt": "a"}]', "is one JSON list; write one object per line"),
        ('{"prompt": "红色"}'.encode("gbk"), "is not UTF-8 text. Save it as UTF-8"),
        (b"\x89PNG\0\0", "is no file of JSON lines"),
    ],
)
def test_files_that_are_refused(rows_of, content, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl.*{message}" if "line" not in message else message):
        rows_of(content)


def test_a_file_that_is_no_file_or_a_table(rows_of, tmp_path):
    with pytest.raises(UserError, match="--validation_file absent.jsonl: no such file"):
        read(lora(validation_file="absent.jsonl"))
    for name in (str(tmp_path), ""):  # a folder; a variable of the shell that was not set
        with pytest.raises(UserError, match=f"--validation_file {name}: no such file"):
            read(lora(validation_file=name))
    with pytest.raises(UserError, match=r"rows.csv: is no file of JSON lines"):
        rows_of(b"prompt,seed\na,1\n", name="rows.csv")


@pytest.mark.parametrize(
    "line, message",
    [
        ({"seed": 1}, "prompt is missing"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ["a"]}, r"prompt is ..a.., must be text"),
        ({"prompt": "\ud800"}, "must be text"),
        ({"prompt": "a", "promt": "b"}, "promt is no key. Did you mean prompt?"),
        ({"prompt": "a", "Guidance_Scale": 3}, "Guidance_Scale is no key. Did you mean guidance?"),
        ({"prompt": "a", "xyz": 3}, "xyz is no key. There are prompt, seed, width, height, size, steps, guidance$"),
        ({"prompt": "a", "image": "x.png"}, "image is no key"),
        ({"prompt": "a", "seed": 1.5}, "seed is 1.5, must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed is True, must be a whole number"),
        ({"prompt": "a", "steps": 0}, "steps is 0, must be a whole number of 1 or more"),
        ({"prompt": "a", "steps": "20"}, "steps is '20', must be a whole number"),
        ({"prompt": "a", "guidance": -1}, "guidance is -1, must be a number of 0 or more"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "a", "guidance": 10**400}, "guidance is 1000"),
        ({"prompt": "a", "size": 40}, "size is 40, must be a multiple of 16 and at least 16"),
        ({"prompt": "a", "width": 0, "height": 32}, "width is 0, must be a multiple of 16"),
        ({"prompt": "a", "width": 32}, "width and height belong together"),
        ({"prompt": "a", "size": 32, "width": 32, "height": 32}, "size is for squares"),
    ],
)
def test_a_line_that_is_refused(rows_of, line, message):
    with pytest.raises(UserError, match=rf"rows.jsonl: 1 of its lines cannot be used:\n  line 2: .*{message}"):
        rows_of([{"prompt": "a"}, line])


@pytest.mark.parametrize(
    "line, message",
    [
        ({"image": "absent.png"}, r"image absent.png cannot be read \(missing"),
        ({"image": "text.png"}, "image text.png cannot be read"),
        ({"image": ""}, "image is '', must be the path of an image"),
        ({"image": "half.png", "scale": float("inf")}, "scale is inf, must be a number"),
        ({"image": "half.png", "size": 56}, "size is 56, must be a multiple of 8 and at least 64"),
        (
            {"image": "half.png", "negative_prompt": "x", "guidance": 1},
            "negative_prompt has no effect with a guidance of 1",
        ),
    ],
)
def test_a_line_of_a_controlnet_that_is_refused(rows_of, image, tmp_path, line, message):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match=f"line 1: {message}"):
        rows_of([{"prompt": "a", **line}], control())


def test_all_lines_that_are_wrong_are_listed_with_all_that_is_wrong(rows_of):
    lines = b'{"seed": "x", "stepps": 1}\n\n{"prompt": "a"}\n{\n' + b'{"prompt": 1}\n' * 60
    with pytest.raises(UserError) as error:
        rows_of(lines)
    text = str(error.value)
    assert "62 of its lines cannot be used" in text and "and 12 more" in text and "line 4: not JSON" in text
    assert (
        "line 1: seed is 'x', must be a whole number; stepps is no key. Did you mean steps?; prompt is missing" in text
    )
