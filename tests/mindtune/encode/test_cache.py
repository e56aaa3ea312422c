"""Encoder outputs on disk: what was written comes back, anything else counts as absent."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mindtune.encode.cache import Cache, encoder_fingerprint, key_of

KEY = key_of(caption="a cat", length=16)


def tensors():
    rng = np.random.default_rng(0)
    return {"embeds": rng.standard_normal((2, 3), dtype=np.float32), "pooled": rng.standard_normal(4, dtype=np.float32)}


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "not" / "there yet")
    cache.put(KEY, tensors())
    return cache


def test_what_was_put_comes_back_bit_for_bit(cache):
    found = cache.get(KEY)
    assert cache.valid(KEY) and found.keys() == tensors().keys()
    for name, value in tensors().items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_type_and_layout_comes_back(cache, dtype):
    """A transposed view, whose memory is not in order, and an empty array."""
    values = {"view": np.arange(6).reshape(2, 3).astype(dtype).T, "empty": np.zeros((0, 4), dtype)}
    cache.put("k", values)
    assert cache.valid("k")
    for name, value in cache.get("k").items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, values[name])


def test_a_scalar_keeps_its_shape(cache):
    cache.put("k", {"scale": np.array(3.0, np.float32)})
    assert cache.valid("k") and cache.get("k")["scale"].shape == ()


def test_an_absent_entry_is_none(cache):
    assert not cache.valid("other") and cache.get("other") is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_torn_file_counts_as_absent(cache, share):
    content = cache.path(KEY).read_bytes()
    cache.path(KEY).write_bytes(content[: int(share * len(content))])
    assert not cache.valid(KEY) and cache.get(KEY) is None


def test_no_flipped_bit_passes(cache):
    """One bit of every byte in turn, header and data."""
    path, content = cache.path(KEY), cache.path(KEY).read_bytes()
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        assert not cache.valid(KEY), f"byte {place} of {len(content)}"
    path.write_bytes(content)
    assert cache.valid(KEY)


def test_another_entry_under_this_name_does_not_pass(cache):
    cache.put("other", tensors())
    os.replace(cache.path("other"), cache.path(KEY))
    assert not cache.valid(KEY)


def test_a_file_of_another_program_does_not_pass(cache):
    save_file(tensors(), cache.path(KEY))
    assert not cache.valid(KEY)


def test_a_folder_in_the_place_of_an_entry_does_not_pass(cache):
    cache.path("folder").mkdir()
    assert not cache.valid("folder") and cache.get("folder") is None


def test_a_killed_writer_leaves_no_entry(cache, monkeypatch):
    """The file gets its name only when it is whole; what is left beside is never read."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.put("other", tensors())
    assert not cache.valid("other") and [p.name for p in cache.folder.iterdir()] == [f"{KEY}.safetensors"]


def test_a_leftover_partial_file_does_no_harm(cache):
    """As SIGKILL leaves it."""
    (cache.folder / f".other.{os.getpid()}.partial").write_bytes(b"torn")
    assert not cache.valid("other")
    cache.put("other", tensors())
    assert cache.valid("other")


def test_putting_again_replaces(cache):
    cache.put(KEY, {"embeds": np.zeros(1, np.float32)})
    assert cache.valid(KEY) and list(cache.get(KEY)) == ["embeds"]


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_depends_on_every_part_but_not_on_their_order():
    assert key_of(a=1, b="x") == key_of(b="x", a=1)
    assert (
        len({key_of(a=1, b="x"), key_of(a=2, b="x"), key_of(a=1, b="y"), key_of(a=1, c="x"), key_of(a="1", b="x")}) == 5
    )


def encoder(folder: Path, size: int, seed: int = 0):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"layers": 2}')
    (folder / "model.safetensors").write_bytes(np.random.default_rng(seed).bytes(size))
    return folder, [folder / "model.safetensors"]


def test_a_fingerprint_is_of_the_content_not_the_place(tmp_path):
    assert encoder_fingerprint(*encoder(tmp_path / "a", 100)) == encoder_fingerprint(*encoder(tmp_path / "b", 100))


def test_a_fingerprint_changes_with_one_byte_of_the_weights(tmp_path):
    folder, weights = encoder(tmp_path / "a", 100_000)
    before, content = encoder_fingerprint(folder, weights), bytearray(weights[0].read_bytes())
    content[77_777] ^= 1
    weights[0].write_bytes(content)
    assert encoder_fingerprint(folder, weights) != before


def test_a_fingerprint_changes_with_the_config(tmp_path):
    folder, weights = encoder(tmp_path / "a", 100)
    before = encoder_fingerprint(folder, weights)
    (folder / "config.json").write_text('{"layers": 3}')
    assert encoder_fingerprint(folder, weights) != before


def test_a_large_file_retrained_all_over_changes_the_fingerprint(tmp_path):
    """Above 16 MB only samples are read: same size, other numbers."""
    size = (1 << 24) + 5
    assert encoder_fingerprint(*encoder(tmp_path / "a", size, seed=0)) != encoder_fingerprint(
        *encoder(tmp_path / "a", size, seed=1)
    )


@pytest.mark.parametrize("place", [0, -1])
def test_the_ends_of_a_large_file_count(tmp_path, place):
    folder, weights = encoder(tmp_path / "a", (1 << 24) + 5)
    before, content = encoder_fingerprint(folder, weights), bytearray(weights[0].read_bytes())
    content[place] ^= 1
    weights[0].write_bytes(content)
    assert encoder_fingerprint(folder, weights) != before


def test_an_entry_is_as_readable_as_any_new_file(cache, tmp_path):
    (tmp_path / "any").touch()
    assert cache.path(KEY).stat().st_mode == (tmp_path / "any").stat().st_mode
