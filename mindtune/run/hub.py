"""Uploading what a run left to the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Callable, Optional

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mindtune.cli import UserError
from mindtune.files import write_atomically

MARK = "<!-- This card was written by MindTune; remove this line to keep your own changes. -->"
UPLOADED = (
    "README.md",
    "*.safetensors",
    "config.json",
    "run.json",
    "report.html",
    "samples/final.png",
    "loss_by_timestep.png",
)
PAUSES = (1.0, 4.0, 16.0)  # seconds between tries, where the hub or the network may recover


def check(hub_model_id: Optional[str], output_dir: str, token: Optional[str]) -> str:
    """The repository to upload to, namespace and all; asked before a run, so that no run ends with a refused upload.

    Default: the output directory's name, in the account that the token belongs to. Raises UserError without a usable token.
    """
    name = hub_model_id or Path(output_dir).resolve().name
    _require_name(name, "--hub_model_id" if hub_model_id else "--output_dir")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        account = _patiently(api.whoami)["name"]
    except LocalTokenNotFoundError:
        raise UserError(
            "--push_to_hub: no token. Log in with `huggingface-cli login`, set HF_TOKEN, or give --hub_token."
        ) from None
    except Exception as error:  # refused, unreachable, answered with something else: the text says which
        raise UserError(
            f"--push_to_hub: the hub does not know this token: {_said(error, token)}. Log in again, or leave it out."
        ) from None
    return name if "/" in name else f"{account}/{name}"


def _require_name(name: str, flag: str) -> None:
    """Raises UserError for what the hub refuses as the name of a repository."""
    try:
        validate_repo_id(name)
        refused = not name.isascii()  # which that lets through and the hub does not
    except HFValidationError:
        refused = True
    if refused:
        parts = [
            re.sub(r"[^A-Za-z0-9._-]+|--+|\.\.+", "-", part).strip("-._")
            for part in re.sub(r"\.git$", "", name).split("/")
        ]
        usable = "/".join([part for part in parts if part][-2:])[:96] or "my-model"
        raise UserError(
            f"{flag} {name}: with --push_to_hub this is the repository's name, and the hub takes letters, digits, - _ . and at most 96 "
            f"characters. Give --hub_model_id, such as {usable}."
        )


def push(repo_id: str, output_dir: Path, base_model: str, prompts: list[str], token: Optional[str]) -> str:
    """Writes the model card and uploads it with the final weights, picture, plot and run.json; never checkpoints. Gives the address.

    A README.md that somebody else wrote is uploaded as it is. Raises UserError; what is on disk stays as it was.
    """
    card = output_dir / "README.md"
    if not card.exists() or MARK in card.read_text(errors="replace"):
        text = model_card(output_dir, base_model, prompts)
        write_atomically(card, lambda beside: beside.write_text(text))
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        _patiently(lambda: api.create_repo(repo_id, exist_ok=True))
        message = "Training with MindTune"
        done = _patiently(
            lambda: api.upload_folder(
                repo_id=repo_id, folder_path=output_dir, allow_patterns=_top(output_dir), commit_message=message
            )
        )
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: {_said(error, token)}.\nNothing on disk is lost: {output_dir} is complete. Push again with:\n"
            f"  {shlex.join(['huggingface-cli', 'upload', repo_id, str(output_dir), '.', '--include', *_top(output_dir)])}"
        ) from None
    return str(getattr(done, "commit_url", done))


def _top(output_dir: Path) -> list[str]:
    """The files to upload, by name: a pattern such as *.safetensors would match those of checkpoints too."""
    return [str(path.relative_to(output_dir)) for pattern in UPLOADED for path in sorted(output_dir.glob(pattern))]


def model_card(output_dir: Path, base_model: str, prompts: list[str]) -> str:
    """Markdown: what the model is and was made from, the last picture, prompts, and the flags of run.json."""
    record = json.loads((output_dir / "run.json").read_text())
    what = "controlnet" if (output_dir / "config.json").is_file() else "lora"
    image = (
        "![What it drew at the end](samples/final.png)\n" if (output_dir / "samples" / "final.png").is_file() else ""
    )
    rows = "".join(
        f"| `--{name}` | `{value}` |\n" for name, value in record["flags"].items() if value not in (None, False, "", [])
    )
    asked = "".join(f"- {prompt}\n" for prompt in prompts)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""---
base_model: {json.dumps(base_model)}
library_name: diffusers
license: other
license_name: as-the-base-model
pipeline_tag: text-to-image
tags: [{what}, mindspore, mindone]
---
{MARK}

# {output_dir.resolve().name}

A {"ControlNet" if what == "controlnet" else "LoRA adapter"} for `{base_model}`, trained with MindTune on MindSpore. Its licence is that
of the base model.

{image}
{asked}
## Flags

| flag | value |
| --- | --- |
{rows}
Seed {record["seed"]}, {record.get("updates", "?")} updates; {versions}.
"""


def _patiently(call: Callable):
    """`call()`, tried again after a pause where the hub failed (500 and above) or the connection broke."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (HfHubHTTPError, OSError) as error:  # a broken connection is an OSError in requests
            status = getattr(getattr(error, "response", None), "status_code", None)
            if pause is None or (status is not None and status < 500) or isinstance(error, LocalTokenNotFoundError):
                raise
            print(f"the hub: {type(error).__name__}; trying again in {pause:g} seconds", flush=True)
            time.sleep(pause)


def _said(error: Exception, token: Optional[str]) -> str:
    text = " ".join(str(error).split())
    for secret in (token, os.environ.get("HF_TOKEN")):
        text = text.replace(secret, "(token)") if secret else text
    return text
