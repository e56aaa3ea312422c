"""The Hugging Face hub, or the mirror that HF_ENDPOINT names. `hubs` chooses between it and ModelScope."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Optional

import huggingface_hub
from huggingface_hub import errors

from mindtune.cli import UserError

TITLE = "the hub"
TOKEN_VARIABLE = "HF_TOKEN"
OFFLINE_ADVICE = (
    "Check the network, name a mirror with HF_ENDPOINT, use --hub modelscope, or download it elsewhere and give the "
    "directory."
)


# ---- downloads -----------------------------------------------------------------------------------


def list_files(name: str, revision: Optional[str]) -> list[str]:
    """The names of all files of a model's repository."""
    return huggingface_hub.HfApi().list_repo_files(name, revision=revision)


def download(name: str, revision: Optional[str], cache_dir: Optional[str], patterns: list[str]) -> Path:
    """The directory with the files that match one of the `patterns`. Without a network, those in the cache."""
    return Path(
        huggingface_hub.snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
    )


def advice(error: Exception, name: str) -> str:
    """What to do about an error of a download; empty if its own text says it."""
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        return (
            f"Accept its licence on {huggingface_hub.constants.ENDPOINT}/{name}, and log in with "
            "`huggingface-cli login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "Check the id; a private model needs `huggingface-cli login` or HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return "Give a branch, a tag or a commit of this repository as --revision."
    return OFFLINE_ADVICE if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) else ""


# ---- uploads -------------------------------------------------------------------------------------


def _api(token: Optional[str]) -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def account(token: Optional[str]) -> str:
    """The name of the account of `token`, or of HF_TOKEN, or of the last login. Raises UserError without a token."""
    try:
        return _api(token).whoami()["name"]
    except errors.LocalTokenNotFoundError:
        raise UserError(
            "--push_to_hub: no token. Log in with `huggingface-cli login`, set HF_TOKEN, or give --hub_token."
        ) from None


def upload(
    repo_id: str, folder: Path, files: list[str], token: Optional[str], retried: Callable[[Callable], Any]
) -> str:
    """Uploads `files` of a folder in one commit, and returns its address. `retried(call)` repeats a failed call."""
    api = _api(token)
    retried(lambda: api.create_repo(repo_id, exist_ok=True))
    commit = retried(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Training with MindTune",
        )
    )
    return str(getattr(commit, "commit_url", commit))


def upload_command(repo_id: str, folder: Path, files: list[str]) -> list[str]:
    """The command that uploads the files again."""
    return ["huggingface-cli", "upload", repo_id, str(folder), ".", "--include", *files]


def download_command(repo_id: str, folder: str) -> list[str]:
    """The command that downloads a repository to a folder."""
    return ["huggingface-cli", "download", repo_id, "--local-dir", folder]
