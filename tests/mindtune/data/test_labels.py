"""Labels in any script: each character is drawn by a font that has it, or written as its code."""
# ruff: noqa: RUF001

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mindtune.data import labels
from mindtune.data.labels import BASELINE, LINE_HEIGHT, draw_lines, wrap

CHINESE = "一只戴着红色围巾的猫坐在窗台上，看着外面的雪。高质量，细节丰富，电影感光影（真的）。"
JAPANESE = "赤いマフラーを巻いた猫が窓辺に座って、雪を眺めている。ネコ「かわいい」と言った。"
TEXTS = {
    "English": "a photo of sks dog on a beach, sharp focus, 35 mm " * 3,
    "one word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Chinese": CHINESE,
    "Japanese": JAPANESE,
    "Korean": "창가에 앉아 눈을 바라보는 빨간 목도리를 한 고양이",
    "Cyrillic and Greek": "Привет, мир! Кошка у окна. Ελληνικά γάτα",
    "accents": "Zażółć gęślą jaźń, Việt ngữ Ấ Ệ, cafe\u0301",
    "emoji": "a dog 🐶 and a cat 🐱, a family 👨\u200d👩\u200d👧, a heart ❤\ufe0f",
    "Arabic and Hebrew": "قطة تجلس على النافذة שלום עולם",
    "Hindi and Thai": "हिन्दी नमस्ते สวัสดี",
    "mixed": "sks 狗 on a 沙滩, 8k 高质量 — “très” beau №1",
}


@pytest.fixture(autouse=True)
def fresh_fonts():
    """Clears the caches of fonts, which tests replace."""
    for cached in (labels._find_font, labels._package_fonts, labels._system_fonts):
        cached.cache_clear()
    yield
    for cached in (labels._find_font, labels._package_fonts, labels._system_fonts):
        cached.cache_clear()


def shown(text, width=10_000):
    return ["".join(piece.text for piece in line) for line in wrap(text, width)]


def dark_pixels(text, width=400):
    """The pixels of the label on a wider image: True where it is dark."""
    lines = wrap(text, width)
    image = Image.new("L", (width + 50, LINE_HEIGHT * max(1, len(lines))), "white")
    draw_lines(ImageDraw.Draw(image), (0, 0), lines)
    return np.asarray(image) < 128


def is_box(piece):
    """Whether the font draws the box that it draws for characters that it does not have."""
    missing, own = (piece.font.getmask(text) for text in ("\U0010ffff", piece.text))
    return (missing.size, bytes(missing)) == (own.size, bytes(own))


# ---- fonts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_no_character_is_drawn_as_a_box(name):
    pieces = [piece for line in wrap(TEXTS[name], 300) for piece in line if piece.text != " "]
    assert pieces and not any(map(is_box, pieces))
    assert dark_pixels(TEXTS[name]).any()


def test_no_character_of_all_unicode_is_drawn_as_a_box():
    """Every 97th code point: drawn, written as its code, or left out if it is invisible."""
    for code in range(0x20, 0x110000, 97):
        for piece in (piece for line in wrap(chr(code), 10_000) for piece in line):
            assert piece.text == f"U+{code:04X}" or not is_box(piece), hex(code)


@pytest.mark.parametrize("name", ["English", "Chinese", "Japanese", "Korean", "Cyrillic and Greek", "mixed"])
def test_characters_that_the_fonts_have_are_kept(name):
    assert shown(TEXTS[name]) == [TEXTS[name].strip()]


def test_different_characters_look_different():
    drawings = [dark_pixels(character) for character in "猫狗ねネ고양ДЖé"]
    for number, drawing in enumerate(drawings):
        assert not any(np.array_equal(drawing, other) for other in drawings[:number])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a 🐶", "a U+1F436"),
        ("👨\u200d👩\u200d👧", "U+1F468U+1F469U+1F467"),  # joiners are invisible
        ("❤\ufe0f", "❤"),  # and so is the mark that asks for colour
        ("a\x00b\x1b", "aU+0000bU+001B"),
        ("\ud800", "U+D800"),  # half of a pair, from a file that is not UTF-8
        ("\ue000", "U+E000"),
        ("\U0010ffff", "U+10FFFF"),
        ("zero\u200bwidth\u202e", "zerowidth"),
        ("cafe\u0301", "café"),
        ("q\u0301", "q\u0301"),  # has no character of its own: an accent over a letter
    ],
)
def test_a_character_that_no_font_has_is_written_as_its_code(monkeypatch, text, expected):
    monkeypatch.setattr(labels.fontManager, "ttflist", [])
    assert shown(text) == [expected]


def test_without_the_fonts_package_chinese_is_written_as_codes(monkeypatch):
    monkeypatch.setattr(labels, "_CJK_PACKAGE", "no_such_package")
    monkeypatch.setattr(labels.fontManager, "ttflist", [])
    assert shown("猫 cat") == ["U+732B cat"]


def test_system_fonts_are_used_last(monkeypatch):
    """The Chinese font stands for an installed one. A broken and a missing file are skipped."""
    path = importlib.util.find_spec("noto_cjk_sans_otc").origin.replace("__init__.py", "NotoSansCJK-Regular.ttc")
    entry = type(labels.fontManager.ttflist[0])
    entries = [entry(fname=name, name="A") for name in ("/absent.ttf", __file__)] + [entry(fname=path, name="Z")]
    monkeypatch.setattr(labels, "_CJK_PACKAGE", "no_such_package")
    monkeypatch.setattr(labels.fontManager, "ttflist", entries)
    assert shown("猫 cat") == ["猫 cat"]


@pytest.mark.parametrize("name", ["Last Resort", ".LastResort", "Adobe Blank", "AdobeBlank2"])
def test_fonts_that_draw_a_box_for_everything_are_not_used(monkeypatch, name):
    path = importlib.util.find_spec("noto_cjk_sans_otc").origin.replace("__init__.py", "NotoSansCJK-Regular.ttc")
    monkeypatch.setattr(labels, "_CJK_PACKAGE", "no_such_package")
    monkeypatch.setattr(labels.fontManager, "ttflist", [type(labels.fontManager.ttflist[0])(fname=path, name=name)])
    assert shown("猫") == ["U+732B"]


# ---- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 186, 400])
@pytest.mark.parametrize("name", TEXTS)
def test_lines_fit_and_hold_the_whole_text(name, width):
    lines = wrap(TEXTS[name], width)
    for line in lines:
        assert len(line) == 1 or sum(piece.width for piece in line) <= width
        assert line[0].text != " " != line[-1].text
    together = "".join(piece.text for line in lines for piece in line)
    assert together.replace(" ", "") == shown(TEXTS[name])[0].replace(" ", "")
    if all(piece.width < width for line in lines for piece in line):
        assert not dark_pixels(TEXTS[name], width)[:, width + 1 :].any()


def test_words_that_fit_are_not_broken():
    lines = shown("a photo of sks dog on a beach", 80)
    assert len(lines) > 1 and " ".join(lines) == "a photo of sks dog on a beach"


def test_text_without_spaces_fills_its_lines():
    lines = wrap(CHINESE, 200)
    assert all(sum(piece.width for piece in line) > 200 - 4 * labels.FONT_SIZE for line in lines[:-1])


@pytest.mark.parametrize("width", range(60, 200, 7))
def test_chinese_and_japanese_punctuation_does_not_begin_or_end_a_line_wrongly(width):
    for line in shown(CHINESE, width) + shown(JAPANESE, width):
        assert line[0] not in "，。、」）ー" and line[-1] not in "「（"


def test_line_breaks_and_tabs_count_as_a_space():
    assert shown(" a\tb\n\nc\u3000d ") == ["a b c d"]
    assert wrap("", 100) == wrap(" \n ", 100) == wrap("\u200b", 100) == []


def test_a_code_is_not_broken():
    assert all(len(line.replace("U+1F436", "")) == 0 for line in shown("🐶" * 10, 100))


def test_letters_stay_within_their_line():
    """Chinese characters and letters with descenders stay within their line."""
    rows = np.flatnonzero(dark_pixels("猫gjpqÅ赢").any(axis=1))
    assert rows.min() >= 0 and rows.max() < LINE_HEIGHT and BASELINE < LINE_HEIGHT
