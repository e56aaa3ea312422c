"""The uses of images that make up each batch of a LoRA run, by position."""

import numpy as np

from mindtune import rng
from mindtune.data.image_data import ClassImages, ImageData
from mindtune.data.image_sample import Sample
from mindtune.distributed import ranks

NO_CLASS_IMAGES = ClassImages([], np.array([], int))
SIZES = [(32, 48), (48, 32)]


def samples(prefix, count):
    names = [f"{prefix}{n}" for n in range(count)]
    return [Sample(name, None, f"caption {name}", known_digest=f"{name};") for name in names]


def image_data(count=5, class_count=0, sizes=SIZES[:1], **more):
    class_images = ClassImages(samples("c", class_count), np.arange(class_count) % len(sizes))
    settings = {"sizes": sizes, "seed": 3, "batch_size": 2, **more}
    return ImageData(samples("i", count), np.arange(count) % len(sizes), class_images, **settings)


def names(data, batches):
    return [use.sample.name for number in range(batches) for use in data.uses(number)]


def test_every_epoch_uses_every_image_repeats_times():
    data = image_data(5, repeats=2)
    found = names(data, 15)  # three epochs of ten uses
    assert data.epoch_length == 10
    for epoch in range(3):
        part = found[10 * epoch : 10 * epoch + 10]
        assert sorted(part) == sorted([f"i{n}" for n in range(5)] * 2)
    assert found[:10] != found[10:20]


def test_one_bucket_is_the_stream_of_the_seed():
    """The order of version 0.1.0, which a checkpoint resumes: the stream is named instance."""
    data = image_data(5)
    stream = rng.SampleStream(3, "instance", 5)
    expected = [stream.at(position) for position in range(12)]
    found = [(int(use.sample.name[1:]), use.draws.key[1]) for number in range(6) for use in data.uses(number)]
    assert found == expected


def test_class_images_follow_the_instance_images_of_the_batch():
    data = image_data(4, class_count=6)
    stream = rng.SampleStream(3, "class", 6)
    position = 0
    for number in range(9):
        uses = data.uses(number)
        assert [use.draws.group for use in uses] == ["instance"] * 2 + ["class"] * 2
        for use in uses[2:]:
            assert (int(use.sample.name[1:]), use.draws.key[1]) == stream.at(position)
            position += 1
    assert data.epoch_length == 6  # of the larger of the two


def test_a_batch_has_the_images_of_one_bucket_and_class_images_of_the_same():
    data = image_data(5, class_count=4, sizes=SIZES)
    for number in range(10):
        uses = data.uses(number)
        (size,) = {use.size for use in uses}
        assert {int(use.sample.name[1:]) % 2 for use in uses} == {SIZES.index(size)}


def test_held_out_images_are_not_trained_on():
    data = image_data(10, validation_split=0.3, sizes=SIZES)
    assert len(data.held_out) == 3 and len(data.train) == 7
    held_out = {sample.name for sample in data.held_out}
    assert held_out.isdisjoint(names(data, 40))
    assert data.facts() == {"samples": 7, "held_out": [sample.name for sample in data.held_out]}
    for sample_id, sample in enumerate(data.held_out):
        use = data.held_out_use(sample_id, 437)
        assert use.sample is sample and use.size == SIZES[int(sample.name[1:]) % 2]
        assert use.draws.timestep(None) == 437


def test_captions_images_and_fingerprint_of_a_run():
    data = image_data(3, class_count=2, validation_split=0.3)
    (held,) = data.held_out
    captions = [f"caption {sample.name}" for sample in (*data.train, held, *data.class_images.samples)]
    assert data.captions() == captions
    images = [(sample.name, size, flip) for sample, size, flip in data.images(random_flip=True)]
    trained = [sample.name for sample in (*data.train, *data.class_images.samples)]
    assert images == [
        *((name, SIZES[0], flip) for name in trained for flip in (False, True)),
        (held.name, SIZES[0], False),
    ]
    assert {flip for *_, flip in data.images(random_flip=False)} == {False}
    before = data.fingerprint()
    assert before == image_data(3, class_count=2, validation_split=0.3).fingerprint()
    data.train[0].caption = "another"
    assert data.fingerprint() != before


def test_ranks_share_the_batches_and_threads_keep_their_order(monkeypatch):
    data = image_data(5)
    expected = [[use.sample.name for use in data.uses(number)] for number in range(2, 8)]
    make = lambda uses: [use.sample.name for use in uses]  # noqa: E731
    for threads in (0, 3):
        assert list(data.iterate(2, 8, make, threads)) == expected
    found = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "_rank", rank)
        monkeypatch.setattr(ranks, "_world_size", 2)
        found.append(list(data.iterate(2, 8, make, 0)))
    assert [batch for pair in zip(*found) for batch in pair] == expected
