"""Checkpoints are complete or absent, and other files in the directory are not touched."""

import errno
import json
import os

import mindspore as ms
import numpy as np
import pytest

from mindtune.cli import UserError
from mindtune.run.checkpoint import (
    MANIFEST,
    checkpoints,
    damage,
    find_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
    set_aside_later,
)


def writes(text):
    def write(folder):
        (folder / "state.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "more.bin").write_bytes(b"\x00" * 1000)

    return write


def disk_full(folder):
    (folder / "state.txt").write_text("half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def break_file(folder):
    (folder / "state.txt").write_text("4 but altered")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def three(tmp_path):
    """A directory with checkpoint-2, -4 and -10."""
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, writes(str(step)))
    return tmp_path


# ---- saving --------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_written_files_and_is_undamaged(tmp_path):
    folder = save_checkpoint(tmp_path / "out", 7, writes("hello"))
    assert folder == tmp_path / "out" / "checkpoint-7" and damage(folder) is None
    assert (folder / "state.txt").read_text() == "hello" and names(folder) == ["inner", MANIFEST, "state.txt"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 7
    sha256_of_hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert manifest["files"]["state.txt"] == sha256_of_hello


def test_a_full_disk_leaves_nothing_behind_and_keeps_the_older_checkpoint(tmp_path):
    older = save_checkpoint(tmp_path, 1, writes("1"))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, disk_full, total_limit=1)
    assert names(tmp_path) == ["checkpoint-1"] and damage(older) is None


def test_an_undamaged_checkpoint_of_the_same_step_is_not_written_again(tmp_path):
    """It belongs to the same run, resumed at its end: writing it again could only lose it."""
    folder = save_checkpoint(tmp_path, 2, writes("first"))
    assert save_checkpoint(tmp_path, 2, disk_full) == folder
    assert damage(folder) is None and (folder / "state.txt").read_text() == "first"


def test_the_partial_folder_of_a_killed_process_is_ignored_and_replaced(three):
    partial = three / ".checkpoint-12.partial"
    partial.mkdir()
    (partial / "state.txt").write_text("half of")
    assert find_checkpoint(three, "latest").name == "checkpoint-10"
    folder = save_checkpoint(three, 12, writes("12"))
    assert damage(folder) is None and (folder / "state.txt").read_text() == "12" and not partial.exists()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    break_file(save_checkpoint(tmp_path, 2, writes("first")))
    assert (save_checkpoint(tmp_path, 2, writes("second")) / "state.txt").read_text() == "second"


def test_total_limit_keeps_the_latest_steps(three):
    save_checkpoint(three, 12, writes("12"), total_limit=2)
    assert names(three) == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("limit", [1, 2])
def test_total_limit_never_removes_the_new_checkpoint(three, limit):
    """After resuming from checkpoint-2, the new checkpoint-3 has a lower step than the existing checkpoints."""
    folder = save_checkpoint(three, 3, writes("3"), total_limit=limit)
    assert damage(folder) is None and len(checkpoints(three)) == limit


def test_a_folder_without_a_manifest_is_never_removed(three):
    """Other programs have folders named checkpoint-<n> too."""
    foreign = three / "checkpoint-1"
    foreign.mkdir()
    (foreign / "precious.bin").write_bytes(b"x")
    (three / "checkpoint-notes").mkdir()
    save_checkpoint(three, 12, writes("12"), total_limit=1)
    assert (foreign / "precious.bin").exists() and (three / "checkpoint-notes").exists()
    assert [p.name for p in checkpoints(three)] == ["checkpoint-12"]


def test_a_folder_without_a_manifest_with_the_name_of_a_checkpoint_keeps_its_files(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "precious.bin").write_bytes(b"x")
    assert damage(save_checkpoint(tmp_path, 4, writes("4"))) is None
    assert len(list(tmp_path.rglob("precious.bin"))) == 1


def test_checkpoints_are_sorted_by_step(three):
    assert [p.name for p in checkpoints(three)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


# ---- finding damage ------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "change, problem", [(truncate, "is damaged"), (alter, "is damaged"), (os.remove, "is missing")]
)
@pytest.mark.parametrize("name", ["state.txt", "inner/more.bin"])
def test_damage_names_the_file(tmp_path, change, problem, name):
    folder = save_checkpoint(tmp_path, 2, writes("2"))
    change(folder / name)
    assert damage(folder) == f"{name} {problem}"


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "{}", '{"files": []}', b"\xff\xfe"])
def test_an_unusable_manifest_is_damage(tmp_path, content):
    folder = save_checkpoint(tmp_path, 2, writes("2"))
    if content is None:
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{MANIFEST} cannot be read" in damage(folder)


# ---- finding a checkpoint ------------------------------------------------------------------------


def test_latest_is_the_highest_step_and_not_the_last_name(three, capsys):
    assert find_checkpoint(three, "latest") == three / "checkpoint-10"
    assert capsys.readouterr().out == ""


def test_latest_skips_damaged_checkpoints_and_reports_them(three, capsys):
    break_file(three / "checkpoint-10")
    (three / "checkpoint-4" / "inner" / "more.bin").unlink()
    assert find_checkpoint(three, "latest") == three / "checkpoint-2"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "checkpoint-10: state.txt is damaged; falling back to the checkpoint before it",
        "checkpoint-4: inner/more.bin is missing; falling back to the checkpoint before it",
    ]


def test_latest_in_an_empty_or_missing_directory_is_none(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None and find_checkpoint(tmp_path / "absent", "latest") is None


def test_latest_raises_an_error_if_all_checkpoints_are_damaged(three):
    for folder in checkpoints(three):
        break_file(folder)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(three, "latest")


def test_a_checkpoint_by_name_and_by_path(three, tmp_path_factory):
    assert find_checkpoint(three, "checkpoint-4") == three / "checkpoint-4"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert find_checkpoint(elsewhere, str(three / "checkpoint-4")) == three / "checkpoint-4"


def test_an_unknown_name_lists_the_checkpoints(three):
    with pytest.raises(UserError, match=r"checkpoint-5: no such checkpoint.*checkpoint-2, checkpoint-4, checkpoint-10"):
        find_checkpoint(three, "checkpoint-5")


def test_a_damaged_checkpoint_given_by_name_is_refused(three):
    break_file(three / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4: state.txt is damaged"):
        find_checkpoint(three, "checkpoint-4")


# ---- parameters ----------------------------------------------------------------------------------


def state(fill, **changes):
    shapes = {"weight": ((2, 3), ms.float32), "scale": ((), ms.float32), "step": ((1,), ms.int32), **changes}
    return {k: ms.Parameter(ms.Tensor(np.full(shape, fill), dtype), name=k) for k, (shape, dtype) in shapes.items()}


def test_state_is_loaded_bit_for_bit_also_scalars_and_counters(tmp_path):
    """Prodigy's step size and the loss scale have the shape ()."""
    saved, path = state(7), tmp_path / "state.safetensors"
    saved["weight"].set_data(ms.Tensor(np.float32([[1 / 3, -0.0, 1e-40], [np.inf, 2**-126, 5]])))
    save_state(path, saved)
    fresh = state(0)
    load_state(path, fresh)
    for name, parameter in fresh.items():
        assert parameter.shape == saved[name].shape and parameter.dtype == saved[name].dtype
        assert parameter.asnumpy().tobytes() == saved[name].asnumpy().tobytes()


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_state_comes_back(tmp_path, dtype):
    saved = {"w": ms.Parameter(ms.Tensor([1.5, -3.0], dtype), name="w")}
    save_state(tmp_path / "s", saved)
    fresh = {"w": ms.Parameter(ms.Tensor([0.0, 0.0], dtype), name="w")}
    load_state(tmp_path / "s", fresh)
    assert fresh["w"].dtype == dtype and fresh["w"].to(ms.float32).asnumpy().tolist() == [1.5, -3.0]


def test_state_that_the_run_or_the_checkpoint_lacks_is_refused(tmp_path):
    save_state(tmp_path / "s", state(1, more=((1,), ms.float32)))
    with pytest.raises(UserError, match=r"more: this run has no such state.*rank, targets, optimizer"):
        load_state(tmp_path / "s", state(0))
    save_state(tmp_path / "s", state(1))
    with pytest.raises(UserError, match="other: the checkpoint has no such state"):
        load_state(tmp_path / "s", state(0, other=((1,), ms.float32)))


def test_state_of_other_ranks_is_not_loaded(tmp_path):
    save_state(tmp_path / "s", {**state(1, more=((1,), ms.float32)), "array": np.float32([2])})
    fresh = state(0)
    load_state(tmp_path / "s", fresh, elsewhere=["more", "array", *fresh])
    assert all((parameter.asnumpy() == 1).all() for parameter in fresh.values())
    with pytest.raises(UserError, match="array: this run has no such state"):
        load_state(tmp_path / "s", state(0), elsewhere=["more"])


def test_the_numbered_names_of_version_0_1_0_are_loaded(tmp_path):
    numbered = {f"optimizer.{number:04d}.{name}": p for number, (name, p) in enumerate(state(3).items())}
    save_state(tmp_path / "s", numbered)
    fresh = {f"optimizer.{name}": p for name, p in state(0).items()}
    load_state(tmp_path / "s", fresh)
    assert all((parameter.asnumpy() == 3).all() for parameter in fresh.values())


def test_the_error_for_another_shape_names_both_shapes(tmp_path):
    save_state(tmp_path / "s", state(1))
    with pytest.raises(UserError, match=r"weight has shape \(2, 3\), this run needs \(4, 3\)"):
        load_state(tmp_path / "s", state(0, weight=((4, 3), ms.float32)))


# ---- resuming from an older checkpoint -----------------------------------------------------------


def test_later_checkpoints_are_set_aside(three):
    """Otherwise `latest` would name the abandoned run and not the resumed one."""
    aside = set_aside_later(three, three / "checkpoint-2")
    assert sorted(path.name.split(".")[0] for path in aside) == ["checkpoint-10", "checkpoint-4"]
    assert all(damage(path) is None for path in aside)
    assert find_checkpoint(three, "latest").name == "checkpoint-2"


def test_resuming_from_another_directory_sets_nothing_aside(three, tmp_path_factory):
    other = save_checkpoint(tmp_path_factory.mktemp("other"), 3, writes("3"))
    assert set_aside_later(three, other) == []
    assert len(checkpoints(three)) == 3


def test_a_state_has_the_permissions_of_any_new_file(tmp_path):
    """Files that safetensors writes are readable for their owner only."""
    (tmp_path / "any").touch()
    save_state(tmp_path / "s", state(1))
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_checkpoint_that_was_set_aside_can_be_resumed(three):
    aside = {path.name.split(".")[0]: path for path in set_aside_later(three, three / "checkpoint-2")}
    assert find_checkpoint(three, aside["checkpoint-4"].name) == aside["checkpoint-4"]
    save_checkpoint(three, 6, writes("6"))
    assert [path.name.split(".")[0] for path in set_aside_later(three, aside["checkpoint-4"])] == ["checkpoint-6"]
