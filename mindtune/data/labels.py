"""Draws text in any script as labels of images.

Each character uses the first font that has it, or is written as its code, such as U+1F436. The fonts, in order:
DejaVu Sans, which comes with matplotlib (Latin, Greek, Cyrillic, Arabic, symbols); Noto Sans CJK of the package
noto-cjk-sans-otc (Chinese, Japanese, Korean); the fonts of the system. Colour fonts are not used.
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

# In pixels: the size of the letters, the height of a line, and the distance from the top of a line to its baseline.
FONT_SIZE = 13
LINE_HEIGHT = 16
BASELINE = 13
_MATPLOTLIB_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
_CJK_PACKAGE = "noto_cjk_sans_otc"
_CJK_FILE = "NotoSansCJK-Regular.ttc"
_CJK_SIMPLIFIED_CHINESE = 2  # the index of the font in the file
_PLACEHOLDER_FONTS = re.compile(r"last.?resort|blank", re.IGNORECASE)  # they draw the same box for every character


class Piece(NamedTuple):
    """Text that is never broken across lines: a character with its accents, or its code. The width is in pixels."""

    text: str
    font: ImageFont.FreeTypeFont
    width: float


def wrap(text: str, width: float) -> list[list[Piece]]:
    """The lines of `text`, each at most `width` pixels wide. A piece wider than `width` has a line of its own.

    Lines break at spaces, between Chinese or Japanese characters, and inside words longer than a line. Line breaks
    and runs of spaces in `text` count as one space.
    """
    lines = []
    line = []
    for piece in _split_into_pieces(" ".join(unicodedata.normalize("NFC", text).split())):
        line.append(piece)
        while len(line) > 1 and sum(each.width for each in line) > width and line[-1].text != " ":
            breaks = (n for n in range(len(line) - 1, 0, -1) if _may_break(line[n - 1], line[n]))
            end = next(breaks, len(line) - 1)
            lines.append(line[:end])
            line = line[end:]
    stripped = map(_strip_spaces, [*lines, line])
    return [line for line in stripped if line]


def draw_lines(canvas: ImageDraw.ImageDraw, position: tuple[float, float], lines: list[list[Piece]]) -> None:
    """Draws `lines` in black, `LINE_HEIGHT` pixels apart, with the top left corner of the first at `position`."""
    left, top = position
    for number, line in enumerate(lines):
        x = left
        start = 0
        # Letters of the same font are drawn together, because Arabic and Indian letters join.
        for end in range(1, len(line) + 1):
            if end == len(line) or line[end].font is not line[start].font:
                font = line[start].font
                text = "".join(piece.text for piece in line[start:end])
                canvas.text((x, top + number * LINE_HEIGHT + BASELINE), text, fill="black", font=font, anchor="ls")
                x += font.getlength(text)
                start = end


def _strip_spaces(line: list[Piece]) -> list[Piece]:
    while line and line[-1].text == " ":
        line = line[:-1]
    return line[1:] if line and line[0].text == " " else line


def _may_break(before: Piece, after: Piece) -> bool:
    """Whether a line may end between two pieces: at a space, or next to a Chinese or Japanese character.

    No line starts with a closing mark or a small kana, or ends with an opening mark.
    """
    if before.text == " ":
        return True
    first = after.text[0]
    last = before.text[0]
    is_closing = unicodedata.category(first) in ("Lm", "Pe", "Pf", "Po")
    is_small_kana = " LETTER SMALL " in unicodedata.name(first, "")
    is_opening = unicodedata.category(last) in ("Ps", "Pi")
    if first == " " or is_closing or is_small_kana or is_opening:
        return False
    return any(
        piece.text.startswith("U+") or unicodedata.east_asian_width(piece.text[0]) in "WF" for piece in (before, after)
    )


def _split_into_pieces(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for cluster in _clusters(text):
        font = pieces[-1].font if cluster == " " and pieces else _find_font(cluster)
        # Without a font for the whole cluster, each of its characters is a piece.
        for part in [cluster] if font else cluster:
            part_font = font or _find_font(part)
            part_text = part if part_font else f"U+{ord(part):04X}"
            part_font = part_font or _find_font("U")
            pieces.append(Piece(part_text, part_font, part_font.getlength(part_text)))
    return pieces


def _clusters(text: str) -> list[str]:
    """The characters of `text`, each with the accents that follow it."""
    clusters: list[str] = []
    for character in text:
        if unicodedata.category(character) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(character, ""):
            continue  # invisible: joiners, direction marks, variant selectors
        if clusters and unicodedata.category(character)[0] == "M" and clusters[-1] != " ":
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


@lru_cache(maxsize=10_000)
def _find_font(cluster: str) -> Optional[ImageFont.FreeTypeFont]:
    """The first font that has all of these characters and draws a visible shape; None if there is none."""
    if cluster == " ":
        return _load_font(*_package_fonts()[0])
    categories = [unicodedata.category(character) for character in cluster]
    if any(category[0] in "CZ" and category != "Co" for category in categories):
        return None
    for path, index in [*_package_fonts(), *_system_fonts()]:
        if all(ord(character) in _characters(path) for character in cluster):
            font = _load_font(path, index)
            if font and font.getmask(cluster).getbbox():
                return font
    return None


@cache
def _package_fonts() -> list[tuple[str, int]]:
    """(path, index) of the fonts in Python packages."""
    fonts = [(str(_MATPLOTLIB_FONTS / "DejaVuSans.ttf"), 0)]
    package = importlib.util.find_spec(_CJK_PACKAGE)
    if package and package.origin:
        cjk = Path(package.origin).with_name(_CJK_FILE)
        if cjk.is_file():
            fonts.append((str(cjk), _CJK_SIMPLIFIED_CHINESE))
    return fonts


@cache
def _system_fonts() -> list[tuple[str, int]]:
    """(path, index) of the fonts of the system, upright and regular ones first."""
    entries = {
        (entry.style != "normal", entry.weight not in (400, "normal", "regular"), entry.fname)
        for entry in fontManager.ttflist
        if _MATPLOTLIB_FONTS not in Path(entry.fname).parents and not _PLACEHOLDER_FONTS.search(entry.name)
    }
    return [(path, 0) for _, _, path in sorted(entries)]


@cache
def _characters(path: str) -> frozenset[int]:
    """The code points that a font has."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, UnicodeDecodeError):
        return frozenset()


@cache
def _load_font(path: str, index: int) -> Optional[ImageFont.FreeTypeFont]:
    try:
        return ImageFont.truetype(path, FONT_SIZE, index=index)
    except OSError:  # bitmap fonts have fixed sizes
        return None
