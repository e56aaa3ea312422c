"""Arrays that lie in a safetensors file: the library's values and types, and float8, which it does not read."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mindtune.models.safetensors_file import read_safetensors


def raw(path, entries, data, metadata=None):
    header = {**({"__metadata__": metadata} if metadata else {}), **entries}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_])
def test_what_the_library_wrote_is_read(tmp_path, dtype):
    values = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "number": np.array(1, dtype),
        "none": np.zeros((0, 4), dtype),
    }
    save_file(values, tmp_path / "f", metadata={"a": "b"})
    found, metadata = read_safetensors(tmp_path / "f")
    assert metadata == {"a": "b"} and sorted(found) == sorted(values)
    for name, value in values.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "code, dtype",
    [("BF16", ml_dtypes.bfloat16), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)],
)
def test_the_types_of_ml_dtypes_wherever_they_begin(tmp_path, code, dtype):
    """After one byte: nothing is aligned then."""
    value = np.array([1.5, -0.25, 448.0]).astype(dtype)
    size = value.nbytes
    entries = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": code, "shape": [3], "data_offsets": [1, 1 + size]},
    }
    found, _ = read_safetensors(raw(tmp_path / "f", entries, b"\x07" + value.tobytes()))
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1.5, -0.25, 448.0])


def test_arrays_lie_in_the_file_and_cannot_be_written(tmp_path):
    """Of a file of 1 GB that was never written, only the header is read."""
    size = 1 << 30
    raw(tmp_path / "f", {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"")
    with open(tmp_path / "f", "ab") as file:
        file.truncate(file.tell() + size)
    found = read_safetensors(tmp_path / "f")[0]["x"]
    assert not found.flags.owndata and not found.flags.writeable and found[-1] == 0


def test_a_type_that_numpy_does_not_have_is_named(tmp_path):
    path = raw(tmp_path / "f", {"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(ValueError, match="x has the dtype F8_E8M0, which is not supported"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "cannot be read as safetensors"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive or a pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "it is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"GGUF" + bytes(100), "it is GGUF"),
        ((100).to_bytes(8, "little") + b"{}", "cannot be read as safetensors"),
    ],
)
def test_other_files_are_told_by_how_they_begin(tmp_path, content, sentence):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot be read as safetensors.*{sentence}|{sentence}"):
        read_safetensors(tmp_path / "f")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "absent")
