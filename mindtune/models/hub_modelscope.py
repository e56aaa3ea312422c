"""ModelScope, with the modelscope library, which is optional. `hubs` chooses between it and the Hugging Face hub.

The library's own login is not used: it writes the token to a file.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import requests

from mindtune.cli import UserError

TITLE = "ModelScope"
TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"
LIBRARY = "modelscope==1.37.1"
BRANCH = "master"
UNREACHABLE = (requests.ConnectionError, requests.Timeout, requests.exceptions.RetryError)


def _api(**settings: Any) -> Any:
    """The library's interface. Raises UserError without the library."""
    try:
        from modelscope.hub.api import HubApi
    except ImportError:
        raise UserError(f"--hub modelscope: the modelscope library is missing. pip install {LIBRARY}") from None
    return HubApi(**settings)


# ---- downloads -----------------------------------------------------------------------------------


def list_files(name: str, revision: Optional[str]) -> list[str]:
    """The names of all files of a model's repository."""
    api = _api()
    endpoint = api.get_endpoint_for_read(repo_id=name, repo_type="model")
    files = api.get_model_files(name, revision=revision or BRANCH, recursive=True, endpoint=endpoint)
    return [file["Path"] for file in files if file["Type"] != "tree"]


def download(name: str, revision: Optional[str], cache_dir: Optional[str], patterns: list[str]) -> Path:
    """The directory with the files that match one of the `patterns`. Without a network, those in the cache."""
    _api()
    from modelscope.hub.snapshot_download import snapshot_download

    request = {"revision": revision or BRANCH, "cache_dir": cache_dir, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(name, **request))
    except UNREACHABLE as error:
        try:
            folder = snapshot_download(name, **request, local_files_only=True)
        except ValueError:  # nothing in the cache
            raise error from None
        print(f"{name}: ModelScope cannot be reached; the files in {folder} are used, of whatever revision they are")
        return Path(folder)
    except requests.HTTPError as error:
        for each in error.args:
            if isinstance(each, requests.Response):  # which the library puts in the place of a text
                raise requests.HTTPError(f"{each.status_code} {each.reason}", response=each) from None
        raise


def advice(error: Exception, name: str) -> str:
    """What to do about an error of a download; empty if its own text says it."""
    kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    if status == 404:
        return "Check the id; a private model needs `modelscope login --token TOKEN` or MODELSCOPE_API_TOKEN."
    if status in (401, 403) or "access authorization" in str(error):
        return (
            f"Apply for access on {_api().endpoint}/models/{name}, and log in with `modelscope login --token TOKEN` or "
            "set MODELSCOPE_API_TOKEN."
        )
    if kind == "NotExistError":
        return f"Give a branch or a tag as --revision, not a commit. The default is {BRANCH}."
    if kind == "FileDownloadError":
        return "The lines above say why. The same command continues the download; after 403 Forbidden, log in first."
    if isinstance(error, UNREACHABLE):
        return "Check the network and the id, or download it elsewhere and give the directory."
    return ""


# ---- uploads -------------------------------------------------------------------------------------


def account(token: Optional[str]) -> str:
    """The name of the account of `token`, or of MODELSCOPE_API_TOKEN, or of the last login.

    Raises UserError without a token, and ValueError if it is refused.
    """
    api = _api(token=token, max_retries=0)  # `hubs` repeats the call
    token = token or os.environ.get(TOKEN_VARIABLE)
    if token:
        response = api.session.post(f"{api.endpoint}/api/v1/login", json={"AccessToken": token})
        if response.status_code >= 500:
            response.raise_for_status()
        content = response.json()
        if not content.get("Success"):
            raise ValueError(content.get("Message"))
        return content["Data"]["Username"]
    from modelscope.hub.api import ModelScopeConfig

    name = ModelScopeConfig.get_user_info()[0]
    if not name or not ModelScopeConfig.get_cookies():
        raise UserError(
            "--push_to_hub: no token. Log in with `modelscope login --token TOKEN`, set MODELSCOPE_API_TOKEN, or give "
            "--hub_token. Tokens: https://modelscope.cn/my/myaccesstoken."
        )
    return name


def upload(
    repo_id: str, folder: Path, files: list[str], token: Optional[str], retried: Callable[[Callable], Any]
) -> str:
    """Uploads `files` of a folder, and returns the repository's address. `retried(call)` repeats a failed call.

    One commit per file: the library's upload of folders reports success when its commit is refused.
    """
    api = _api(token=token, max_retries=0)
    retried(lambda: api.create_repo(repo_id, exist_ok=True, create_default_config=False))
    for file in files:
        place = {"repo_id": repo_id, "path_in_repo": file, "path_or_fileobj": str(folder / file)}
        retried(partial(api.upload_file, **place, commit_message=f"Training with MindTune: {file}"))
    return f"{api.endpoint}/models/{repo_id}"


def upload_command(repo_id: str, folder: Path, files: list[str]) -> list[str]:
    """The command that uploads the files again."""
    return ["modelscope", "upload", repo_id, str(folder), "--include", *files]


def download_command(repo_id: str, folder: str) -> list[str]:
    """The command that downloads a repository to a folder."""
    return ["modelscope", "download", "--model", repo_id, "--local_dir", folder]
