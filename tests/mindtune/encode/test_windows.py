"""Windows: every entry is there when its batch is made, disk is bounded, and windows grow while encoding takes long."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from mindtune.data.order import prefetch
from mindtune.distributed import ranks
from mindtune.encode import cache as cache_module
from mindtune.encode import windows
from mindtune.encode.cache import Cache
from mindtune.encode.estimate import EntrySizes
from mindtune.encode.windows import GB, Settings

ENTRY = {"value": np.zeros(200, np.float32)}
SAMPLE = 2000  # bytes that are planned for the caption and the image of a sample; the files have about 1 KB each
PER_UPDATE = 2  # batches


@pytest.fixture(autouse=True)
def entry_sizes(monkeypatch):
    monkeypatch.setattr(EntrySizes, "of", lambda stage: EntrySizes(text=SAMPLE // 2, latent=SAMPLE // 2, factor=16))


class Data:
    """Stands in for the data of a run: batch n has sample n, whose caption and image have its number as their names."""

    sizes = [(16, 16)]  # noqa: RUF012
    images_per_sample = 1
    captions_per_sample = 1

    def __init__(self, count, held_out=()):
        self.count = count
        self.held_out = [f"held out {number}" for number in held_out]

    def batches(self, first, end):
        return ([SimpleNamespace(caption=str(number))] for number in range(first, end))

    def iterate(self, first, end, make, threads):
        return prefetch(lambda number: make([str(number)]), ranks.shard(range(first, end)), threads)

    def captions(self, held_out=False):
        return self.held_out + ([] if held_out else [str(number) for number in range(self.count)])

    def images(self, flip, held_out=False):
        return [f"image {caption}" for caption in self.captions(held_out)]

    def images_of(self, use, flip):
        return [f"image {use.caption}"]


class Stage:
    """Stands in for an encoder stage."""

    def __init__(self, folder, on_call):
        self.cache = Cache(folder)
        self.cache_dir = folder
        self.temporary = False
        self.on_call = on_call
        self.calls = []  # the captions of every call
        self.disk = []  # bytes of temporary entries after every call

    def long_captions(self, captions):
        return []

    def prepare(self, captions, images, total=None, keys=None):
        images = list(images)
        captions = list(captions)
        assert len(images) in (0, total)
        self.calls.append(captions)
        needed = {*images, *captions}
        if keys is not None:
            keys |= needed
        for key in needed - self.cache.keys():
            self.cache.put(key, ENTRY, self.temporary)
        self.disk.append(sum(path.stat().st_size for path in self.cache.windows.glob("*")))
        self.on_call()
        return len(needed)


@pytest.fixture
def go(tmp_path):
    """go(**settings): the stage of a run of 24 batches, or of those from `first` to `end`."""

    def run(first=0, end=24, held_out=(), on_call=lambda: None, on_batch=lambda: None, folder="cache", **settings):
        stage = Stage(tmp_path / folder, on_call)
        settings = Settings(**{"train_batch_size": 1, "cache_latents": True, **settings})
        made = []

        def make(uses):
            known = stage.cache.keys()
            for use in uses:
                assert use in known and f"image {use}" in known
            made.extend(uses)

        data = Data(24, held_out)
        for _ in windows.encode(stage, data, settings, (first, end), PER_UPDATE, ["empty", "validate"]).iterate(make):
            on_batch()
        assert sorted(made, key=int) == [str(number) for number in ranks.shard(range(first, end))]
        return stage

    return run


def test_a_set_without_a_limit_is_encoded_whole(go):
    stage = go(held_out=[1])
    assert len(stage.calls) == 1 and {"validate", "empty", "held out 1", "23"} < set(stage.calls[0])
    assert not stage.cache.windows.exists()


def test_a_set_that_fits_the_limit_is_encoded_whole(go):
    assert len(go(cache_limit_gb=24 * SAMPLE / GB).calls) == 1
    assert len(go(cache_limit_gb=23 * SAMPLE / GB, folder="other").calls) > 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("threads", [0, 1, 5])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_batch_finds_its_entries(go, streaming, threads, window):
    """Also those that are prepared in advance by threads."""
    stage = go(streaming=streaming, encode_window=window, dataloader_num_workers=threads)
    assert stage.calls[0] == ["empty", "validate"]
    numbers = [int(caption) for captions in stage.calls[1:] for caption in captions]
    assert numbers == list(range(24))  # each once
    assert all(len(captions) <= PER_UPDATE * window for captions in stage.calls[2:])


def test_a_run_that_is_resumed_inside_a_window_encodes_what_is_left(go):
    stage = go(streaming=True, encode_window=4, first=10, dataloader_num_workers=1)
    assert stage.calls[1] == [str(number) for number in range(10, 10 + 4 * PER_UPDATE + 4)]


def test_a_run_that_has_no_update_left(go):
    """Resumed with a smaller number of updates than it has made."""
    stage = go(first=10, end=6, streaming=True)
    assert stage.calls[1] == []


def test_held_out_samples_stay(go):
    stage = go(encode_window=1, held_out=[1, 2], cache_limit_gb=1e-9)
    assert stage.calls[0] == ["empty", "validate", "held out 1", "held out 2"]
    names = {path.stem for path in stage.cache.folder.glob("*.safetensors")}
    assert names == {*stage.calls[0], "image held out 1", "image held out 2"}


@pytest.mark.parametrize("given", [{}, {"encode_window": 2}])
def test_two_ranks_encode_at_the_same_batches(go, monkeypatch, given):
    """Each rank reads all batches of a window."""
    calls = []
    monkeypatch.setattr(ranks, "_world_size", 2)
    for rank in range(2):
        monkeypatch.setattr(ranks, "_rank", rank)
        calls.append(go(streaming=True, folder=f"rank {rank}", **given).calls)
    assert calls[0] == calls[1]


# ---- disk ----------------------------------------------------------------------------------------


def test_disk_is_bounded(go):
    """By the limit, which holds two windows."""
    limit = 24 * SAMPLE
    stage = go(end=400, streaming=True, cache_limit_gb=limit / GB, dataloader_num_workers=0)
    assert limit / 4 < max(stage.disk[3:]) <= limit
    assert len(stage.cache.keys()) < 60


def test_a_window_that_is_larger_than_the_limit_is_encoded_nevertheless(go):
    stage = go(streaming=True, encode_window=5, cache_limit_gb=1e-9)
    assert len(stage.calls) > 2


def test_entries_are_removed_oldest_first(tmp_path):
    cache = Cache(tmp_path)
    for number in range(6):
        cache.put(f"k{number}", ENTRY, temporary=True)
        os.utime(cache.path(f"k{number}"), (number, number))
    cache.put("stays", ENTRY)
    size = cache.path("k0").stat().st_size
    cache.touch(["k1", "absent"])
    cache.evict(3 * size, keep={"k2"})
    assert cache.keys() == {"stays", "k1", "k2", "k5"}
    cache.evict(0, keep={"k1"})
    assert cache.keys() == {"stays", "k1"}
    cache.evict(0, keep=set())
    assert cache.keys() == {"stays"}


def test_an_entry_that_another_run_removes_meanwhile(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    for number in range(3):
        cache.put(f"k{number}", ENTRY, temporary=True)
    found = cache_module._entries(cache.windows)
    monkeypatch.setattr(cache_module, "_entries", lambda folder: found)
    cache.path("k1").unlink()
    cache.evict(0, keep=set())
    assert not list(cache.windows.iterdir())


# ---- the length of a window ----------------------------------------------------------------------


def lengths(go, monkeypatch, encode_seconds, update_seconds, **settings):
    """The number of updates in every window but the first, with a clock of our own."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(windows.time, "monotonic", lambda: clock.now)

    def encoding():
        clock.now += encode_seconds

    def training():
        clock.now += update_seconds / PER_UPDATE

    stage = go(streaming=True, on_call=encoding, on_batch=training, dataloader_num_workers=0, **settings)
    return [len(captions) / PER_UPDATE for captions in stage.calls[2:-1]]


def test_windows_double_until_encoding_takes_little_of_the_time(go, monkeypatch):
    """19 s of training per second of encoding are enough: 80 updates of 10 s for 40 s."""
    assert lengths(go, monkeypatch, 40, 10, end=1000) == [40, 80, 80, 80, 80, 80]


def test_windows_stay_short_where_encoding_takes_little(go, monkeypatch):
    assert set(lengths(go, monkeypatch, 1, 10, end=400)) == {20}


def test_windows_grow_up_to_half_of_the_limit(go, monkeypatch):
    limit = 2 * 30 * PER_UPDATE * SAMPLE / GB
    assert set(lengths(go, monkeypatch, 40, 0.1, end=600, cache_limit_gb=limit)) == {30}


def test_encode_window_does_not_change(go, monkeypatch):
    assert set(lengths(go, monkeypatch, 40, 0.1, end=100, encode_window=7)) == {7}
