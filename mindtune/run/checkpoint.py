"""Checkpoints that are complete or absent: written under a temporary name, synced, renamed, with hashes of files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np
from safetensors.numpy import load_file, save_file

from mindtune.cli import UserError, size_text
from mindtune.files import file_digest, free_bytes, make_readable, require_writable, sync
from mindtune.run.report_images import ROWS_FILE

MANIFEST = "manifest.json"


def save_checkpoint(
    output_dir: Path, step: int, write: Callable[[Path], None], total_limit: Optional[int] = None
) -> Path:
    """Writes output_dir/checkpoint-<step> and returns it: `write(folder)` fills a hidden folder, which is then renamed.

    Removes the oldest checkpoints above `total_limit` afterwards. If the disk is full, raises OSError, leaves nothing
    behind, and keeps the older checkpoints. An undamaged checkpoint of that step belongs to the same run and is kept
    as it is, so that resuming a finished run cannot lose it.
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
        existing = Path(tempfile.mkdtemp(prefix=f"{final.name}.found-", dir=output_dir)) if final.exists() else None
        if existing:
            os.replace(final, existing)
        os.replace(partial, final)
        if (
            existing and (existing / MANIFEST).is_file()
        ):  # a damaged checkpoint; other programs' folders are not deleted
            shutil.rmtree(existing)
        sync(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if total_limit:
        # Never the new one: after resuming from an older checkpoint its step may be lower than those of existing
        # checkpoints.
        others = [folder for folder in checkpoints(output_dir) if folder != final]
        for old in others[: max(0, len(others) + 1 - total_limit)]:
            shutil.rmtree(old)
    return final


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir` by step, damaged ones included. A folder without a manifest is none."""
    named = [folder for folder in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted((folder for folder in named if (folder / MANIFEST).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """The number of updates before a checkpoint, also of one that was set aside."""
    return int(re.match(r"checkpoint-(\d+)", folder.name)[1])


def belongs_to(folder: Optional[Path], output_dir: Path) -> bool:
    """True if `folder` is a checkpoint in `output_dir`, so that resuming from it continues the run there."""
    return folder is not None and folder.resolve().parent == Path(output_dir).resolve()


def damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint, or None if every file exists with the hash that the manifest records."""
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
    """The checkpoint that `--resume_from_checkpoint` names: latest, a name in the output directory, or a path.

    latest is the newest undamaged one; newer, damaged ones are reported. Returns None if it finds no checkpoint at all.
    Raises UserError if the named checkpoint is absent or damaged, or if latest finds only damaged ones.
    """
    if which != "latest":
        folder = next((path for path in (Path(output_dir) / which, Path(which)) if path.is_dir()), None)
        if folder is None:
            names = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
            raise UserError(f"--resume_from_checkpoint {which}: no such checkpoint. In {output_dir}: {names}.")
        if (problem := damage(folder)) is not None:
            raise UserError(f"--resume_from_checkpoint {which}: {problem}. Name another checkpoint, or latest.")
        return folder
    candidates = checkpoints(output_dir)
    for folder in reversed(candidates):
        problem = damage(folder)
        if problem is None:
            return folder
        print(f"{folder.name}: {problem}; falling back to the checkpoint before it")
    if candidates:
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged. Start a new run in "
            "another directory."
        )
    return None


def open_output_dir(
    name: str, resume: Optional[str], overwrite: bool, our_files: Iterable[str], final: str
) -> tuple[Path, Optional[Path]]:
    """The output directory and the checkpoint to resume from or None. Writes nothing.

    `resume` and `overwrite` are the values of --resume_from_checkpoint and --overwrite_output_dir. `our_files` are the
    names of the files that a run writes besides checkpoints, `final` is the one that only a finished run has. Raises
    UserError if the directory is not writable or holds another run.
    """
    output_dir = Path(name)
    require_writable("--output_dir", name)
    found = [file for file in our_files if (output_dir / file).exists()]
    found += [folder.name for folder in checkpoints(output_dir)]
    folder = None
    if resume:
        folder = find_checkpoint(output_dir, resume)
        if belongs_to(folder, output_dir):
            return output_dir, folder
        # A run that was stopped before its first checkpoint may start over: it has no result yet.
        if folder is None and final not in found:
            print(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}; starting from the beginning")
            return output_dir, None
    if found and not overwrite:
        raise UserError(
            f"--output_dir {output_dir}: holds another run ({', '.join(found[:3])}). Continue it with "
            "--resume_from_checkpoint latest, name another directory, or remove that run with --overwrite_output_dir."
        )
    return output_dir, folder


def remove_old_run(output_dir: Path, logging_dir: Path, our_files: Iterable[str]) -> None:
    """Deletes the files that a run writes, by their names.

    The cache is kept, and so is a logging directory outside `output_dir`, which other runs may use.
    """
    aside = [folder for folder in output_dir.glob("checkpoint-*.set-aside-*") if (folder / MANIFEST).is_file()]
    for folder in (*checkpoints(output_dir), *aside, *output_dir.glob(".checkpoint-*.partial")):
        shutil.rmtree(folder)
    files = [output_dir / file for file in our_files]
    files += [*output_dir.glob("samples/step-*.png"), *output_dir.glob("samples/final-[1-9].png")]
    files.append(output_dir / "samples" / "final.png")
    samples = [*output_dir.glob("samples/step-*"), output_dir / "samples" / "final"]
    files += [path for folder in samples for name in ("row-[0-9]*.png", ROWS_FILE) for path in folder.glob(name)]
    if output_dir.resolve() in logging_dir.resolve().parents:
        files += logging_dir.glob("events.out.tfevents*")
    for path in files:
        path.unlink(missing_ok=True)
    for folder in samples:
        with contextlib.suppress(OSError):  # absent, or holds other files
            folder.rmdir()


def set_aside_later(output_dir: Path, folder: Path) -> list[Path]:
    """Renames undamaged checkpoints later than `folder` to <name>.set-aside-<random>, and returns the new paths.

    Without this, latest would name the abandoned continuation of the run after resuming from an older checkpoint. Does
    nothing if `folder` is in another directory.
    """
    if not belongs_to(folder, output_dir):
        return []
    aside = []
    for later in checkpoints(output_dir):
        if step_of(later) > step_of(folder) and damage(later) is None:
            aside.append(Path(tempfile.mkdtemp(prefix=f"{later.name}.set-aside-", dir=output_dir)))
            os.replace(later, aside[-1])
    return aside


def count_more(updates: int, every: int, limit: Optional[int], existing: int = 0) -> int:
    """How many checkpoints `updates` updates add at most: one is written before the oldest above `limit` is removed."""
    count = -(-updates // every)
    return max(0, min(count + existing, limit + 1) - existing) if limit else count


def require_space(output_dir: Path, size: int, updates: int, every: int, limit: Optional[int]) -> None:
    """Raises UserError if the checkpoints of a run that has `updates` left do not fit on the disk of `output_dir`.

    Each has `size` bytes. There is one after every `every` updates and one at the end; the newest `limit` are kept.
    """
    count = count_more(updates, every, limit, len(checkpoints(output_dir)))
    needed, free = count * size, free_bytes(output_dir)
    if needed > free:
        raise UserError(
            f"--output_dir {output_dir}: {count} more checkpoints need {size_text(needed)}; {size_text(free)} is free. "
            "Free some space, or set --checkpoints_total_limit or a higher --checkpointing_steps."
        )


def trainer_state(folder: Optional[Path], defaults: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run; empty without one.

    A flag that it lacks, because it is of an older version, had its value in `defaults`.
    """
    return {**defaults, **json.loads((folder / "trainer_state.json").read_text())} if folder else {}


def save_state(path: Path, parameters: dict[str, Union[ms.Parameter, np.ndarray]]) -> None:
    """Writes the exact values of named parameters or arrays to a safetensors file."""
    values = {name: p.asnumpy() if isinstance(p, ms.Tensor) else p for name, p in parameters.items()}
    # Not ascontiguousarray, which turns a scalar into an array of one element.
    save_file({name: np.asarray(value, order="C") for name, value in values.items()}, path)
    make_readable(path)


def load_state(path: Path, parameters: dict[str, ms.Parameter], elsewhere: Iterable[str] = ()) -> None:
    """Sets every parameter to the value saved under its name. `elsewhere` are the names of parameters on other ranks.

    Raises UserError if names or shapes differ.
    """
    # Version 0.1.0 numbered the optimizer's state: optimizer.0001.name.
    tensors = {re.sub(r"^optimizer\.\d{4}\.", "optimizer.", name): value for name, value in load_file(path).items()}
    for name in sorted(set(tensors) ^ {*parameters, *elsewhere}):
        missing = "this run has no such state" if name in tensors else "the checkpoint has no such state"
        raise UserError(
            f"{path}: {name}: {missing}. Resume with the flags (rank, targets, optimizer, ...) that the run was "
            "started with."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{path}: {name} has shape {tensors[name].shape}, this run needs {parameter.shape}. Resume with "
                "the flags that the run was started with."
            )
        parameter.set_data(ms.Tensor(tensors[name], parameter.dtype))
