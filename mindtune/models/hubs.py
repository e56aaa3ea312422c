"""The hubs that models come from and results go to. What differs between them is in one module each."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Optional

from mindtune.cli import UserError
from mindtune.models import hub_huggingface, hub_modelscope

HUBS = {"huggingface": hub_huggingface, "modelscope": hub_modelscope}
DEFAULT = "huggingface"
PAUSES = (1.0, 4.0, 16.0)  # seconds between attempts, in which the hub or the network may recover


def default() -> str:
    """The default of --hub: MINDTUNE_HUB, or huggingface. Raises UserError if MINDTUNE_HUB is neither hub."""
    hub = os.environ.get("MINDTUNE_HUB") or DEFAULT
    if hub not in HUBS:
        raise UserError(f"MINDTUNE_HUB={hub}: no such hub. There are {' and '.join(HUBS)}.")
    return hub


def list_files(flag: str, name: str, revision: Optional[str], hub: str) -> Optional[list[str]]:
    """The names of all files of a repository; None if the hub does not answer. Raises UserError if `name` is no id."""
    _require_id(flag, name)
    try:
        return HUBS[hub].list_files(name, revision)
    except UserError:
        raise
    except Exception:  # without a network the hub's cache on disk may be enough; the download reports the error
        return None


def download(
    flag: str, name: str, revision: Optional[str], cache_dir: Optional[str], patterns: list[str], hub: str
) -> Path:
    """The directory with the files of a repository that match one of the `patterns`. Raises UserError."""
    _require_id(flag, name)
    side = HUBS[hub]
    try:
        return side.download(name, revision, cache_dir, patterns)
    except UserError:
        raise
    except Exception as error:  # no network, no such repository, gated, wrong revision: the hub's text says which
        said = f"{side.TITLE} says: {error_text(error, None).rstrip('.!')}"
        raise UserError(f"{flag} {name}: no such directory, and {said}. {side.advice(error, name)}".rstrip()) from None


def _require_id(flag: str, name: str) -> None:
    if Path(name).is_file():
        found = "quantised weights in GGUF" if name.endswith(".gguf") else "a single file"
        raise UserError(
            f"{flag} {name}: {found}. Give the directory of the model in the Hugging Face layout (model_index.json or "
            "config.json, and .safetensors files in bf16, fp16 or fp32), or its hub id."
        )
    if not is_id(name):
        raise UserError(f"{flag} {name}: no such directory. Give a local directory or a hub id.")


def is_id(name: str) -> bool:
    """Whether `name` may be the id of a repository and not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def with_retries(call: Callable[[], Any]) -> Any:
    """`call()`, repeated after a pause if the hub fails (status 500 and above) or the connection breaks."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            if pause is None or not _is_temporary(error):
                raise
            print(f"the hub: {type(error).__name__}; trying again in {pause:g} seconds", flush=True)
            time.sleep(pause)


def _is_temporary(error: Exception) -> bool:
    """Whether an error may pass. `requests` raises an OSError for a broken connection."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if found := re.match(r"HTTP (\d+) error", str(error)):  # a commit on ModelScope has its status only in the text
        status = int(found[1])
    return status >= 500 if status else isinstance(error, OSError)


def error_text(error: Exception, token: Optional[str]) -> str:
    """The message of an error on one line, without tokens."""
    text = " ".join(str(error).split())
    for secret in (token, *(os.environ.get(side.TOKEN_VARIABLE) for side in HUBS.values())):
        text = text.replace(secret, "(token)") if secret else text
    return text
