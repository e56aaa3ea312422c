"""The pairs of a run whose conditions may be missing, or have sizes of their own, and what the encoders get of them."""

import collections
import json

import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.data import pair_data
from mindtune.data.columns import Source
from mindtune.data.image_facts import ImageFacts

from .image_files import noise

# (size of the image, size of the condition), each (width, height); None: no condition.
KINDS = [((64, 64), (64, 64)), ((64, 64), (90, 60)), ((64, 64), None), ((96, 64), (48, 32)), ((96, 64), (40, 80))]
CROPS = {0: (64, 64), 1: (48, 80), 2: None, 3: (64, 64), 4: (64, 32)}
COUNT = 20


def write_pairs(folder):
    """Pairs of each of KINDS in turn; the caption is the number of the pair."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(COUNT):
        size, condition = KINDS[number % len(KINDS)]
        noise(*size, number).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": str(number)}
        if condition:
            noise(*condition, 100 + number).save(folder / f"{number}-source.png")
            row["conditioning_image_file_name"] = f"{number}-source.png"
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("edits") / "pairs")


@pytest.fixture
def load(folder):
    """load(**settings): the `PairData` of a run on the folder."""

    def load(facts=None, seed=0, folder=folder, **settings):
        source = Source(train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), condition_optional=True)
        settings = {"train_batch_size": 2, "resolution": 64, "own_condition_size": True, **settings}
        return pair_data.load(source, pair_data.Settings(**settings), seed, facts, encode_conditions=True)

    return load


def kind(pair):
    return int(pair.caption) % len(KINDS)


def test_the_crop_of_a_condition(load, capsys):
    """That of its image for the same shape at any scale, another one for another shape, none without a condition."""
    data = load()
    assert [pair.image.size for pair in data.train] == [KINDS[number % 5][0] for number in range(COUNT)]
    assert [pair.condition and pair.condition.size for pair in data.train] == [
        KINDS[number % 5][1] for number in range(COUNT)
    ]
    for pair in data.train:
        assert data.condition_size(pair, (64, 64)) == CROPS[kind(pair)]
    printed = capsys.readouterr().out
    assert ": 4 of 20 pairs have no condition, such as " in printed
    assert ": 4 conditions are smaller than their crops, and are enlarged: those of " in printed
    assert [line.split()[:3] for line in printed.splitlines()[-4:]] == [
        ["64,64", "64,64", "8"],
        ["64,64", "none", "4"],
        ["64,64", "48,80", "4"],
        ["64,64", "64,32", "4"],
    ]


def test_the_position_of_the_crop_of_a_condition(load, tmp_path):
    """That of its image for the same shape, the middle for another one, also where both crops have the same size."""
    position = (0.1, 0.9)
    data = load()
    found = {kind(pair): data.condition_position(pair, position) for pair in data.train if pair.condition}
    assert found == {0: position, 1: None, 3: position, 4: None}
    noise(64, 64, 0).save(tmp_path / "square.png")
    noise(72, 64, 1).save(tmp_path / "nearly.png")
    row = {"file_name": "square.png", "conditioning_image_file_name": "nearly.png", "text": "0"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    data = load(folder=tmp_path)
    assert data.condition_size(data.train[0], (64, 64)) == (64, 64)
    assert data.condition_position(data.train[0], position) is None


def test_all_pairs_of_a_batch_have_the_same_sizes(load):
    """Also where fewer pairs than a batch have these sizes. In an epoch all pairs are used."""
    data = load(train_batch_size=3)
    assert data.sizes == [(64, 64)] * 4
    used = collections.Counter()
    for uses in data.batches(0, 4 * 20):
        sizes = {(use.size, data.condition_size(use.sample, use.size)) for use in uses}
        assert len(sizes) == 1 and len(uses) == 3
        used.update(use.sample.caption for use in uses)
    assert len(used) == COUNT and set(used.values()) <= {11, 12, 13}


def test_images_of_several_sizes_and_their_conditions(load):
    """4 pairs of each combination; those of an image size follow each other."""
    data = load(aspect_ratio_buckets="64,64;64,96")
    assert data.sizes == [(64, 64)] * 3 + [(64, 96)] * 2
    found = collections.Counter()
    for uses in data.batches(0, 10):
        found[uses[0].size, data.condition_size(uses[0].sample, uses[0].size)] += len(uses)
    assert found == dict.fromkeys(
        [((64, 64), (64, 64)), ((64, 64), CROPS[1]), ((64, 64), None), ((64, 96), (64, 96)), ((64, 96), (96, 48))], 4
    )


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_encoders_get_each_image_and_condition_in_its_own_size(load, random_flip, held_out):
    data = load(validation_split=0.25)
    images = data.images(random_flip, held_out)
    found = [(sample.digest, size, flip) for sample, size, flip in images]
    pairs = [(pair, [False]) for pair in data.held_out]
    pairs += [] if held_out else [(pair, [False, True] if random_flip else [False]) for pair in data.train]
    expected = []
    for pair, flips in pairs:
        for flip in flips:
            expected.append((pair.image.digest, (64, 64), flip))
            if pair.condition:
                expected.append((pair.condition.digest, CROPS[kind(pair)], flip))
    assert found == expected and len(images) == len(expected)
    assert any(pair.condition is None for pair in data.held_out) or held_out is False


def test_the_images_of_a_use_are_those_of_all(load):
    """For windows: the same keys of the cache."""
    data = load()
    everything = {(sample.digest, size, flip) for sample, size, flip in data.images(True)}
    found = {
        (sample.digest, size, flip)
        for uses in data.batches(0, 60)
        for use in uses
        for sample, size, flip in data.images_of(use, True)
    }
    assert found == everything


def test_the_fingerprint_depends_on_every_condition(load, folder, tmp_path):
    first = load().fingerprint()
    assert load().fingerprint() == first
    other = write_pairs(tmp_path / "pairs")
    assert load(folder=other).fingerprint() == first
    rows = [json.loads(line) for line in (other / "metadata.jsonl").read_text().splitlines()]
    del rows[1]["conditioning_image_file_name"]
    (other / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(folder=other).fingerprint() != first


def test_what_is_remembered_of_images_gives_the_same_data(load, tmp_path):
    first, second = (load(ImageFacts(tmp_path / "facts")) for _ in range(2))
    assert first.fingerprint() == second.fingerprint() and first.sizes == second.sizes
    np.testing.assert_array_equal(first.bucket_ids, second.bucket_ids)


# ---- conditions in the size of their images ------------------------------------------------------


def test_pairs_without_a_condition_among_others_of_one_size(load, tmp_path, folder):
    """As masks to fill, which are not encoded. They may be in one batch, because those without get a random mask."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "file_name": str(folder / row["file_name"])} for row in rows if int(row["text"]) % 5 in (0, 2)]
    for row in rows:
        if "conditioning_image_file_name" in row:
            row["conditioning_image_file_name"] = str(folder / row["conditioning_image_file_name"])
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(jsonl_for_train=str(path), cache_dir=str(tmp_path / "cache"), condition_optional=True)
    data = pair_data.load(source, pair_data.Settings(train_batch_size=8, resolution=64), 0)
    assert data.sizes == [(64, 64)] and len(data.images(False)) == 8 == len(list(data.images(False)))
    (uses,) = data.batches(0, 1)
    assert {use.sample.condition is None for use in uses} == {True, False}
    assert {data.condition_size(use.sample, use.size) for use in uses} == {None, (64, 64)}


def test_conditions_of_another_size_are_refused(load):
    with pytest.raises(UserError, match="12 of 20 pairs cannot be used") as error:
        load(own_condition_size=False)
    assert "64x64, its condition 90x60" in str(error.value)


# ---- streams -------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path, folder):
    """stream(kinds, **settings): the `PairData` of a stream of the pairs of these KINDS, in their order."""

    def load(kinds, **settings):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        rows = [row for row in rows if int(row["text"]) % 5 in kinds]
        (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(jsonl_for_train=str(folder / "some.jsonl"), condition_optional=True)
        settings = {"own_condition_size": True, "shuffle_buffer_size": 1, **settings}
        settings = pair_data.Settings(2, 64, streaming=True, max_train_steps=6, **settings)
        return pair_data.load(source, settings, 0, encode_conditions=True)

    return load


@pytest.mark.parametrize("cache_latents", [False, True])
def test_the_conditions_of_a_stream_are_cropped_like_their_images(stream, cache_latents):
    data = stream([0, 1, 3, 4], cache_latents=cache_latents)
    uses = [use for batch in data.iterate(0, 6, list, 1) for use in batch]
    assert {data.condition_size(use.sample, use.size) for use in uses} == {(64, 64)}
    for use in uses:
        images = data.images_of(use, False)
        assert images == [(use.sample.image, (64, 64), False), (use.sample.condition, (64, 64), False)]


def test_a_stream_checks_sizes_only_where_they_must_agree(stream):
    data = stream([0, 1], own_condition_size=False)
    with pytest.raises(UserError, match="64x64, its condition 90x60"):
        list(data.iterate(0, 6, list, 0))


def test_a_pair_without_a_condition_ends_a_stream_of_conditions_of_their_own_size(stream):
    data = stream([0, 2])
    with pytest.raises(UserError, match="position 1 of the stream: has no condition"):
        list(data.iterate(0, 1, list, 0))


def test_a_stream_may_have_pairs_without_a_condition_otherwise(stream):
    data = stream([0, 2], own_condition_size=False)
    (uses,) = data.iterate(0, 1, list, 0)
    assert [data.condition_size(use.sample, use.size) for use in uses] == [(64, 64), None]
    assert [len(data.images_of(use, False)) for use in uses] == [2, 1]
