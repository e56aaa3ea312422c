"""Checkpoints that are whole or absent: written beside their final name, synced, renamed, with a hash of every file."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, Optional, Union

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError
from mindtune.files import file_digest, make_readable, require_writable, sync

MANIFEST = "manifest.json"


def save_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], total_limit: Optional[int] = None
) -> Path:
    """Makes output_dir/checkpoint-<step>: `write(folder)` fills a hidden folder, which then gets its manifest and its name.

    Afterwards removes the oldest of our checkpoints above `total_limit`. Raises OSError with nothing left behind if the disk
    fills up; the checkpoints before stay as they are. A whole checkpoint of that step is the same run's and is left alone, so that a
    run which is resumed at its end puts nothing at risk.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    if (final / MANIFEST).is_file() and damage(final) is None:
        return final
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        files = {str(p.relative_to(partial)): file_digest(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        aside = Path(tempfile.mkdtemp(prefix=f"{final.name}.found-", dir=output_dir)) if final.exists() else None
        if aside:
            os.replace(final, aside)
        os.replace(partial, final)
        if aside and (aside / MANIFEST).is_file():  # our own, damaged; anything else is not ours to delete
            shutil.rmtree(aside)
        sync(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if total_limit:
        # Never the new one: after a resume from an older checkpoint its number may be below those of the run before.
        others = [folder for folder in checkpoints(output_dir) if folder != final]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            shutil.rmtree(old)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """Our checkpoint folders by rising step, verified or not. A folder without a manifest is not ours."""
    found = [
        p
        for p in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and (p / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The update a checkpoint was made after; also of one that was set aside."""
    return int(re.match(r"checkpoint-(\d+)", folder.name)[1])


def belongs_to(folder: Optional[Path], output_dir: Path) -> bool:
    """True if `folder` is a checkpoint inside `output_dir`: the run there is the one it goes on with."""
    return folder is not None and folder.resolve().parent == Path(output_dir).resolve()


def damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint, or None if every file is there with the hash it was written with."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, digest in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_digest(folder / name) != digest:
            return f"{name} is damaged"
    return None


def find_checkpoint(output_dir: Path, which: str) -> Optional[Path]:
    """What `--resume_from_checkpoint` names: `latest`, a name under the output directory, or a path.

    `latest` is the newest that verifies; damaged ones are named on the way back. None if `latest` finds no checkpoint at all.
    Raises UserError if the named one is absent or damaged, or if all are damaged.
    """
    if which != "latest":
        folder = next((p for p in (Path(output_dir) / which, Path(which)) if p.is_dir()), None)
        if folder is None:
            names = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
            raise UserError(f"--resume_from_checkpoint {which}: no such checkpoint. In {output_dir}: {names}.")
        if (problem := damage(folder)) is not None:
            raise UserError(f"--resume_from_checkpoint {which}: {problem}. Name another one, or say latest.")
        return folder
    candidates = checkpoints(output_dir)
    for folder in reversed(candidates):
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"{folder.name}: {problem}; falling back to the checkpoint before it")
    if candidates:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged. Start anew in another directory."
        )
    return None


def open_output_dir(
    name: str, resume: Optional[str], overwrite: bool, our_files: Iterable[str], final: str
) -> tuple[Path, Optional[Path]]:
    """(output directory, checkpoint to go on from or None), with what --resume_from_checkpoint and --overwrite_output_dir say.

    `our_files` are the names a run leaves there besides checkpoints, `final` the one that a finished run has. Writes nothing.
    Raises UserError for a directory that cannot be written to or that holds another run.
    """
    output_dir = Path(name)
    require_writable("--output_dir", name)
    found = [file for file in our_files if (output_dir / file).exists()] + [p.name for p in checkpoints(output_dir)]
    folder = None
    if resume:
        folder = find_checkpoint(output_dir, resume)
        if belongs_to(folder, output_dir):
            return output_dir, folder
        # A run that was stopped before its first checkpoint has no result yet: that one may start over.
        if folder is None and final not in found:
            print(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}; starting from the beginning")
            return output_dir, None
    if found and not overwrite:
        raise UserError(
            f"--output_dir {output_dir}: holds another run ({', '.join(found[:3])}). Go on with it by --resume_from_checkpoint latest, "
            "name another directory, or remove that run by --overwrite_output_dir."
        )
    return output_dir, folder


def remove_old_run(output_dir: Path, logging_dir: Path, our_files: Iterable[str]) -> None:
    """Only what a run makes, by its names; the cache stays, and so does a logging directory outside, maybe shared."""
    aside = [p for p in output_dir.glob("checkpoint-*.set-aside-*") if (p / MANIFEST).is_file()]
    for folder in (*checkpoints(output_dir), *aside, *output_dir.glob(".checkpoint-*.partial")):
        shutil.rmtree(folder)
    pictures = [*output_dir.glob("samples/step-*.png"), output_dir / "samples" / "final.png"]
    own_logs = logging_dir.glob("events.out.tfevents*") if output_dir.resolve() in logging_dir.resolve().parents else ()
    for path in (*(output_dir / file for file in our_files), *pictures, *own_logs):
        path.unlink(missing_ok=True)


def set_aside_later(output_dir: Path, folder: Path) -> list[Path]:
    """Renames our valid checkpoints after `folder` to <name>.set-aside, so that `latest` means the run that goes on from `folder`.

    Does nothing if `folder` is in another directory. Returns the new names.
    """
    if not belongs_to(folder, output_dir):
        return []
    aside = []
    for later in checkpoints(output_dir):
        if step_of(later) > step_of(folder) and damage(later) is None:
            aside.append(Path(tempfile.mkdtemp(prefix=f"{later.name}.set-aside-", dir=output_dir)))
            os.replace(later, aside[-1])
    return aside


def save_state(path: Path, parameters: dict[str, Union[ms.Parameter, np.ndarray]]) -> None:
    """Exact values of named parameters, or arrays, to a safetensors file."""
    values = {name: p.asnumpy() if isinstance(p, ms.Tensor) else p for name, p in parameters.items()}
    # Not ascontiguousarray, which makes a scalar an array of one.
    save_file({name: np.asarray(value, order="C") for name, value in values.items()}, path)
    make_readable(path)


def load_state(path: Path, parameters: dict[str, ms.Parameter], elsewhere: Iterable[str] = ()) -> None:
    """Sets every parameter to the value saved under its name; `elsewhere` are the names that other workers have.

    Raises UserError if names or shapes are not the same.
    """
    # Checkpoints of before --zero_stage numbered the optimizer's state: optimizer.0001.name.
    tensors = {re.sub(r"^optimizer\.\d{4}\.", "optimizer.", name): value for name, value in load_file(path).items()}
    for name in sorted(set(tensors) ^ {*parameters, *elsewhere}):
        where = "this run has no such state" if name in tensors else "the checkpoint has no such state"
        raise UserError(
            f"{path}: {name}: {where}. Resume with the flags (rank, targets, optimizer, ...) that the run was started with."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{path}: {name} has shape {tensors[name].shape}, this run needs {parameter.shape}. Use the run's own flags."
            )
        parameter.set_data(ms.Tensor(tensors[name], parameter.dtype))
