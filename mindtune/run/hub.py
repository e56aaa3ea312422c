"""Upload of a finished run to the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any, Callable, Optional

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mindtune.cli import UserError
from mindtune.files import write_atomically
from mindtune.run.report_images import ROWS_FILE, picture_name

MARK = "<!-- This card was written by MindTune; remove this line to keep your own changes. -->"
UPLOADED = (
    "README.md",
    "*.safetensors",
    "config.json",
    "run.json",
    "report.html",
    "samples/final.png",
    "samples/final/row-[0-9]*.png",
    f"samples/final/{ROWS_FILE}",
    "loss_by_timestep.png",
)
PAUSES = (1.0, 4.0, 16.0)  # seconds between attempts, in which the hub or the network may recover


def check(hub_model_id: Optional[str], output_dir: str, token: Optional[str]) -> str:
    """The id of the repository to upload to, with its namespace.

    Called before training, so that no run ends with a refused upload. Default: the output directory's name, in the
    token's account. Raises UserError if the name or the token is not usable.
    """
    name = hub_model_id or Path(output_dir).resolve().name
    _check_name(name, "--hub_model_id" if hub_model_id else "--output_dir")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        account = _with_retries(api.whoami)["name"]
    except LocalTokenNotFoundError:
        raise UserError(
            "--push_to_hub: no token. Log in with `huggingface-cli login`, set HF_TOKEN, or give --hub_token."
        ) from None
    except Exception as error:  # refused, unreachable or an unexpected answer: its text says which
        raise UserError(
            f"--push_to_hub: the hub does not accept this token: {_error_text(error, token)}. Log in again, or leave "
            "the flag out."
        ) from None
    return name if "/" in name else f"{account}/{name}"


def _check_name(name: str, flag: str) -> None:
    """Raises UserError if the hub would refuse `name` as the id of a repository."""
    try:
        validate_repo_id(name)
        refused = not name.isascii()  # validate_repo_id accepts other letters, the hub does not
    except HFValidationError:
        refused = True
    if refused:
        parts = re.sub(r"\.git$", "", name).split("/")
        parts = [re.sub(r"[^A-Za-z0-9._-]+|--+|\.\.+", "-", part).strip("-._") for part in parts]
        usable = "/".join([part for part in parts if part][-2:])[:96] or "my-model"
        raise UserError(
            f"{flag} {name}: with --push_to_hub this is the repository's name, and the hub accepts letters, digits, "
            f"- _ . and at most 96 characters. Give --hub_model_id, such as {usable}."
        )


def push(repo_id: str, output_dir: Path, base_model: str, prompts: list[str], token: Optional[str]) -> str:
    """Writes the model card and uploads it with the final weights, image, plot and run.json.

    Returns the URL of the commit. Checkpoints are not uploaded. A README.md without MARK, which the user wrote, is
    uploaded as it is. Raises UserError if the upload fails; files on disk are never changed otherwise.
    """
    card = output_dir / "README.md"
    if not card.exists() or MARK in card.read_text(errors="replace"):
        text = model_card(output_dir, base_model, prompts)
        write_atomically(card, lambda beside: beside.write_text(text))
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        _with_retries(lambda: api.create_repo(repo_id, exist_ok=True))
        commit = _with_retries(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=output_dir,
                allow_patterns=_files_to_upload(output_dir),
                commit_message="Training with MindTune",
            )
        )
    except Exception as error:
        command = [
            "huggingface-cli",
            "upload",
            repo_id,
            str(output_dir),
            ".",
            "--include",
            *_files_to_upload(output_dir),
        ]
        raise UserError(
            f"--push_to_hub {repo_id}: {_error_text(error, token)}.\nThe run is complete on disk, in {output_dir}. "
            "Push again with:\n"
            f"  {shlex.join(command)}"
        ) from None
    return str(getattr(commit, "commit_url", commit))


def _files_to_upload(output_dir: Path) -> list[str]:
    """The files to upload by name, because a pattern such as *.safetensors would match files in checkpoints too."""
    return [str(path.relative_to(output_dir)) for pattern in UPLOADED for path in sorted(output_dir.glob(pattern))]


def model_card(output_dir: Path, base_model: str, prompts: list[str]) -> str:
    """The model card in Markdown: the kind of model, its base model, the last validation image, prompts and flags."""
    record = json.loads((output_dir / "run.json").read_text())
    controlnet = (output_dir / "config.json").is_file()
    has_image = (output_dir / "samples" / "final.png").is_file()
    image = "![Validation image after training](samples/final.png)\n" if has_image else ""
    flags = {name: value for name, value in record["flags"].items() if value not in (None, False, "", [])}
    rows = "".join(f"| `--{name}` | `{value}` |\n" for name, value in flags.items())
    prompt_list = "".join(f"- {prompt}\n" for prompt in prompts) + _rows(output_dir)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""---
base_model: {json.dumps(base_model)}
library_name: diffusers
license: other
license_name: as-the-base-model
pipeline_tag: text-to-image
tags: [{"controlnet" if controlnet else "lora"}, mindspore, mindone]
---
{MARK}

# {output_dir.resolve().name}

A {"ControlNet" if controlnet else "LoRA adapter"} for `{base_model}`, trained with MindTune on MindSpore.
Its licence is that of the base model.

{image}
{prompt_list}
## Flags

| flag | value |
| --- | --- |
{rows}
Seed {record["seed"]}, {record.get("updates", "?")} updates; {versions}.
"""


def _rows(output_dir: Path) -> str:
    """The rows of --validation_file in Markdown: each prompt with its image after training."""
    path = output_dir / "samples" / "final" / ROWS_FILE
    if not path.is_file():
        return ""
    prompts = [
        " ".join(json.loads(line)["prompt"].split()) for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]
    return "".join(
        f"\n- {prompt}\n\n  ![Row {place}](samples/final/{picture_name(place)})\n"
        for place, prompt in enumerate(prompts, 1)
    )


def _with_retries(call: Callable[[], Any]) -> Any:
    """`call()`, repeated after a pause if the hub fails (status 500 and above) or the connection breaks."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (HfHubHTTPError, OSError) as error:  # requests raises an OSError for a broken connection
            status = getattr(getattr(error, "response", None), "status_code", None)
            if pause is None or (status is not None and status < 500) or isinstance(error, LocalTokenNotFoundError):
                raise
            print(f"the hub: {type(error).__name__}; trying again in {pause:g} seconds", flush=True)
            time.sleep(pause)


def _error_text(error: Exception, token: Optional[str]) -> str:
    """The message of an error on one line, without tokens."""
    text = " ".join(str(error).split())
    for secret in (token, os.environ.get("HF_TOKEN")):
        text = text.replace(secret, "(token)") if secret else text
    return text
