"""The form's folders: every path of a command line is in them, whatever way it is written."""

import os

import pytest

from mindtune.app.folders import IN_OUTPUT_DIR, PATHS, TEXT, list_folders, require_closed
from mindtune.cli import UserError

REFUSED = {"dataset_config", "jsonl_for_train", "validation_file", "hub_token"}


@pytest.fixture
def outside(folders, tmp_path):
    """Links in the folders: to a folder and a file outside, to an inner folder, and to itself."""
    (tmp_path / "secret" / "key.png").write_bytes(b"")
    (folders.data / "out").symlink_to(tmp_path / "secret")
    (folders.data / "file.png").symlink_to(tmp_path / "secret" / "key.png")
    (folders.data / "inner").symlink_to(folders.data / "cats")
    (folders.data / "loop").symlink_to(folders.data / "loop")
    return folders


@pytest.mark.parametrize("text", ["cats", "./cats", "cats/../cats", "inner", "{data}/cats", "{data}//inner/."])
def test_a_path_inside_is_resolved(outside, text):
    path = outside.path("instance_data_dir", text.format(data=outside.data), ("data",))
    assert str(path) == os.path.realpath(outside.data / "cats")


def test_the_folders_themselves_may_be_links(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders.data)
    linked = folders._replace(data=tmp_path / "link")
    for text in ("cats", str(folders.data / "cats"), str(tmp_path / "link" / "cats")):
        assert str(linked.path("instance_data_dir", text, ("data",))) == os.path.realpath(folders.data / "cats")


@pytest.mark.parametrize(
    "text",
    [
        "..",
        "../secret",
        "cats/../../secret",
        "{data}/../secret",
        "{data}-2",
        "/",
        "/etc/passwd",
        "{models}/flux",
        "out",
        "out/key.png",
        "file.png",
        "inner/../../secret",
        "inner/../../data-2",
    ],
)
def test_a_path_outside_is_refused(outside, text):
    text = text.format(data=outside.data, models=outside.models)
    with pytest.raises(UserError) as caught:
        outside.path("instance_data_dir", text, ("data",))
    assert f"--instance_data_dir {text}: is outside of --data {outside.data}" in str(caught.value)


@pytest.mark.parametrize("text", ["loop", "loop/x", "a\0b"])
def test_what_is_no_path_is_refused(outside, text):
    with pytest.raises(UserError, match="--instance_data_dir"):
        outside.path("instance_data_dir", text, ("data",))


def test_home_and_variables_are_not_expanded(folders):
    for text in ("~", "$HOME", "%HOME%"):
        assert folders.path("cache_dir", text, ("outputs",)) == folders.outputs / text


def test_of_two_folders_the_one_that_has_the_path_is_taken(folders):
    kinds = PATHS["lora_model_name_or_path"]
    (folders.outputs / "dog").mkdir()
    assert folders.path("lora_model_name_or_path", "dog", kinds) == folders.outputs / "dog"
    assert folders.path("lora_model_name_or_path", "flux", kinds) == folders.models / "flux"
    assert folders.path("lora_model_name_or_path", "absent", kinds) == folders.models / "absent"
    with pytest.raises(UserError, match="outside of --models .*models or --outputs .*outputs,"):
        folders.path("lora_model_name_or_path", str(folders.data / "cats"), kinds)


def test_every_text_flag_of_the_scripts_is_a_path_or_plain_text_or_refused(scripts):
    """A new flag is refused until it is put into one of the tables."""
    known = {*PATHS, *IN_OUTPUT_DIR, *TEXT, *REFUSED}
    for path, parser in scripts.values():
        free = [action for action in parser._actions if action.nargs != 0 and not action.choices]
        assert {action.dest for action in free if action.type is None} - known == set(), path
        types = {action.type for action in free} - {None, int, float}
        assert {function.__name__ for function in types} <= {"boolean", "parse_resolution"}, path
    assert not TEXT & PATHS.keys() and not REFUSED & (TEXT | PATHS.keys())


def test_a_link_that_leads_out_is_found_at_any_depth_and_behind_links(folders, tmp_path):
    root, cats = folders.data, folders.data / "cats"
    (root / "dogs" / "deep").mkdir(parents=True)
    (cats / "more").symlink_to(root / "dogs")
    (root / "dogs" / "back").symlink_to(cats)  # a circle
    (root / "dogs" / "self").symlink_to(root / "dogs" / "self")
    require_closed("--instance_data_dir", cats, root)
    (root / "dogs" / "deep" / "x.png").symlink_to(tmp_path / "secret" / "absent.png")
    for folder in (cats, root / "dogs", root):
        with pytest.raises(UserError, match=r"^--instance_data_dir .*: the link .*x\.png leads out of .*data,"):
            require_closed("--instance_data_dir", folder, root)
    require_closed("--output_dir", tmp_path / "absent", folders.outputs)


def test_folders_are_listed_without_hidden_and_deep_ones(folders):
    for name in (".git", "a/b/c/d", "empty"):
        (folders.data / name).mkdir(parents=True)
    for name in (".git/x", "a/b/x", "a/b/c/d/x"):
        (folders.data / name).write_text("")
    assert list_folders(folders.data, has=bool, depth=3) == ["a/b", "cats"]
    assert list_folders(folders.data, has=bool, depth=4) == ["a/b", "a/b/c/d", "cats"]
    assert list_folders(folders.data, has=lambda files: "sks-blue.txt" in files, depth=3) == ["cats"]
