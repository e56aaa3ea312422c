"""Uploads to a fake hub: which files arrive, the model card, and failures."""

import json

import numpy as np
import pytest
from fake_hub import TOKEN
from PIL import Image
from safetensors.numpy import save_file

from mindtune.cli import UserError
from mindtune.run import hub

UPLOADED = {"README.md", "config.json", "run.json", "diffusion_pytorch_model.safetensors", "samples/final.png"}


@pytest.fixture
def result(tmp_path, monkeypatch):
    """The files of a finished run."""
    monkeypatch.setattr(hub, "PAUSES", (0.01, 0.02, 0.04))
    out = tmp_path / "circles"
    for folder in (out, out / "checkpoint-3" / "controlnet"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"x": np.arange(9.0)}, folder / "diffusion_pytorch_model.safetensors")
    (out / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (out / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(out / "samples" / "final.png")
    flags = {"learning_rate": 1e-5, "seed": None, "push_to_hub": True, "hub_token": None}
    flags["validation_prompt"] = ["a red circle"]
    record = {"flags": flags, "seed": 7, "versions": {"mindspore": "2.7.1"}, "updates": 3}
    (out / "run.json").write_text(json.dumps(record))
    return out


def push(out, name=None):
    return hub.push(hub.check(name, str(out), TOKEN), out, "some/base: model", ["a red circle"], TOKEN)


def test_the_final_files_are_uploaded_and_no_checkpoint(fake_hub, result):
    assert push(result) == f"{fake_hub.url}/somebody/circles/commit/{'0' * 40}"
    assert fake_hub.repositories == ["somebody/circles"]
    assert set(fake_hub.files) == UPLOADED
    for name, content in fake_hub.files.items():
        assert content == (result / name).read_bytes(), name


def test_the_model_card(fake_hub, result):
    import yaml

    push(result, "club/model")
    assert fake_hub.repositories == ["club/model"]
    card = fake_hub.files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "some/base: model" and header["tags"] == ["controlnet", "mindspore", "mindone"]
    assert "![Validation image after training](samples/final.png)" in card and "- a red circle" in card
    assert "| `--learning_rate` | `1e-05` |" in card and "`--seed`" not in card
    assert "Seed 7, 3 updates; mindspore 2.7.1." in card


def test_images_of_a_file_are_uploaded_and_shown(fake_hub, result):
    folder = result / "samples" / "final"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "a red\\ncircle"}\n{"prompt": "星"}\n', encoding="utf-8")
    names = ["row-01.png", "row-01-base.png", "row-02.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "mine.png").write_bytes(b"private")
    push(result)
    assert set(fake_hub.files) == {*UPLOADED, "samples/final/rows.jsonl", *(f"samples/final/{name}" for name in names)}
    card = fake_hub.files["README.md"].decode()
    assert "- a red circle\n\n  ![Row 1](samples/final/row-01.png)\n" in card
    assert "- 星\n\n  ![Row 2](samples/final/row-02.png)\n" in card


def test_a_users_readme_is_kept_and_a_generated_one_is_replaced(fake_hub, result):
    (result / "README.md").write_text("mine")
    push(result)
    assert fake_hub.files["README.md"] == b"mine" == (result / "README.md").read_bytes()
    (result / "README.md").write_text(f"{hub.MARK} old")
    push(result)
    assert b"a red circle" in fake_hub.files["README.md"]


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/objects/batch", "/lfs/", "/commit/"])
def test_two_failures_then_success(fake_hub, result, where):
    fake_hub.trouble[where] = [500, 500]
    push(result)
    assert set(fake_hub.files) == UPLOADED


def test_a_broken_connection_is_retried(fake_hub, result):
    fake_hub.trouble["/commit/"] = ["cut"]
    push(result)
    assert set(fake_hub.files) == UPLOADED


@pytest.mark.parametrize("trouble", [[401], ["cut"] * 40, [500] * 40])
def test_a_failed_upload_keeps_the_files_and_prints_the_command_to_repeat_it(fake_hub, result, trouble):
    before = {path: path.read_bytes() for path in result.rglob("*") if path.is_file()}
    repo_id = hub.check(None, str(result), TOKEN)
    fake_hub.trouble["/commit/"] = trouble
    with pytest.raises(UserError) as error:
        hub.push(repo_id, result, "base", [], TOKEN)
    message = str(error.value)
    assert f"huggingface-cli upload somebody/circles {result} . --include" in message and TOKEN not in message
    assert {path: path.read_bytes() for path in before} == before
    fake_hub.trouble.clear()
    push(result)
    assert set(fake_hub.files) == UPLOADED


def test_a_refused_or_missing_token_raises_an_error_before_training(fake_hub, result, monkeypatch):
    with pytest.raises(UserError, match="does not accept this token: Invalid user token") as error:
        hub.check(None, str(result), "hf_wrong0token")
    assert "hf_wrong0token" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with pytest.raises(UserError, match="no token.*--hub_token"):
        hub.check(None, str(result), None)


def test_an_unreachable_hub_raises_an_error(fake_hub, result):
    fake_hub.close()
    with pytest.raises(UserError, match="--push_to_hub"):
        hub.check(None, str(result), TOKEN)


def test_the_token_is_never_written_or_printed(fake_hub, result, capsys):
    fake_hub.trouble["/commit/"] = [500]
    push(result)
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err and "trying again" in printed.out
    assert not [path for path in result.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


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
def test_a_name_that_the_hub_would_refuse_raises_an_error_before_any_request(
    fake_hub, tmp_path, model_id, folder, named, usable
):
    with pytest.raises(UserError) as error:
        hub.check(model_id, str(tmp_path / folder), TOKEN)
    assert str(error.value).startswith(f"{named}: with --push_to_hub")
    assert str(error.value).endswith(f"such as {usable}.")
    assert fake_hub.requests == []
    assert hub.check(usable if "/" in usable else f"me/{usable}", str(tmp_path), TOKEN)


def test_the_command_to_repeat_an_upload_quotes_paths_with_spaces(fake_hub, result):
    spaced = result.rename(result.with_name("my circles"))
    fake_hub.trouble["/api/repos/create"] = [403]
    with pytest.raises(UserError) as error:
        hub.push("somebody/circles", spaced, "base", [], TOKEN)
    assert f"huggingface-cli upload somebody/circles '{spaced}' . --include" in str(error.value)
