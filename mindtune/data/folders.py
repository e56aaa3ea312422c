"""A folder of images as people keep them: which of its files are samples, their captions, and what is left out, which is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from mindtune.cli import UserError, few, listing, shown
from mindtune.data.image_problems import HINTS, is_image, readable_suffixes
from mindtune.data.image_sample import Sample
from mindtune.data.metadata import SAVE_AS_UTF8, Names, caption_text, is_text, metadata_file, rows, same_name, stays

CAPTIONS = (".txt", ".caption")  # beside an image, the first wins
TABLES = {".csv", ".json", ".jsonl", ".parquet", ".toml", ".tsv", ".xlsx", ".yaml", ".yml"}
# What systems leave in folders on their own; names that begin with . or ~$ besides.
LITTER = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "zbthumbnail.info", "icon\r", "@eadir", "@__thumb",
    "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found", ".appledouble", ".cache", ".fseventsd", ".git",
    ".ipynb_checkpoints", ".spotlight-v100", ".svn", ".thumbnails", ".trashes",
}  # fmt: skip
FILE_KEYS, CAPTION_KEYS = ("file_name", "image", "filename"), ("text", "caption", "prompt")


class Contents(NamedTuple):
    """The files of a folder by what they are, in name order, and its subfolders that hold files, with the paths of those."""

    images: list[Path]
    captions: list[Path]
    tables: list[Path]
    others: list[Path]
    broken: list[Path]
    subfolders: dict[str, list[str]]
    unreadable: list[str]


def contents(root: Path, flag: str) -> Contents:
    """Raises UserError if there is no such directory, or none that may be read."""
    try:
        paths = sorted(root.iterdir())
    except NotADirectoryError:
        raise UserError(f"{flag} {shown(root)}: is a file. Give the directory that holds the images.") from None
    except FileNotFoundError:
        raise UserError(f"{flag} {shown(root)}: no such directory. Give the directory that holds the images.") from None
    except PermissionError:
        raise UserError(
            f"{flag} {shown(root)}: this directory may not be read. Change its permissions (chmod), or copy it."
        ) from None
    found, readable = Contents([], [], [], [], [], {}, []), readable_suffixes()
    for path in paths:
        suffix, hidden = path.suffix.lower(), path.name.startswith(".")
        if os.path.isdir(path):
            inner = () if is_systems(path.name) else files_below(path, hidden, found.unreadable)
            if files := [os.path.join(*place) for place in inner]:
                found.subfolders[path.name] = files
        elif is_systems(path.name) or (hidden and suffix not in readable):
            continue
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
    return is_systems(name) or name.startswith(".")


def is_systems(name: str) -> bool:
    """Whether a system left it: of no interest even if it is an image, unlike other hidden files."""
    return name.lower() in LITTER or name.startswith(("._", "~$"))


def files_below(root: Path, hidden: bool = False, unreadable: Optional[list[str]] = None) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below `root`, in order of names, without what systems leave there; of hidden files the images only.

    `hidden`: all are. Links to folders are followed, once to each place. Folders that may not be read go into `unreadable`.
    """
    readable, seen, note = readable_suffixes(), [os.path.realpath(root)], None

    def is_new(folder: str) -> bool:
        if not os.path.islink(folder):
            return True
        target = os.path.realpath(folder)
        round_about = os.path.commonpath((target, seen[0])) == target
        if round_about or any(os.path.commonpath((target, place)) == place for place in seen):
            return False
        seen.append(target)
        return True

    if unreadable is not None:
        note = lambda error: unreadable.append(error.filename)  # noqa: E731
    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        inner = sorted(name for name in folders if not is_systems(name))
        folders[:] = [name for name in inner if is_new(os.path.join(folder, name))]
        within = hidden or f"{os.sep}." in folder[len(str(root)) :]
        for name in sorted(name for name in files if not is_systems(name)):
            if is_image_name(name, readable) or not (within or name.startswith(".") or name.endswith(".lock")):
                yield folder, name


def is_image_name(name: str, readable: set[str]) -> bool:
    return os.path.splitext(name)[1].lower() in readable


def images_of(files: list[str]) -> int:
    """How many files are images by their names."""
    readable = readable_suffixes()
    return sum(is_image_name(file, readable) for file in files)


def holds_no_image(folder: Path, flag: str) -> bool:
    """Whether neither the folder nor its subfolders have an image, or the folder is not there. Raises UserError for a file."""
    if not folder.exists():
        return True
    found = contents(folder, flag)
    return not found.images and not any(
        images_of(files) for name, files in found.subfolders.items() if not name.startswith(".")
    )


def samples_in_folder(
    folder: str, flag: str, caption_column: Optional[str] = None, say: Callable[[str], None] = print
) -> list[Sample]:
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
    paths, inner = found.images + named, {str(path.parent) for path in named} - {str(root)}
    deeper = [Path(file) for files in found.subfolders.values() for file in files if os.path.dirname(file) in inner]
    own = beside(paths, found.captions + [path for path in deeper if path.suffix.lower() in CAPTIONS])
    used = {*map(str, named), *(str(file) for files in own.values() for file in files)}
    if not paths:
        counts = {name: images_of(files) for name, files in sorted(found.subfolders.items())}
        found = found._replace(subfolders={name: files for name, files in found.subfolders.items() if not counts[name]})
        inner = [f"{name} with {number} images" for name, number in counts.items() if number]
        hint = f"It has subdirectories ({few(inner)}): give one of them." if inner else "Put 5 to 20 images there."
        raise UserError(
            "\n".join([f"{where}: no image in this directory. {hint}", *left_out(found, table, where, used)])
        )
    for note in left_out(found, table, where, used):
        say(note)
    if table and not captions:
        say(f"{where}: {table.name} has no rows")
    samples = captioned(root, captions, own, table, flag, say)
    if orphans := [path.name for path in found.captions if str(path) not in used]:
        say(f"{where}: {len(orphans)} caption files without an image are not used: {few(orphans)}")
    bare = [sample.name for sample in samples if not sample.caption]
    if 0 < len(bare) < len(samples):
        say(
            f"{where}: {len(samples) - len(bare)} of {len(samples)} images have a caption of their own; without: {few(bare)}"
        )
    return samples


def captioned(
    root: Path,
    captions: dict,
    own: dict[Path, list[Path]],
    table: Optional[Path],
    flag: str,
    say: Callable[[str], None],
) -> list[Sample]:
    """A sample of each image: captions of metadata by name from `root`, or of its `own` files. Says which of several captions it takes."""
    where, samples, differ, overruled, bad, owners = f"{flag} {shown(root)}", [], [], [], [], {}
    for path, files in own.items():
        name = os.path.relpath(path, root)
        caption = captions.get(name)
        if caption is None and files:
            owners.setdefault(files[0], []).append(name)
            try:
                caption = caption_text(files[0])
            except ValueError as error:
                bad.append(f"{shown(files[0])}: {error}")
            if any(says_otherwise(file, caption) for file in files[1:]):
                differ.append(name)
        elif any(says_otherwise(file, caption) for file in files):
            overruled.append(os.path.relpath(files[0], root))
        samples.append(Sample(shown(name), path, caption or None))
    if bad:
        raise UserError(
            f"{flag}: {len(bad)} caption files cannot be read; save them as UTF-8 ({SAVE_AS_UTF8}):\n{listing(bad)}"
        )
    if differ:
        say(
            f"{where}: {len(differ)} images have several captions ({few(differ)}); .txt is used before .caption, a.txt before a.png.txt"
        )
    if shared := [
        f"{os.path.relpath(file, root)} to {' and '.join(names)}" for file, names in owners.items() if len(names) > 1
    ]:
        say(f"{where}: {len(shared)} caption files belong to several images each: {few(shared)}")
    if overruled:
        say(
            f"{where}: {table.name} is used, not the captions of {len(overruled)} files that say otherwise: {few(overruled)}"
        )
    return samples


def says_otherwise(file: Path, caption: Optional[str]) -> bool:
    try:
        return caption_text(file) != (caption or "")
    except ValueError:
        return True


def left_out(found: Contents, table: Optional[Path], where: str, used: set[str]) -> list[str]:
    """A line for every kind of thing in a folder that is no sample and whose path is not among the `used`."""
    lines = []
    if found.broken:
        lines.append(
            f"{where}: {len(found.broken)} links lead nowhere and are not used: {few(path.name for path in found.broken)}"
        )
    kinds = {}
    for path in (path for path in found.others if str(path) not in used):
        hint = (
            "hidden files: rename them to use them" if path.name.startswith(".") else HINTS.get(path.suffix.lower(), "")
        )
        kinds.setdefault(hint, []).append(path.name)
    for hint, names in kinds.items():
        lines.append(f"{where}: {len(names)} files are not used: {few(names)}{f' ({hint})' if hint else ', no images'}")
    if tables := [path.name for path in found.tables if path != table]:
        read = table.name if table else "metadata.jsonl, metadata.csv, .txt and .caption"
        lines.append(f"{where}: {len(tables)} files are not used: {few(tables)}; captions are read from {read}")
    unused = []
    for name, files in sorted(found.subfolders.items()):
        files = [file for file in files if file not in used]
        images = images_of(files)
        counts = [
            f"{number} {what}" for number, what in ((images, "images"), (len(files) - images, "other files")) if number
        ]
        unused += [f"{shown(name)}/ with {' and '.join(counts)}"] if counts else []
    if unused:
        hint = "Move the images up, or name them in metadata.jsonl (sub/a.png)."
        lines.append(f"{where}: subfolders are not used: {few(unused)}. {hint}")
    if found.unreadable:
        lines.append(f"{where}: {len(found.unreadable)} subfolders may not be read: {few(found.unreadable)}")
    return lines


def beside(images: list[Path], files: list[Path]) -> dict[Path, list[Path]]:
    """The caption files of every image, the one to use first: a.txt, a.TXT, a.caption or a.png.txt for a.png.

    Those of exactly its name, or else those whose names are alike and no other image's.
    """
    exact, alike = {}, {}
    for path in sorted(
        files, key=lambda path: (CAPTIONS.index(path.suffix.lower()), path.suffix != path.suffix.lower())
    ):
        exact.setdefault((path.parent, path.stem), []).append(path)
        alike.setdefault((path.parent, same_name(path.stem)), []).append(path)

    def of(image: Path, index: dict, form: Callable[[str], str]) -> list[Path]:
        found = [file for name in (image.stem, image.name) for file in index.get((image.parent, form(name)), [])]
        # Stable: a.txt stays before a.png.txt.
        return sorted(dict.fromkeys(found), key=lambda file: CAPTIONS.index(file.suffix.lower()))

    found = {image: of(image, exact, str) for image in images}
    claimed = {file for own in found.values() for file in own}
    for image in (image for image, own in found.items() if not own):
        found[image] = [file for file in of(image, alike, same_name) if file not in claimed]
    return found


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
                out = found or not stays(names.from_root(name))
                missing.append(f"{shown(name)} (line {number})" + (" leads out of the directory" if out else ""))
            elif found in captions and captions[found] != caption:
                bad.append(f"line {number}: another caption for {shown(found)} than line {lines[found]}'s")
            else:
                captions[found], lines[found] = caption, number
    except UnicodeDecodeError:
        raise UserError(
            f"{shown(path)}: not UTF-8 after line {number}. Save the file as UTF-8 ({SAVE_AS_UTF8})."
        ) from None
    if bad:
        keys = keys or (FILE_KEYS[0], caption_column or CAPTION_KEYS[0])
        raise UserError(
            f'{shown(path)}: {len(bad)} lines cannot be used; each needs "{keys[0]}" and "{keys[1]}":\n{listing(bad)}\n'
            "Mend them, or name the captions' key with --caption_column."
        )
    if missing:
        raise UserError(
            f"{shown(path)}: names files that are not in this directory:\n{listing(missing)}\nMend the lines."
        )
    return captions


def _key(row: dict, usual: tuple[str, ...]) -> str:
    """The first of the usual names that the row has, in capitals or not."""
    there = {key.lower(): key for key in reversed(row) if key not in usual}
    return next((there.get(key, key) for key in usual if key in row or key in there), usual[0])


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
