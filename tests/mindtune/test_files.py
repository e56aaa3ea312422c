"""Atomic writes, hashes, and directories that can be written to."""

import errno

import pytest

from mindtune.cli import UserError
from mindtune.files import file_digest, require_writable, text_digest, write_atomically, write_folder_atomically


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write_atomically_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, lambda beside: beside.write_text("old"))

    def fails(beside):
        beside.write_text("new but torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        write_atomically(path, fails)
    assert path.read_text() == "old" and names(tmp_path) == ["run.json"]


def test_a_folder_is_whole_or_absent(tmp_path):
    """Also after an earlier process was killed while it wrote."""

    def fails(folder):
        (folder / "half").write_text("torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        write_folder_atomically(tmp_path / "out", fails)
    assert names(tmp_path) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("torn")
    write_folder_atomically(tmp_path / "out", lambda folder: (folder / "file").write_text("whole"))
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


def test_file_digest_reads_past_a_block(tmp_path):
    """A million times "a" has the SHA-256 that NIST publishes; the byte after the first 2^20 counts too."""
    path = tmp_path / "a"
    path.write_bytes(b"a" * 1_000_000)
    assert file_digest(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    digests = set()
    for last in (b"x", b"y"):
        path.write_bytes(b"a" * (1 << 20) + last)
        digests.add(file_digest(path))
    assert len(digests) == 2


def test_text_digest_depends_on_where_a_text_ends():
    assert len({text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}) == 5


@pytest.mark.parametrize("folder", [".", "new", "new/deeper/still"])
def test_a_writable_directory_is_accepted(tmp_path, folder):
    require_writable("--cache_dir", str(tmp_path / folder))
    require_writable("--cache_dir", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "folder, reason", [("file", "is not a directory"), ("file/below", "is not a directory"), ("x" * 300, "cannot be")]
)
def test_a_directory_that_is_not_writable_is_refused(tmp_path, folder, reason):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^--cache_dir .*{reason}.* Name another directory"):
        require_writable("--cache_dir", str(tmp_path / folder))


def test_a_file_system_without_files_is_refused():
    """Not even root may write to /proc."""
    with pytest.raises(UserError, match=r"^--output_dir /proc/out: /proc cannot be written to \("):
        require_writable("--output_dir", "/proc/out")
