"""The captions of a folder of images: from its metadata file, and from caption files next to the images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Optional

from mindtune.cli import UserError, indented_list, printable, short_list
from mindtune.data.file_names import FileNames, is_inside, normalize_name
from mindtune.data.folder_contents import CAPTION_SUFFIXES
from mindtune.data.image_sample import Sample
from mindtune.data.metadata import read_rows
from mindtune.data.text_files import SAVE_AS_UTF8, is_valid_text, read_caption

FILE_KEYS = ("file_name", "image", "filename")
CAPTION_KEYS = ("text", "caption", "prompt")


# ---- caption files -------------------------------------------------------------------------------


def match_caption_files(images: list[Path], files: list[Path]) -> dict[Path, list[Path]]:
    """The caption files of every image, the preferred one first. For a.png: a.txt, a.TXT, a.caption or a.png.txt.

    An image without a file of exactly its name gets those whose name is the same by `normalize_name`, unless they are
    another image's.
    """
    exact = {}
    by_normalized = {}
    for path in sorted(files, key=lambda path: (_suffix_rank(path), path.suffix != path.suffix.lower())):
        exact.setdefault((path.parent, path.stem), []).append(path)
        by_normalized.setdefault((path.parent, normalize_name(path.stem)), []).append(path)

    def find(image: Path, index: dict, form: Callable[[str], str]) -> list[Path]:
        found = [file for name in (image.stem, image.name) for file in index.get((image.parent, form(name)), [])]
        # The sort is stable, so a.txt stays before a.png.txt.
        return sorted(dict.fromkeys(found), key=_suffix_rank)

    matches = {image: find(image, exact, str) for image in images}
    taken = {file for own in matches.values() for file in own}
    for image, own in matches.items():
        if not own:
            matches[image] = [file for file in find(image, by_normalized, normalize_name) if file not in taken]
    return matches


def _suffix_rank(path: Path) -> int:
    return CAPTION_SUFFIXES.index(path.suffix.lower())


def assign_captions(
    root: Path,
    metadata: dict[str, Optional[str]],
    caption_files: dict[Path, list[Path]],
    table: Optional[Path],
    flag: str,
    say: Callable[[str], None],
) -> list[Sample]:
    """A sample of every image, with its caption from `metadata` or else from its first caption file.

    `metadata` maps paths relative to `root` to captions, `caption_files` is what `match_caption_files` returns,
    `table` the metadata file. Ambiguous captions are reported to `say`. Raises UserError that lists the caption files
    that cannot be read.
    """
    samples = []
    conflicting = []  # images whose caption files differ
    overruled = []  # caption files that differ from metadata
    unreadable = []
    images_of_file = {}
    for path, files in caption_files.items():
        name = os.path.relpath(path, root)
        caption = metadata.get(name)
        if caption is not None:
            if any(_differs(file, caption) for file in files):
                overruled.append(os.path.relpath(files[0], root))
        elif files:
            images_of_file.setdefault(files[0], []).append(name)
            try:
                caption = read_caption(files[0])
            except ValueError as error:
                unreadable.append(f"{printable(files[0])}: {error}")
            if any(_differs(file, caption) for file in files[1:]):
                conflicting.append(name)
        samples.append(Sample(printable(name), path, caption or None))
    if unreadable:
        raise UserError(
            f"{flag}: {len(unreadable)} caption files cannot be read; save them as UTF-8 ({SAVE_AS_UTF8}):\n"
            f"{indented_list(unreadable)}"
        )
    shared = [
        f"{os.path.relpath(file, root)} to {' and '.join(names)}"
        for file, names in images_of_file.items()
        if len(names) > 1
    ]
    where = f"{flag} {printable(root)}"
    if conflicting:
        rule = ".txt is preferred to .caption, a.txt to a.png.txt"
        say(f"{where}: {len(conflicting)} images have several captions ({short_list(conflicting)}); {rule}")
    if shared:
        say(f"{where}: {len(shared)} caption files belong to several images each: {short_list(shared)}")
    if overruled:
        files = f"{len(overruled)} caption files that differ from it"
        say(f"{where}: {table.name} is used instead of {files}: {short_list(overruled)}")
    return samples


def _differs(file: Path, caption: Optional[str]) -> bool:
    try:
        return read_caption(file) != (caption or "")
    except ValueError:
        return True


# ---- metadata ------------------------------------------------------------------------------------


def read_metadata_captions(path: Path, caption_column: Optional[str]) -> dict[str, Optional[str]]:
    """{path from the folder: caption} of the rows of a metadata file.

    Raises UserError that lists the lines that cannot be used, or else the files that are missing.
    """
    names = FileNames(path.parent)
    captions = {}
    lines = {}
    problems = []
    missing = []
    keys = None
    number = 0
    try:
        for number, row in read_rows(path):
            try:
                if isinstance(row, ValueError):
                    raise row
                keys = keys or (_find_key(row, FILE_KEYS), caption_column or _find_key(row, CAPTION_KEYS))
                name, caption = _read_row(row, keys)
                file = names.find(name)
                if file is None or not is_inside(file):
                    is_outside = file or not is_inside(names.relative_to_root(name))
                    reason = " is outside the directory" if is_outside else ""
                    missing.append(f"{printable(name)} (line {number}){reason}")
                    continue
                if file in captions and captions[file] != caption:
                    raise ValueError(f"another caption for {printable(file)} than line {lines[file]}'s")
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            captions[file] = caption
            lines[file] = number
    except UnicodeDecodeError:
        raise UserError(
            f"{printable(path)}: not UTF-8 after line {number}. Save the file as UTF-8 ({SAVE_AS_UTF8})."
        ) from None
    if problems:
        file_key, caption_key = keys or (FILE_KEYS[0], caption_column or CAPTION_KEYS[0])
        raise UserError(
            f'{printable(path)}: {len(problems)} lines cannot be used; each needs "{file_key}" and "{caption_key}":\n'
            f"{indented_list(problems)}\nFix them, or name the key of the captions with --caption_column."
        )
    if missing:
        raise UserError(
            f"{printable(path)}: names files that are not in this directory:\n{indented_list(missing)}\nFix the lines."
        )
    return captions


def _find_key(row: dict, usual: tuple[str, ...]) -> str:
    """The first of the `usual` names that the row has, in upper or lower case; the first of all if it has none."""
    by_lower = {key.lower(): key for key in reversed(row) if key not in usual}
    return next((by_lower.get(key, key) for key in usual if key in row or key in by_lower), usual[0])


def _read_row(row: dict, keys: tuple[str, str]) -> tuple[str, Optional[str]]:
    """(file name, caption). Raises ValueError for a missing key, a value that is not text, and for invalid text."""
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"lacks {', '.join(missing)}; has {printable(', '.join(row)) or 'no keys'}")
    file_key, caption_key = keys
    for key in keys:
        cell = row[key]
        if not isinstance(cell, str) and not (key == caption_key and cell is None):
            raise ValueError(f"{key} is {printable(repr(cell), 120)}, not text")
        if cell and not is_valid_text(cell):
            raise ValueError(f"{key} is {printable(repr(cell), 120)}, which is not valid text")
    return row[file_key], row[caption_key]
