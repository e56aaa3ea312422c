"""The files of a folder by kind: images, captions, tables and others, without those that operating systems create."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from mindtune.cli import UserError, printable
from mindtune.data.image_problems import HINTS_BY_SUFFIX, is_image, readable_suffixes

CAPTION_SUFFIXES = (".txt", ".caption")  # the first is preferred
TABLE_SUFFIXES = {".csv", ".json", ".jsonl", ".parquet", ".toml", ".tsv", ".xlsx", ".yaml", ".yml"}
# Files and folders that operating systems and tools create, in lower case. Names that start with ._ or ~$ count too.
SYSTEM_NAMES = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r",
    "@eadir", "@__thumb", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    ".appledouble", ".cache", ".fseventsd", ".git", ".ipynb_checkpoints", ".spotlight-v100", ".svn", ".thumbnails",
    ".trashes",
}  # fmt: skip


@dataclass
class FolderContents:
    """The files of a folder by kind, in name order.

    broken_links: links to files that do not exist.
    subfolders: the paths of the files below each subfolder, by its name; subfolders without files are left out.
    unreadable: paths of the folders that may not be read.
    """

    images: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    broken_links: list[Path] = field(default_factory=list)
    subfolders: dict[str, list[str]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def list_contents(root: Path, flag: str) -> FolderContents:
    """The contents of the directory `root`. Raises UserError naming `flag` if it is no directory or cannot be read."""
    where = f"{flag} {printable(root)}"
    try:
        paths = sorted(root.iterdir())
    except NotADirectoryError:
        raise UserError(f"{where}: is a file. Give the directory that holds the images.") from None
    except FileNotFoundError:
        raise UserError(f"{where}: no such directory. Give the directory that holds the images.") from None
    except PermissionError:
        raise UserError(
            f"{where}: no permission to read this directory. Change its permissions (chmod), or copy it."
        ) from None
    contents = FolderContents()
    readable = readable_suffixes()
    for path in paths:
        if os.path.isdir(path):
            files = _files_of_subfolder(path, contents.unreadable)
            if files:
                contents.subfolders[path.name] = files
        else:
            _add_file(contents, path, readable)
    return contents


def _files_of_subfolder(path: Path, unreadable: list[str]) -> list[str]:
    if is_system_file(path.name):
        return []
    files = walk_files(path, hidden=path.name.startswith("."), unreadable=unreadable)
    return [os.path.join(folder, name) for folder, name in files]


def _add_file(contents: FolderContents, path: Path, readable: set[str]) -> None:
    suffix = path.suffix.lower()
    hidden = path.name.startswith(".")
    if is_system_file(path.name) or (hidden and suffix not in readable):
        return
    if not os.path.exists(path):
        contents.broken_links.append(path)
    elif hidden or not os.path.isfile(path) or suffix in HINTS_BY_SUFFIX:
        contents.others.append(path)
    elif suffix in CAPTION_SUFFIXES:
        contents.captions.append(path)
    elif suffix in TABLE_SUFFIXES:
        contents.tables.append(path)
    elif suffix in readable or is_image(path):
        contents.images.append(path)
    else:
        contents.others.append(path)


def is_system_file(name: str) -> bool:
    """Whether the operating system or a tool created this file. It is ignored even if it is an image."""
    return name.lower() in SYSTEM_NAMES or name.startswith(("._", "~$"))


def is_hidden_or_system_file(name: str) -> bool:
    """Whether `is_system_file`, or the name starts with a dot."""
    return is_system_file(name) or name.startswith(".")


def walk_files(root: Path, hidden: bool = False, unreadable: Optional[list[str]] = None) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below `root`, in name order, without system files. Of hidden files only the images.

    `hidden`: everything below `root` counts as hidden. Links to folders are followed, but each folder is visited only
    once. Folders that may not be read are added to `unreadable`.
    """
    readable = readable_suffixes()
    visited = [os.path.realpath(root)]

    def is_new(folder: str) -> bool:
        if not os.path.islink(folder):
            return True
        target = os.path.realpath(folder)
        contains_root = os.path.commonpath((target, visited[0])) == target
        if contains_root or any(os.path.commonpath((target, place)) == place for place in visited):
            return False
        visited.append(target)
        return True

    def note_unreadable(error: OSError) -> None:
        if unreadable is not None:
            unreadable.append(error.filename)

    for folder, folders, files in os.walk(root, onerror=note_unreadable, followlinks=True):
        names = sorted(name for name in folders if not is_system_file(name))
        folders[:] = [name for name in names if is_new(os.path.join(folder, name))]
        folder_is_hidden = hidden or f"{os.sep}." in folder[len(str(root)) :]
        for name in sorted(name for name in files if not is_system_file(name)):
            skipped = folder_is_hidden or name.startswith(".") or name.endswith(".lock")
            if has_image_suffix(name, readable) or not skipped:
                yield folder, name


def has_image_suffix(name: str, readable: set[str]) -> bool:
    """Whether the suffix of a file name is among the `readable_suffixes`."""
    return os.path.splitext(name)[1].lower() in readable


def count_images(files: list[str]) -> int:
    """The number of files whose suffix is that of an image."""
    readable = readable_suffixes()
    return sum(has_image_suffix(file, readable) for file in files)
