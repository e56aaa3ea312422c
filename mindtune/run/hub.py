"""Upload of a finished run to a hub, with its model card."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Optional

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mindtune.cli import UserError
from mindtune.files import write_atomically
from mindtune.models import hubs
from mindtune.run.model_card import MARK, model_card
from mindtune.run.report_images import ROWS_FILE

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


def check(hub_model_id: Optional[str], output_dir: str, token: Optional[str], hub: str) -> str:
    """The id of the repository to upload to, with its namespace.

    Called before training, so that no run ends with a refused upload. Default: the output directory's name, in the
    token's account. Raises UserError if the name or the token is not usable.
    """
    name = hub_model_id or Path(output_dir).resolve().name
    _check_name(name, "--hub_model_id" if hub_model_id else "--output_dir")
    side = hubs.HUBS[hub]
    try:
        account = hubs.with_retries(lambda: side.account(token))
    except UserError:
        raise
    except Exception as error:  # refused, unreachable or an unexpected answer: its text says which
        raise UserError(
            f"--push_to_hub: {side.TITLE} does not accept this token: {hubs.error_text(error, token)}. Log in again, "
            "or leave the flag out."
        ) from None
    return name if "/" in name else f"{account}/{name}"


def _check_name(name: str, flag: str) -> None:
    """Raises UserError if a hub would refuse `name` as the id of a repository."""
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


def push(
    repo_id: str,
    output_dir: Path,
    base_model: str,
    gallery: list[tuple[str, str]],
    token: Optional[str],
    hub: str,
) -> str:
    """Writes the model card and uploads it with the final weights, images, plot and run.json.

    `gallery` has the prompt and the file of each image, relative to `output_dir`. Checkpoints are not uploaded. A
    README.md without MARK, which the user wrote, is uploaded as it is. Returns the address of the upload. Raises
    UserError if it fails; files on disk are never changed otherwise.
    """
    readme = output_dir / "README.md"
    if not readme.exists() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
        card = model_card(output_dir, repo_id, base_model, gallery, hub).encode("utf-8", "backslashreplace")
        write_atomically(readme, lambda beside: beside.write_bytes(card))
    # By name, because a pattern such as *.safetensors would match files in checkpoints too.
    paths = [path for pattern in UPLOADED for path in sorted(output_dir.glob(pattern))]
    files = list(
        dict.fromkeys([*(str(path.relative_to(output_dir)) for path in paths), *(file for _, file in gallery)])
    )
    side = hubs.HUBS[hub]
    try:
        return side.upload(repo_id, output_dir, files, token, hubs.with_retries)
    except Exception as error:
        raise UserError(
            f"--push_to_hub {repo_id}: {hubs.error_text(error, token)}.\nThe run is complete on disk, in {output_dir}. "
            "Push again with:\n"
            f"  {shlex.join(side.upload_command(repo_id, output_dir, files))}"
        ) from None
