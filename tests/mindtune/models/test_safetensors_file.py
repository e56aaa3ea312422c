"""Memory-mapped tensors of a safetensors file, with all dtypes of the library and with float8."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mindtune.models.safetensors_file import SAFETENSORS_DTYPES, read_safetensors, write_safetensors


def write_raw(path, entries, data, metadata=None):
    header = {**({"__metadata__": metadata} if metadata else {}), **entries}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_])
def test_files_of_the_safetensors_library(tmp_path, dtype):
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
def test_dtypes_of_ml_dtypes_at_any_offset(tmp_path, code, dtype):
    """At offset 1 nothing is aligned."""
    value = np.array([1.5, -0.25, 448.0]).astype(dtype)
    size = value.nbytes
    entries = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": code, "shape": [3], "data_offsets": [1, 1 + size]},
    }
    found, _ = read_safetensors(write_raw(tmp_path / "f", entries, b"\x07" + value.tobytes()))
    np.testing.assert_array_equal(found["x"].astype(np.float32), [1.5, -0.25, 448.0])


def test_arrays_are_memory_mapped_and_read_only(tmp_path):
    """Only the header of a sparse 1 GB file is read."""
    size = 1 << 30
    write_raw(tmp_path / "f", {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"")
    with open(tmp_path / "f", "ab") as file:
        file.truncate(file.tell() + size)
    found = read_safetensors(tmp_path / "f")[0]["x"]
    assert not found.flags.owndata and not found.flags.writeable and found[-1] == 0


def test_an_unknown_dtype_is_rejected(tmp_path):
    path = write_raw(tmp_path / "f", {"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(ValueError, match="x has the dtype F8_E8M0, which is not supported"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "content, expected",
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
def test_other_files_are_recognised_by_their_first_bytes(tmp_path, content, expected):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot be read as safetensors.*{expected}|{expected}"):
        read_safetensors(tmp_path / "f")


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_safetensors(tmp_path / "absent")


# ---- writing -------------------------------------------------------------------------------------


def test_written_files_hold_every_dtype(tmp_path):
    """Also a number, an empty tensor, and an array whose memory is not in order."""
    values = {code: np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype) for code, dtype in SAFETENSORS_DTYPES.items()}
    values["F32"], values["I64"], values["F16"] = values["F32"][0, 1], values["I64"][:, :0], values["F16"].T
    write_safetensors(tmp_path / "f", {code: (code, value.shape) for code, value in values.items()}, values.values())
    found, metadata = read_safetensors(tmp_path / "f")  # checks the header with the safetensors library
    assert metadata == {"format": "pt"} and list(found) == list(values)
    for code, value in values.items():
        assert found[code].dtype == value.dtype and found[code].shape == value.shape
        np.testing.assert_array_equal(found[code], value)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32)])
def test_an_array_that_is_not_as_announced_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"expected F32 \[2, 3\], got"):
        write_safetensors(tmp_path / "f", {"x": ("F32", (2, 3))}, [wrong])
