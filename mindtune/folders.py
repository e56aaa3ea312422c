"""A folder of images as people keep them: which of its files are samples, their captions, and what is left out, which is said."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from mindtune.cli import UserError, few, listing, shown
from mindtune.data import Sample
from mindtune.images import HINTS, is_image, readable_suffixes
from mindtune.metadata import SAVE_AS_UTF8, Names, caption_text, is_text, metadata_file, rows, same_name, stays

CAPTIONS = (".txt", ".caption")  # beside an image, the first wins
TABLES = {".csv", ".json", ".jsonl", ".parquet", ".toml", ".tsv", ".xlsx", ".yaml", ".yml"}
# What systems leave in folders on their own; names that begin with . or ~$ besides.
LITTER = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r", "@eadir", "@__thumb",
    "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
FILE_KEYS, CAPTION_KEYS = ("file_name", "image", "filename"), ("text", "caption", "prompt")


class Contents(NamedTuple):
    """The files of a folder by what they are, in name order, and its subfolders with the number of images in each."""

    images: list[Path]
    captions: list[Path]
    tables: list[Path]
    others: list[Path]
    broken: list[Path]
    subfolders: dict[str, int]
    unreadable: list[str]


def contents(root: Path, flag: str) -> Contents:
    """Raises UserError if there is no such directory, or none that may be read."""
    try:
        paths = sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{flag} {shown(root)}: no such directory. Give the directory that holds the images.") from None
    except PermissionError:
        raise UserError(f"{flag} {shown(root)}: this directory may not be read. Change its permissions (chmod), or copy it.") from None
    found, readable = Contents([], [], [], [], [], {}, []), readable_suffixes()
    for path in paths:
        suffix, hidden = path.suffix.lower(), path.name.startswith(".")
        if is_litter(path.name) and not (hidden and suffix in readable and not path.name.startswith("._")):
            continue
        if os.path.isdir(path):
            if number := count_images(path, readable, found.unreadable):
                found.subfolders[path.name] = number
        elif not os.path.exists(path):
            found.broken.append(path)
        elif hidden or not os.path.isfile(path) or suffix in HINTS:
            found.others.append(path)
        elif suffix in CAPTIONS or suffix in TABLES:
            (found.captions if suffix in CAPTIONS else found.tables).append(path)
        elif suffix in readable or is_image(path):
            found.images.append(path)
        else:
            found.others.append(path)
    return found


def is_litter(name: str) -> bool:
    return name.lower() in LITTER or name.startswith((".", "~$"))


def files_below(root: Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below `root`, in order of names, without what systems leave there."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        yield from ((folder, name) for name in sorted(files) if not is_litter(name) and not name.endswith(".lock"))


def count_images(folder: Path, readable: set[str], unreadable: list[str]) -> int:
    """How many files below `folder` are images by their names. Folders that may not be read go into `unreadable`."""
    number = 0
    for _, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(error.filename)):
        folders[:] = [name for name in folders if not is_litter(name)]
        number += sum(os.path.splitext(name)[1].lower() in readable and not is_litter(name) for name in files)
    return number


def holds_no_image(folder: Path, flag: str) -> bool:
    """Whether neither the folder nor its subfolders have an image, or the folder is not there. Raises UserError for a file."""
    if not folder.exists():
        return True
    found = contents(folder, flag)
    return not found.images and not found.subfolders


def samples_in_folder(folder: str, flag: str, caption_column: Optional[str] = None, say: Callable[[str], None] = print) -> list[Sample]:
    """The images directly in `folder`, in name order, then those that its metadata name in subfolders.

    A caption is the one of metadata.jsonl or metadata.csv, or else of a .txt or .caption file beside the image; an empty one is none.
    `flag` is what messages call the folder; `say` is given a line for everything that is left out. Raises UserError for a missing or
    empty folder, and for captions that cannot be read.
    """
    root = Path(folder)
    found, where = contents(root, flag), f"{flag} {shown(root)}"
    table = metadata_file(root)
    captions = metadata_captions(table, caption_column) if table else {}
    there = {path.name for path in found.images}
    named = [root / name for name in sorted(captions) if name not in there]
    paths = found.images + named
    found = found._replace(others=[path for path in found.others if path not in named])
    notes = left_out(found if paths else found._replace(subfolders={}), table, where, named)
    if not paths:
        inner = [f"{name} with {number} images" for name, number in sorted(found.subfolders.items())]
        hint = f"It has subdirectories ({few(inner)}): give one of them." if inner else "Put 5 to 20 images there."
        raise UserError("\n".join([f"{where}: no image in this directory. {hint}", *notes]))
    for note in notes:
        say(note)
    return captioned(root, paths, captions, found.captions, table, flag, say)


def captioned(
    root: Path, paths: list[Path], captions: dict, files: list[Path], table: Optional[Path], flag: str, say: Callable[[str], None]
) -> list[Sample]:
    """The samples of `paths`: captions of metadata by name from `root`, or of caption `files`. Says which of several captions it takes."""
    beside, where = Beside(files), f"{flag} {shown(root)}"
    samples, differ, overruled, bad = [], [], [], []
    for path in paths:
        name = os.path.relpath(path, root)
        own, caption = beside.files(path), captions.get(name)
        if caption is None and own:
            try:
                caption = caption_text(own[0])
            except ValueError as error:
                bad.append(f"{shown(own[0])}: {error}")
            if any(says_otherwise(file, caption) for file in own[1:]):
                differ.append(name)
        elif any(says_otherwise(file, caption) for file in own):
            overruled.append(own[0].name)
        samples.append(Sample(shown(name), path, caption or None))
    if bad:
        raise UserError(f"{flag}: {len(bad)} caption files cannot be read; save them as UTF-8 ({SAVE_AS_UTF8}):\n{listing(bad)}")
    if differ:
        say(f"{where}: {len(differ)} images have several captions ({few(differ)}); .txt is used before .caption, a.txt before a.png.txt")
    if overruled:
        say(f"{where}: {table.name} is used, not the captions of {len(overruled)} files that say otherwise: {few(overruled)}")
    if orphans := [path.name for path in files if path not in beside.taken]:
        say(f"{where}: {len(orphans)} caption files without an image are not used: {few(orphans)}")
    bare = [sample.name for sample in samples if not sample.caption]
    if 0 < len(bare) < len(samples):
        say(f"{where}: {len(samples) - len(bare)} of {len(samples)} images have a caption of their own; without: {few(bare)}")
    return samples


def says_otherwise(file: Path, caption: Optional[str]) -> bool:
    try:
        return caption_text(file) != (caption or "")
    except ValueError:
        return True


def left_out(found: Contents, table: Optional[Path], where: str, named: Iterable[Path]) -> list[str]:
    """A line for every kind of thing in a folder that is no sample."""
    lines = []
    if found.broken:
        lines.append(f"{where}: {len(found.broken)} links lead nowhere and are not used: {few(path.name for path in found.broken)}")
    kinds = {}
    for path in found.others:
        hint = "hidden files: rename them to use them" if path.name.startswith(".") else HINTS.get(path.suffix.lower(), "")
        kinds.setdefault(hint, []).append(path.name)
    for hint, names in kinds.items():
        lines.append(f"{where}: {len(names)} files are not used: {few(names)}{f' ({hint})' if hint else ', no images'}")
    if tables := [path.name for path in found.tables if path != table]:
        used = table.name if table else "metadata.jsonl, metadata.csv, .txt and .caption"
        lines.append(f"{where}: {len(tables)} files are not used: {few(tables)}; captions are read from {used}")
    taken = {}
    for path in named:
        first = os.path.relpath(path, table.parent).split(os.sep)[0]
        taken[first] = taken.get(first, 0) + 1
    unused = {name: number - taken.get(name, 0) for name, number in found.subfolders.items()}
    if unused := [f"{shown(name)}/ with {number} images" for name, number in sorted(unused.items()) if number > 0]:
        lines.append(f"{where}: subfolders are not used: {few(unused)}. Move the images up, or name them in metadata.jsonl (sub/a.png).")
    if found.unreadable:
        lines.append(f"{where}: {len(found.unreadable)} subfolders may not be read: {few(found.unreadable)}")
    return lines


class Beside:
    """The caption files of a folder, looked up by image: a.txt, a.TXT, a.caption or a.png.txt for a.png."""

    def __init__(self, captions: list[Path]) -> None:
        self.exact, self.alike, self.taken = {}, {}, set()
        for path in sorted(captions, key=lambda path: (CAPTIONS.index(path.suffix.lower()), path.suffix != path.suffix.lower())):
            self.exact.setdefault(path.stem, []).append(path)
            self.alike.setdefault(same_name(path.stem), []).append(path)

    def files(self, image: Path) -> list[Path]:
        """Those of `image`, the one to use first."""
        for index, form in ((self.exact, str), (self.alike, same_name)):
            both = (index.get(form(image.stem), []), index.get(form(image.name), []))
            if files := [file for file in (*both[0], *both[1]) if file.parent == image.parent]:
                break
        files.sort(key=lambda file: CAPTIONS.index(file.suffix.lower()))  # stable: a.txt stays before a.png.txt
        self.taken.update(files)
        return files


def metadata_captions(path: Path, caption_column: Optional[str]) -> dict[str, Optional[str]]:
    """{file name from the folder: caption} of the rows of metadata. Raises UserError for all bad lines, or else for all missing files."""
    names, captions, lines, bad, missing, keys, number = Names(path.parent), {}, {}, [], [], None, 0
    try:
        for number, row in rows(path):
            if isinstance(row, ValueError):
                bad.append(f"line {number}: {row}")
                continue
            keys = keys or (_key(row, FILE_KEYS), caption_column or _key(row, CAPTION_KEYS))
            try:
                name, caption = _row(row, keys)
            except ValueError as error:
                bad.append(f"line {number}: {error}")
                continue
            found = names.find(name)
            if found is None or not stays(found):
                missing.append(f"{shown(name)} (line {number})" + (" leads out of the directory" if found or not stays(name) else ""))
            elif found in captions and captions[found] != caption:
                bad.append(f"line {number}: another caption for {shown(found)} than line {lines[found]}'s")
            else:
                captions[found], lines[found] = caption, number
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)}: not UTF-8 after line {number}. Save the file as UTF-8 ({SAVE_AS_UTF8}).") from None
    if bad:
        keys = keys or (FILE_KEYS[0], caption_column or CAPTION_KEYS[0])
        raise UserError(
            f'{shown(path)}: {len(bad)} lines cannot be used; each needs "{keys[0]}" and "{keys[1]}":\n{listing(bad)}\n'
            "Mend them, or name the captions' key with --caption_column."
        )
    if missing:
        raise UserError(f"{shown(path)}: names files that are not in this directory:\n{listing(missing)}\nMend the lines.")
    return captions


def _key(row: dict, usual: tuple[str, ...]) -> str:
    return next((key for key in usual if key in row), usual[0])


def _row(row: dict, keys: tuple[str, str]) -> tuple[str, Optional[str]]:
    """(file name, caption). Raises ValueError for a lacking key, another type, or half a character."""
    if lacking := [key for key in keys if key not in row]:
        raise ValueError(f"lacks {', '.join(lacking)}; has {shown(', '.join(row)) or 'no keys'}")
    name, caption = (row[key] for key in keys)
    for key, cell in zip(keys, (name, caption)):
        if not isinstance(cell, str) and not (key == keys[1] and cell is None):
            raise ValueError(f"{key} is {shown(repr(cell), 120)}, not text")
        if cell and not is_text(cell):
            raise ValueError(f"{key} is {shown(repr(cell), 120)}, which is no text")
    return name, caption
