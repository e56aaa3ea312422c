"""A folder of images as samples: which files are used, with which captions, and notes on what is not used."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Callable, Optional

from mindtune.cli import UserError, printable, short_list
from mindtune.data.folder_captions import assign_captions, match_caption_files, read_metadata_captions
from mindtune.data.folder_contents import (
    CAPTION_SUFFIXES,
    FolderContents,
    count_images,
    has_image_suffix,
    list_contents,
)
from mindtune.data.image_problems import HINTS_BY_SUFFIX, readable_suffixes
from mindtune.data.image_sample import Sample
from mindtune.data.masks import is_mask_file, match_mask_files
from mindtune.data.metadata import metadata_file


def holds_no_image(folder: Path, flag: str) -> bool:
    """Whether the folder is missing, or has no image, also not in subfolders. Raises UserError if it is a file."""
    if not folder.exists():
        return True
    contents = list_contents(folder, flag)
    return not contents.images and not any(
        count_images(files) for name, files in contents.subfolders.items() if not name.startswith(".")
    )


def samples_in_folder(
    folder: str, flag: str, caption_column: Optional[str] = None, say: Callable[[str], None] = print
) -> list[Sample]:
    """The images directly in `folder`, in name order, followed by those in subfolders that its metadata name.

    Captions are those of metadata.jsonl or metadata.csv, or else of a .txt or .caption file next to the image; an
    empty caption counts as none. A file like photo.mask.png next to photo.jpg is the mask of that image. Messages name
    `flag`; `say` receives a line for everything that is not used. Raises UserError if the folder is missing or has no
    image, and for captions that cannot be read.
    """
    root = Path(folder)
    contents = list_contents(root, flag)
    where = f"{flag} {printable(root)}"
    table = metadata_file(root)
    metadata = read_metadata_captions(table, caption_column) if table else {}
    direct = {path.name for path in contents.images}
    named = [root / name for name in sorted(metadata) if name not in direct]
    images = [path for path in contents.images + named if not is_mask_file(path)]
    mask_files = [path for path in contents.images if is_mask_file(path)] + _masks_in_subfolders(contents, named)
    masks = match_mask_files(images, mask_files)
    caption_files = match_caption_files(images, contents.captions + _captions_in_subfolders(root, contents, named))
    used = {*map(str, named), *map(str, mask_files)}
    used.update(str(file) for files in caption_files.values() for file in files)
    if not images:
        raise _no_image(contents, table, where, used)
    for note in _notes_on_unused(contents, table, where, used):
        say(note)
    if table and not metadata:
        say(f"{where}: {table.name} has no rows")
    samples = assign_captions(root, metadata, caption_files, table, flag, say)
    for sample in samples:
        if mask := masks.get(sample.source):
            sample.mask = Sample(str(mask.relative_to(root)), mask)
    if unmatched := [path.name for path in mask_files if path not in masks.values()]:
        say(f"{where}: {len(unmatched)} masks without an image of their own are not used: {short_list(unmatched)}")
    if orphans := [path.name for path in contents.captions if str(path) not in used]:
        say(f"{where}: {len(orphans)} caption files without an image are not used: {short_list(orphans)}")
    without = [sample.name for sample in samples if not sample.caption]
    if 0 < len(without) < len(samples):
        with_caption = f"{len(samples) - len(without)} of {len(samples)} images have a caption of their own"
        say(f"{where}: {with_caption}; without: {short_list(without)}")
    return samples


def _captions_in_subfolders(root: Path, contents: FolderContents, named: list[Path]) -> list[Path]:
    """The caption files in those subfolders that hold images named by metadata."""
    folders = {str(path.parent) for path in named} - {str(root)}
    files = [Path(file) for paths in contents.subfolders.values() for file in paths if os.path.dirname(file) in folders]
    return [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES]


def _masks_in_subfolders(contents: FolderContents, named: list[Path]) -> list[Path]:
    """The masks in those subfolders that hold images named by metadata."""
    folders = {str(path.parent) for path in named}
    readable = readable_suffixes()
    files = (Path(file) for paths in contents.subfolders.values() for file in paths if has_image_suffix(file, readable))
    return [path for path in files if str(path.parent) in folders and is_mask_file(path)]


def _no_image(contents: FolderContents, table: Optional[Path], where: str, used: set[str]) -> UserError:
    """The error for a folder without images, with notes on what it holds instead."""
    counts = {name: count_images(files) for name, files in sorted(contents.subfolders.items())}
    with_images = [f"{name} with {count} images" for name, count in counts.items() if count]
    without_images = {name: files for name, files in contents.subfolders.items() if not counts[name]}
    if with_images:
        hint = f"It has subdirectories ({short_list(with_images)}): give one of them."
    else:
        hint = "Put 5 to 20 images there."
    notes = _notes_on_unused(replace(contents, subfolders=without_images), table, where, used)
    return UserError("\n".join([f"{where}: no image in this directory. {hint}", *notes]))


def _notes_on_unused(contents: FolderContents, table: Optional[Path], where: str, used: set[str]) -> list[str]:
    """A line for every kind of file in the folder that is neither a sample nor among the paths in `used`."""
    notes = []
    if links := [path.name for path in contents.broken_links]:
        notes.append(f"{where}: {len(links)} broken links are not used: {short_list(links)}")
    names_by_hint = {}
    for path in contents.others:
        if str(path) not in used:
            is_hidden = path.name.startswith(".")
            hint = (
                "hidden files: rename them to use them" if is_hidden else HINTS_BY_SUFFIX.get(path.suffix.lower(), "")
            )
            names_by_hint.setdefault(hint, []).append(path.name)
    for hint, names in names_by_hint.items():
        reason = f" ({hint})" if hint else ", no images"
        notes.append(f"{where}: {len(names)} files are not used: {short_list(names)}{reason}")
    if tables := [path.name for path in contents.tables if path != table]:
        source = table.name if table else "metadata.jsonl, metadata.csv, .txt and .caption"
        notes.append(
            f"{where}: {len(tables)} files are not used: {short_list(tables)}; captions are read from {source}"
        )
    if unused := _unused_in_subfolders(contents, used):
        hint = "Move the images up, or name them in metadata.jsonl (sub/a.png)."
        notes.append(f"{where}: subfolders are not used: {short_list(unused)}. {hint}")
    if contents.unreadable:
        count = len(contents.unreadable)
        notes.append(f"{where}: {count} subfolders cannot be read and are not used: {short_list(contents.unreadable)}")
    return notes


def _unused_in_subfolders(contents: FolderContents, used: set[str]) -> list[str]:
    """One description for every subfolder with unused files, like "sub/ with 3 images and 2 other files"."""
    descriptions = []
    for name, files in sorted(contents.subfolders.items()):
        unused = [file for file in files if file not in used]
        images = count_images(unused)
        counts = ((images, "images"), (len(unused) - images, "other files"))
        parts = [f"{count} {what}" for count, what in counts if count]
        if parts:
            descriptions.append(f"{printable(name)}/ with {' and '.join(parts)}")
    return descriptions
