"""Uploads to fakes of both hubs: which files arrive, and failures."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import fake_hub as huggingface
import fake_modelscope as modelscope
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from mindtune.cli import UserError
from mindtune.models import hubs
from mindtune.run import hub
from mindtune.run.model_card import MARK

GALLERY = [("a red circle", "samples/final-1.png")]
UPLOADED = {
    "README.md",
    "config.json",
    "run.json",
    "diffusion_pytorch_model.safetensors",
    "samples/final.png",
    "samples/final-1.png",
}


@pytest.fixture(params=["huggingface", "modelscope"])
def side(request, monkeypatch):
    """A hub: its name, its fake, the token it accepts, and where its requests for commits and repositories go."""
    monkeypatch.setattr(hubs, "PAUSES", (0.01, 0.02, 0.04))
    if request.param == "huggingface":
        fake, token, create = request.getfixturevalue("fake_hub"), huggingface.TOKEN, "/api/repos/create"
    else:
        fake, token, create = request.getfixturevalue("fake_modelscope"), modelscope.TOKEN, "/api/v1/models"
    return SimpleNamespace(name=request.param, fake=fake, token=token, create=create)


@pytest.fixture
def result(tmp_path):
    """The files of a finished run, and one of the user's."""
    out = tmp_path / "circles"
    for folder in (out, out / "checkpoint-3" / "controlnet"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"x": np.arange(9.0)}, folder / "diffusion_pytorch_model.safetensors")
    (out / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (out / "samples").mkdir()
    for name in ("final", "final-1", "final-holiday"):
        Image.new("RGB", (8, 8)).save(out / "samples" / f"{name}.png")
    record = {"flags": {"hub_token": None}, "seed": 7, "versions": {"mindspore": "2.7.1"}, "updates": 3}
    (out / "run.json").write_text(json.dumps(record))
    return out


@pytest.fixture
def credentials():
    """The folder where the modelscope library keeps a login."""
    from modelscope.hub.api import ModelScopeConfig

    return Path(ModelScopeConfig.path_credential)


def check(side, out, name=None):
    return hub.check(name, str(out), side.token, side.name)


def push(side, out, name=None, gallery=GALLERY):
    return hub.push(check(side, out, name), out, "some/base", gallery, side.token, side.name)


def test_the_final_files_are_uploaded_and_no_checkpoint(side, result):
    address = push(side, result)
    assert address.startswith(side.fake.url) and "somebody/circles" in address
    assert side.fake.repositories == ["somebody/circles"]
    assert set(side.fake.files) == UPLOADED
    for name, content in side.fake.files.items():
        assert content == (result / name).read_bytes(), name
    assert push(side, result) == address  # into the repository that is there now
    assert set(side.fake.repositories) == {"somebody/circles"}


def test_images_of_a_file_are_uploaded_once(side, result):
    folder = result / "samples" / "final"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    names = ["row-01.png", "row-01-base.png", "row-02.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "mine.png").write_bytes(b"private")
    push(side, result, gallery=[("a", "samples/final/row-01.png"), ("b", "samples/final/row-02.png")])
    expected = {*(UPLOADED - {"samples/final-1.png"}), *(f"samples/final/{name}" for name in ("rows.jsonl", *names))}
    assert set(side.fake.files) == expected


def test_a_users_readme_is_kept_and_a_generated_one_is_replaced(side, result):
    (result / "README.md").write_text("mine")
    push(side, result, "club/model")
    assert side.fake.repositories == ["club/model"]
    assert side.fake.files["README.md"] == b"mine" == (result / "README.md").read_bytes()
    (result / "README.md").write_text(f"{MARK} old")
    push(side, result)
    assert b"a red circle" in side.fake.files["README.md"]


@pytest.mark.parametrize(
    "side, where",
    [
        *(("huggingface", where) for where in ("whoami", "/repos/create", "/preupload/")),
        *(("modelscope", where) for where in ("/login", "/somebody/circles", "/api/v1/models")),
        *itertools.product(("huggingface", "modelscope"), ("/objects/batch", "/lfs/", "/commit/")),
    ],
    indirect=["side"],
)
def test_two_failures_then_success(side, result, where):
    side.fake.trouble[where] = [500, 500]
    push(side, result)
    assert side.fake.trouble[where] == [] and set(side.fake.files) == UPLOADED


def test_a_broken_connection_is_retried(side, result):
    side.fake.trouble["/commit/"] = ["cut"]
    push(side, result)
    assert set(side.fake.files) == UPLOADED


@pytest.mark.parametrize("trouble", [[401], ["cut"] * 40, [500] * 40])
def test_a_failed_upload_keeps_the_files_and_prints_the_command_to_repeat_it(side, result, trouble):
    before = {path: path.read_bytes() for path in result.rglob("*") if path.is_file()}
    repo_id = check(side, result)
    side.fake.trouble["/commit/"] = list(trouble)
    with pytest.raises(UserError) as error:
        hub.push(repo_id, result, "base", GALLERY, side.token, side.name)
    message = str(error.value)
    program, place = {"huggingface": ("huggingface-cli", " ."), "modelscope": ("modelscope", "")}[side.name]
    assert f"  {program} upload somebody/circles {result}{place} --include README.md" in message
    assert message.endswith("samples/final.png samples/final-1.png") and side.token not in message
    assert {path: path.read_bytes() for path in before} == before
    side.fake.trouble.clear()
    push(side, result)
    assert set(side.fake.files) == UPLOADED


def test_the_printed_command_uploads_to_modelscope(fake_modelscope, result, monkeypatch):
    """Hugging Face's is run by hand; ModelScope's library is younger."""
    from modelscope.cli.cli import run_cmd

    monkeypatch.setenv("MODELSCOPE_API_TOKEN", modelscope.TOKEN)
    (result / "README.md").write_text("mine")
    command = hubs.HUBS["modelscope"].upload_command("somebody/circles", result, sorted(UPLOADED))
    monkeypatch.setattr("sys.argv", command)
    run_cmd()
    assert set(fake_modelscope.files) == UPLOADED


def test_a_refused_token_raises_an_error_before_training(side, result):
    said = {"huggingface": "the hub does not accept this token: Invalid user token", "modelscope": "ModelScope does"}
    with pytest.raises(UserError, match=said[side.name]) as error:
        hub.check(None, str(result), "wrong0token", side.name)
    assert "wrong0token" not in str(error.value)
    assert side.fake.repositories == []


def test_a_missing_token_raises_an_error_before_training(side, result, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(UserError, match="no token.*--hub_token"):
        hub.check(None, str(result), None, side.name)


def test_a_token_of_the_environment_and_a_login_are_used(fake_modelscope, result, monkeypatch):
    from modelscope.hub.api import HubApi, ModelScopeConfig

    monkeypatch.setenv("MODELSCOPE_API_TOKEN", modelscope.TOKEN)
    assert hub.check(None, str(result), None, "modelscope") == "somebody/circles"
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    ModelScopeConfig.save_user_info("me", "")
    ModelScopeConfig.save_cookies(HubApi()._get_cookies(modelscope.TOKEN))
    assert hub.push(hub.check(None, str(result), None, "modelscope"), result, "x", [], None, "modelscope")
    assert fake_modelscope.repositories == ["me/circles"] and "config.json" in fake_modelscope.files


def test_an_unreachable_hub_raises_an_error(side, result):
    side.fake.close()
    with pytest.raises(UserError, match="--push_to_hub"):
        check(side, result)


def test_the_token_is_never_written_or_printed(side, result, capfd, caplog, credentials):
    side.fake.trouble["/commit/"] = [500]
    push(side, result)
    printed = capfd.readouterr()
    assert side.token not in printed.out + printed.err + caplog.text and "trying again" in printed.out
    written = [path for folder in (result, credentials) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if side.token.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "model_id, folder, named, usable",
    [
        (None, "my dog lora", "--output_dir my dog lora", "my-dog-lora"),
        ("somebody/my dog", "out", "--hub_model_id somebody/my dog", "somebody/my-dog"),
        ("a/b/c", "out", "--hub_model_id a/b/c", "b/c"),
        ("me/x.git", "out", "--hub_model_id me/x.git", "me/x"),
        ("/me", "out", "--hub_model_id /me", "me"),
        (None, "我的模型", "--output_dir 我的模型", "my-model"),
        (None, "a--b", "--output_dir a--b", "a-b"),
        (None, "x" * 97, "--output_dir " + "x" * 97, "x" * 96),
    ],
)
def test_a_name_that_a_hub_would_refuse_raises_an_error_before_any_request(
    side, tmp_path, model_id, folder, named, usable
):
    with pytest.raises(UserError) as error:
        check(side, tmp_path / folder, model_id)
    assert str(error.value).startswith(f"{named}: with --push_to_hub")
    assert str(error.value).endswith(f"such as {usable}.")
    assert side.fake.requests == []
    assert check(side, tmp_path, usable if "/" in usable else f"me/{usable}")


def test_the_command_to_repeat_an_upload_quotes_paths_with_spaces(side, result):
    spaced = result.rename(result.with_name("my circles"))
    side.fake.trouble[side.create] = [403] * 9
    with pytest.raises(UserError) as error:
        hub.push("somebody/circles", spaced, "base", [], side.token, side.name)
    assert f" upload somebody/circles '{spaced}' " in str(error.value)
