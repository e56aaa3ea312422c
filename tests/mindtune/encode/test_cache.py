"""The cache of encoder outputs: what was written is read unchanged, and anything else counts as absent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mindtune.encode import cache as cache_module
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


def test_an_entry_is_read_bit_for_bit(cache):
    found = cache.get(KEY)
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_dtype_and_layout(cache, dtype):
    """A transposed view, which is not contiguous, and an empty array."""
    values = {"view": np.arange(6).reshape(2, 3).astype(dtype).T, "empty": np.zeros((0, 4), dtype)}
    cache.put("k", values)
    for name, value in cache.get("k").items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, values[name])


def test_a_scalar_keeps_its_shape(cache):
    cache.put("k", {"scale": np.array(3.0, np.float32)})
    assert cache.get("k")["scale"].shape == ()


def test_an_absent_entry_is_none(cache):
    assert cache.get("other") is None and cache.keys() == {KEY}


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_counts_as_absent(cache, fraction):
    content = cache.path(KEY).read_bytes()
    cache.path(KEY).write_bytes(content[: int(fraction * len(content))])
    assert cache.get(KEY) is None


def test_any_flipped_bit_is_detected(cache):
    """One bit of every byte in turn, in the header and in the data."""
    path, content = cache.path(KEY), cache.path(KEY).read_bytes()
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        path.write_bytes(broken)
        assert cache.get(KEY) is None, f"byte {position} of {len(content)}"
    path.write_bytes(content)
    assert cache.get(KEY) is not None


def test_an_entry_under_another_entrys_name_is_not_valid(cache):
    cache.put("other", tensors())
    os.replace(cache.path("other"), cache.path(KEY))
    assert cache.get(KEY) is None


def test_a_file_of_another_program_is_not_valid(cache):
    save_file(tensors(), cache.path(KEY))
    assert cache.get(KEY) is None


def test_a_folder_with_the_name_of_an_entry_is_not_valid(cache):
    cache.path("folder").mkdir()
    assert cache.get("folder") is None


def test_a_killed_writer_leaves_no_entry(cache, monkeypatch):
    """A file gets its final name when it is complete, and the temporary file is removed."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.put("other", tensors())
    assert cache.get("other") is None and [p.name for p in cache.folder.iterdir()] == [f"{KEY}.safetensors"]


def test_a_temporary_file_that_sigkill_left_is_ignored(cache):
    (cache.folder / f".other.{os.getpid()}.partial").write_bytes(b"torn")
    assert cache.get("other") is None
    cache.put("other", tensors())
    assert cache.get("other") is not None


def test_put_replaces_an_entry(cache):
    cache.put(KEY, {"embeds": np.zeros(1, np.float32)})
    assert list(cache.get(KEY)) == ["embeds"]


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_depends_on_every_part_but_not_on_their_order():
    assert key_of(a=1, b="x") == key_of(b="x", a=1)
    parts = ({"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "y"}, {"a": 1, "c": "x"}, {"a": "1", "b": "x"})
    assert len({key_of(**each) for each in parts}) == 5


def encoder(folder: Path, size: int, seed: int = 0):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"layers": 2}')
    (folder / "model.safetensors").write_bytes(np.random.default_rng(seed).bytes(size))
    return folder, [folder / "model.safetensors"]


def test_a_fingerprint_depends_on_the_content_and_not_on_the_path(tmp_path):
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


@pytest.fixture
def small_limit(monkeypatch):
    """Only samples of files above 1 MB are read."""
    monkeypatch.setattr(cache_module, "SAMPLED_ABOVE", 1 << 20)
    monkeypatch.setattr(cache_module, "SAMPLE_BYTES", 1 << 10)


def test_a_large_file_of_other_weights_has_another_fingerprint(tmp_path, small_limit):
    size = (1 << 20) + 5
    first = encoder_fingerprint(*encoder(tmp_path / "a", size, seed=0))
    assert encoder_fingerprint(*encoder(tmp_path / "a", size, seed=1)) != first


def test_the_ends_of_a_large_file_count_and_bytes_between_samples_do_not(tmp_path, small_limit):
    folder, weights = encoder(tmp_path / "a", (1 << 20) + 5)
    before = encoder_fingerprint(folder, weights)
    for position, same in ((0, False), (-1, False), (2000, True)):
        content = bytearray(weights[0].read_bytes())
        content[position] ^= 1
        weights[0].write_bytes(content)
        assert (encoder_fingerprint(folder, weights) == before) == same, position
        content[position] ^= 1
        weights[0].write_bytes(content)


def test_an_entry_has_the_permissions_of_any_new_file(cache, tmp_path):
    (tmp_path / "any").touch()
    assert cache.path(KEY).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_partial_files_are_removed_a_day_later(cache):
    """Those of a process that was killed; another process may be writing the newer ones."""
    cache.put("a", {"x": np.arange(3.0)}, temporary=True)
    old, new = cache.windows / ".b.1.2.partial", cache.folder / ".c.1.2.partial"
    for path in (old, new):
        path.write_bytes(b"torn")
    os.utime(old, (0, 0))
    cache.remove_partial()
    assert not old.exists() and new.exists() and cache.get("a") is not None


EVICTING = """
import sys
from mindtune.encode.cache import Cache
cache = Cache(sys.argv[1])
print("begin", flush=True)
cache.evict(0, keep={"0000"})
"""


def test_a_process_that_is_killed_while_it_evicts_leaves_whole_entries(tmp_path):
    """Some entries are gone, the others are as they were, and the next eviction goes on."""
    cache = Cache(tmp_path)
    for number in range(2000):
        cache.put(f"{number:04d}", {"x": np.full(4, number, np.float32)}, temporary=True)
    process = subprocess.Popen([sys.executable, "-c", EVICTING, str(cache.folder)], stdout=subprocess.PIPE)
    process.stdout.readline()
    while len(cache.keys()) > 1990 and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(cache.keys())
    assert 1 <= len(left) <= 1990 and "0000" in left
    for key in left:
        np.testing.assert_array_equal(cache.get(key)["x"], np.full(4, int(key), np.float32))
    limit = max(cache.temporary_bytes() // 2, cache.path("0000").stat().st_size)
    cache.evict(limit, keep={"0000"})
    assert 0 < cache.temporary_bytes() <= limit and cache.get("0000") is not None
