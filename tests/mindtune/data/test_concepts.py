"""The file of --dataset_config: its keys, what is refused, and the images of its concepts."""

import numpy as np
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.concepts import Concept, find_samples, load, read
from mindtune.data.image_data import ClassImages, ImageData
from mindtune.data.image_facts import ImageFacts

FILE = """
[[concept]]
instance_data_dir = "dog"
instance_prompt = "a photo of sks dog"
repeats = 3
weight = 2
class_data_dir = "dogs"
class_prompt = "a photo of a dog"
num_class_images = 7

[[concept]]
instance_data_dir = "style"
center_crop = true
random_flip = false
max_train_samples = 2
"""


@pytest.fixture
def write(tmp_path):
    """write(text): the path of a data.toml next to two images of a dog and three captioned images of a style."""
    for name, count in (("dog", 2), ("style", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (40, 36), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
            if name == "style":
                (tmp_path / name / f"{number}.txt").write_text(f"style {number}")

    def make(text):
        (tmp_path / "data.toml").write_text(text, encoding="utf-8")
        return str(tmp_path / "data.toml")

    return make


def test_keys_flags_and_defaults(write, tmp_path):
    """What the file does not say is as the flags say."""
    flags = Concept(random_flip=True, instance_prompt="from the flag", num_class_images=50, cache_dir="cache")
    dog, style = read(write(FILE), flags)
    assert dog == Concept(
        instance_data_dir=str(tmp_path / "dog"),
        instance_prompt="a photo of sks dog",
        repeats=3,
        weight=2,
        random_flip=True,
        class_data_dir=str(tmp_path / "dogs"),
        class_prompt="a photo of a dog",
        num_class_images=7,
        cache_dir="cache",
    )
    assert (style.instance_prompt, style.center_crop, style.random_flip) == ("from the flag", True, False)
    assert (style.repeats, style.weight, style.num_class_images) == (1, 1.0, 50)


def test_paths_and_ids(write, tmp_path):
    """Absolute paths stay; a data set is a directory next to the file, or else an id."""
    text = f'[[concept]]\ninstance_data_dir = "{tmp_path}/style"\n[[concept]]\ndataset_name = "style"\n'
    found = read(write(text + '[[concept]]\ndataset_name = "someone/style"\n'), Concept())
    assert found[0].instance_data_dir == found[1].dataset_name == str(tmp_path / "style")
    assert found[2].dataset_name == "someone/style"


ONE = '[[concept]]\ninstance_data_dir = "dog"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"data\.toml: it must have tables \[\[concept\]\]"),
        ("concept = ['x']", r"must have tables"),
        ("concept = 3", r"must have tables \[\[concept\]\]"),
        (ONE + "[other]\n", r"has other; it must have tables"),
        ("[[concept]\n", r"is not TOML: .*line 1"),
        (ONE + "repeat = 2", r"concept 1: repeat is no key\. There are instance_data_dir, "),
        (ONE + "cache_dir = 'x'", r"cache_dir is no key"),
        (ONE + ONE + "repeats = 0", r"concept 2: repeats = 0: must be a whole number of 1 or more"),
        (ONE + "repeats = 1.5", r"repeats = 1\.5: must be a whole number"),
        (ONE + "repeats = true", r"repeats = True: must be a whole number"),
        (ONE + "weight = -1", r"weight = -1: must be a number above 0"),
        (ONE + "weight = nan", r"weight = nan: must be a number above 0"),
        (ONE + "random_flip = 1", r"random_flip = 1: must be true or false"),
        (ONE + "instance_prompt = ''", r"instance_prompt = '': must be text"),
        (ONE + "instance_prompt = 3", r"instance_prompt = 3: must be text"),
        ("[[concept]]\ninstance_prompt = 'x'", r"concept 1: give either instance_data_dir or dataset_name"),
        (ONE + "dataset_name = 'x'", r"give either instance_data_dir or dataset_name"),
        (ONE + "class_prompt = 'x'", r"class_data_dir and class_prompt belong together"),
        (
            ONE + "class_data_dir = 'c'\nclass_prompt = 'x'\n" + ONE + "class_data_dir = 'c'\nclass_prompt = 'y'",
            r"class_data_dir .*c has two class prompts",
        ),
    ],
)
def test_what_is_refused(write, text, message):
    with pytest.raises(UserError, match=r"--dataset_config .*data\.toml.*" + message.removeprefix(r"data\.toml")):
        read(write(text), Concept())


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(UserError, match="no.toml: cannot be read"):
        read(str(tmp_path / "no.toml"), Concept())
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not TOML"):
        read(str(tmp_path / "b.toml"), Concept())


def test_the_images_of_all_concepts(write, capsys):
    concepts = read(write(FILE), Concept())
    assert len(find_samples(concepts)) == 4
    samples = load(concepts, 32, ImageFacts(), False, 1)
    assert [sample.caption for sample in samples] == ["a photo of sks dog"] * 2 + ["style 0", "style 1"]
    assert [sample.setting("weight", 5.0) for sample in samples] == [2, 2, 1, 1]
    table = capsys.readouterr().out.splitlines()
    assert table[-3].split()[:5] == ["concept", "images", "repeats", "weight", "crop"]
    assert table[-2].split()[1:6] == ["2", "3", "2", "random", "no"] and "sks dog" in table[-2]
    assert table[-1].split()[1:6] == ["2", "1", "1", "center", "no"] and table[-1].endswith("captions only")


def test_the_id_of_a_data_set_on_modelscope_is_refused(write, tmp_path):
    concepts = read(write('[[concept]]\ndataset_name = "someone/style"\n'), Concept(hub="modelscope"))
    with pytest.raises(UserError, match="--dataset_name someone/style: .*modelscope download --dataset someone/style"):
        load(concepts, [(32, 32)], ImageFacts(tmp_path / "cache", verify=False), skip_bad=False, threads=1)
    with pytest.raises(UserError, match="hub is no key"):
        read(write('[[concept]]\ndataset_name = "someone/style"\nhub = "modelscope"\n'), Concept())


@pytest.mark.parametrize(
    "line, message",
    [
        ("keep_tags = 2", "keep_tags: needs shuffle_tags = true"),
        ("unmasked_weight = 0.5", "unmasked_weight: needs masked_loss = true"),
        ('masked_loss = true\nmask_column = "m"', "mask_column: needs dataset_name"),
        ("shuffle_tags = true\ntag_orders = 1", "tag_orders = 1: must be a whole number of 2 or more"),
        ("weight = inf", "weight = inf: must be a number above 0"),
        ("caption_dropout = 1.0", "caption_dropout = 1.0: must be a number from 0 to below 1"),
    ],
)
def test_keys_without_effect_are_refused(write, line, message):
    with pytest.raises(UserError, match=message):
        read(write(f'[[concept]]\ninstance_data_dir = "dog"\ninstance_prompt = "x"\n{line}\n'), Concept())


def test_captions_and_masks_of_a_concept(write, tmp_path):
    text = (
        '[[concept]]\ninstance_data_dir = "dog"\ninstance_prompt = "a dog"\ntrigger_word = "sks"\nmasked_loss = true\n'
    )
    samples = load(read(write(text), Concept()), 32, ImageFacts(), False, 1)
    assert {sample.caption for sample in samples} == {"sks, a dog"}
    assert all(sample.mask is not None for sample in samples)


def test_an_image_without_a_caption_needs_a_prompt(write):
    with pytest.raises(UserError, match=r"2 images have no caption"):
        load(read(write(ONE), Concept()), 32, ImageFacts(), False, 1)


def test_repeats_flips_and_draws(write):
    """A repeated image is used as often as said per epoch, each time with draws of its own."""
    samples = load(read(write(FILE), Concept(random_flip=True)), 32, ImageFacts(), False, 1)
    data = ImageData(
        samples, np.zeros(4, int), ClassImages([], np.array([], int)), sizes=[(32, 32)], seed=0, batch_size=1
    )
    assert data.epoch_length == 2 * 3 + 2
    uses = [data.uses(number)[0] for number in range(8)]
    names = [f"{use.sample.concept.instance_data_dir[-3:]}{use.sample.name}" for use in uses]
    assert sorted(names) == ["dog0.png"] * 3 + ["dog1.png"] * 3 + ["yle0.png", "yle1.png"]
    noises = {use.draws.normal("noise", (4,)).tobytes() for use in uses}
    assert len(noises) == 8
    flips = {(sample.name, flip) for sample, _, flip in data.images(random_flip=True) if sample.concept.center_crop}
    assert flips == {("0.png", False), ("1.png", False)}
