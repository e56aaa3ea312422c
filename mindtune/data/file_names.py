"""Finds the files that metadata name, in the spellings that people use."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple, Optional


def normalize_name(name: str) -> str:
    """The same string for names that differ in case, Unicode form or surrounding spaces only.

    macOS writes accents as separate characters, Linux and Windows as one character with the letter.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def is_inside(name: str) -> bool:
    """Whether a relative path stays below its directory. Links are not resolved: the owner of the disk created them."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir


class _FolderNames(NamedTuple):
    """The names in a folder, and the same by their `normalize_name`."""

    exact: set[str]
    by_normalized: dict[str, list[str]]


class FileNames:
    """Finds files below the directory `root`: exactly as named, or else by `normalize_name` and with \\ read as /."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, _FolderNames] = {}

    def find(self, name: str) -> Optional[str]:
        """The path from `root`, without . and .., of the file that `name` means; None unless exactly one matches."""
        name = self.relative_to_root(name)
        for exact in (name, name.replace("\\", "/")):
            if exact and os.path.isfile(self.root / exact):
                return os.path.normpath(exact)
            if os.path.isabs(exact):
                return None
        path = ""
        for part in os.path.normpath(name.strip().replace("\\", "/")).split("/"):
            if part == os.pardir:
                path = os.path.join(path, part)
                continue
            matches = self._matches(path, part)
            if len(matches) != 1:
                return None
            path = os.path.join(path, matches[0])
        return path if os.path.isfile(self.root / path) else None

    def relative_to_root(self, name: str) -> str:
        """An absolute path below `root`, also through links, relative to `root`; other names unchanged."""
        if os.path.isabs(name):
            for resolve in (os.path.abspath, os.path.realpath):
                relative = os.path.relpath(resolve(name), resolve(self.root))
                if is_inside(relative):
                    return relative
        return name

    def _matches(self, folder: str, name: str) -> list[str]:
        """The names in `folder` that `name` may mean."""
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        names = self._folders[folder]
        return [name] if name in names.exact else names.by_normalized.get(normalize_name(name), [])

    def _list(self, folder: str) -> _FolderNames:
        try:
            names = os.listdir(self.root / folder)
        except OSError:
            names = []
        by_normalized: dict[str, list[str]] = {}
        for name in names:
            by_normalized.setdefault(normalize_name(name), []).append(name)
        return _FolderNames(set(names), by_normalized)
