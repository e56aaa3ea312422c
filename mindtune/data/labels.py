"""Text drawn under images in any script: each character in the first font that has it, else as its code, such as U+1F436.

Fonts, in order: DejaVu Sans, which matplotlib brings along (Latin, Greek, Cyrillic, Arabic, symbols), Noto Sans CJK of the
package noto-cjk-sans-otc (Chinese, Japanese, Korean), and those of the system. Colour fonts are not used.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

SIZE, LINE, BASELINE = (
    13,
    16,
    13,
)  # of the letters, from line to line, and from a line's top to where its letters stand; pixels
_MATPLOTLIB = Path(matplotlib.get_data_path(), "fonts", "ttf")
_CJK_PACKAGE, _CJK_FILE, _SIMPLIFIED_CHINESE = "noto_cjk_sans_otc", "NotoSansCJK-Regular.ttc", 2
_BOXES = re.compile(r"last.?resort|blank", re.IGNORECASE)  # fonts that have the same box for every character


class Piece(NamedTuple):
    """What is never divided: a character with its accents, or the code of one."""

    text: str
    font: ImageFont.FreeTypeFont
    width: float


def wrap(text: str, width: float) -> list[list[Piece]]:
    """The lines of `text`, none wider than `width` pixels.

    They break at spaces, between Chinese or Japanese characters, or in a word that is longer than a line. Line breaks and
    runs of spaces count as one space. A piece that is wider than `width` has a line for itself.
    """
    lines, line = [], []
    for piece in _pieces(" ".join(unicodedata.normalize("NFC", text).split())):
        line.append(piece)
        while len(line) > 1 and sum(each.width for each in line) > width and line[-1].text != " ":
            cut = next((n for n in range(len(line) - 1, 0, -1) if _may_break(line[n - 1], line[n])), len(line) - 1)
            lines.append(line[:cut])
            line = line[cut:]
    return [kept for kept in map(_stripped, [*lines, line]) if kept]


def draw(canvas: ImageDraw.ImageDraw, position: tuple[float, float], lines: list[list[Piece]]) -> None:
    """Draws `lines` in black, the first one's top left at `position`; they are `LINE` pixels apart."""
    left, top = position
    for number, line in enumerate(lines):
        x, start = left, 0
        for end in range(1, len(line) + 1):  # letters of one font together: Arabic and Indian ones join
            if end == len(line) or line[end].font is not line[start].font:
                run = "".join(piece.text for piece in line[start:end])
                canvas.text((x, top + number * LINE + BASELINE), run, fill="black", font=line[start].font, anchor="ls")
                x, start = x + line[start].font.getlength(run), end


def _stripped(line: list[Piece]) -> list[Piece]:
    while line and line[-1].text == " ":
        line = line[:-1]
    return line[1:] if line and line[0].text == " " else line


def _may_break(before: Piece, after: Piece) -> bool:
    """Chinese and Japanese break between any two characters, but not before closing marks and small kana or after opening marks."""
    if before.text == " ":
        return True
    first, last = after.text[0], before.text[0]
    small = unicodedata.category(first) in ("Lm", "Pe", "Pf", "Po") or " LETTER SMALL " in unicodedata.name(first, "")
    if first == " " or small or unicodedata.category(last) in ("Ps", "Pi"):
        return False
    return any(
        piece.text.startswith("U+") or unicodedata.east_asian_width(piece.text[0]) in "WF" for piece in (before, after)
    )


def _pieces(text: str) -> list[Piece]:
    clusters: list[str] = []
    for character in text:
        if unicodedata.category(character) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(character, ""):
            continue  # joiners, marks of direction, variants: invisible by themselves
        if clusters and unicodedata.category(character)[0] == "M" and clusters[-1] != " ":
            clusters[-1] += character
        else:
            clusters.append(character)
    pieces: list[Piece] = []
    for cluster in clusters:
        font = pieces[-1].font if cluster == " " and pieces else _font(cluster)
        for part in [cluster] if font else cluster:
            own = font or _font(part)
            shown = part if own else f"U+{ord(part):04X}"
            own = own or _font("U")
            pieces.append(Piece(shown, own, own.getlength(shown)))
    return pieces


@lru_cache(maxsize=10_000)
def _font(cluster: str) -> Optional[ImageFont.FreeTypeFont]:
    """The first font that has all of these characters and draws something; None if there is none."""
    if cluster == " ":
        return _load(*_own_fonts()[0])
    if any(
        unicodedata.category(character)[0] in "CZ" and unicodedata.category(character) != "Co" for character in cluster
    ):
        return None
    for path, index in [*_own_fonts(), *_system_fonts()]:
        if all(ord(character) in _characters(path) for character in cluster):
            font = _load(path, index)
            if font and font.getmask(cluster).getbbox():
                return font
    return None


@cache
def _own_fonts() -> list[tuple[str, int]]:
    """Path and index of the fonts that Python packages bring along."""
    found = importlib.util.find_spec(_CJK_PACKAGE)
    cjk = Path(found.origin).with_name(_CJK_FILE) if found and found.origin else None
    return [(str(_MATPLOTLIB / "DejaVuSans.ttf"), 0)] + (
        [(str(cjk), _SIMPLIFIED_CHINESE)] if cjk and cjk.is_file() else []
    )


@cache
def _system_fonts() -> list[tuple[str, int]]:
    """The system's, upright and regular ones first."""
    entries = {
        (entry.style != "normal", entry.weight not in (400, "normal", "regular"), entry.fname)
        for entry in fontManager.ttflist
        if _MATPLOTLIB not in Path(entry.fname).parents and not _BOXES.search(entry.name)
    }
    return [(path, 0) for _, _, path in sorted(entries)]


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, UnicodeDecodeError):
        return frozenset()


@cache
def _load(path: str, index: int) -> Optional[ImageFont.FreeTypeFont]:
    try:
        return ImageFont.truetype(path, SIZE, index=index)
    except OSError:  # fonts of bitmaps, in one size only
        return None
