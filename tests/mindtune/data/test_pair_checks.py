"""The check of all pairs before a run, and the background of transparent condition images."""

import hashlib
import io
import pickle

import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.buckets import covering
from mindtune.data.columns import Source
from mindtune.data.pair_checks import preflight_pairs
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import load_pairs

from .image_files import png
from .pair_files import BLACK, CONDITIONS, RED, WHITE, contents, drawn, refusal, table


@pytest.fixture
def mixed(tmp_path):
    """Two good pairs and one of every kind of bad one."""
    good, torn = png(40, 32), png(200, 200)[:9000]
    images = [good, good, None, png(64, 64), torn, png(40, 31), good, png(32, 90)]
    conditions = [good, None, good, png(32, 32), good, png(40, 31), b"no image", png(32, 90)]
    table(8, image=images, conditioning_image=conditions, text=list("abcdefgh")).save_to_disk(tmp_path / "mixed")
    return load_pairs(Source(train_data_dir=str(tmp_path / "mixed")))


PROBLEMS = {
    1: "its condition: missing (the cell of the data set is empty)",
    2: "missing (the cell of the data set is empty)",
    3: "64x64, its condition 32x32",
    4: "damaged (",
    5: "40x31 is smaller than --resolution 32",
    6: "its condition: not an image that Pillow can read",
}


@pytest.mark.parametrize("threads", [0, 3])
def test_preflight_lists_all_problems_at_once(mixed, threads):
    found = refusal(preflight_pairs, pairs=mixed, min_size=32, flag="--train_data_dir", skip_bad=False, threads=threads)
    assert "--train_data_dir: 6 of 8 pairs cannot be used" in found and "--skip_bad_images" in found
    lines = [line.strip() for line in found.splitlines() if line.startswith("  ")]
    assert len(lines) == 6
    for line, (row, problem) in zip(lines, PROBLEMS.items()):
        assert line.startswith(f"{mixed.name}[{row}]: {problem}")


def test_preflight_can_skip_bad_pairs(mixed, capsys):
    good = preflight_pairs(mixed, 32, "--train_data_dir", True)
    assert [pair.caption for pair in good] == ["a", "h"]
    printed = capsys.readouterr().out
    assert "continuing without 6 of 8 pairs" in printed and all(problem in printed for problem in PROBLEMS.values())
    with pytest.raises(UserError, match="no usable pair is left"):
        preflight_pairs(mixed, 1000, "--train_data_dir", True)


def test_preflight_keeps_good_pairs(mixed):
    pairs = mixed.select([0, 7])
    assert contents(preflight_pairs(pairs, 32, "--train_data_dir", False)) == contents(pairs)


def test_preflight_compares_an_image_with_its_own_bucket(mixed):
    """The image of 32 x 90 must cover its bucket of 80 x 32 (height x width). It does not cover one of 96 x 32."""
    pairs = mixed.select([0, 7])
    assert len(preflight_pairs(pairs, covering([(32, 32), (80, 32)]), "--train_data_dir", False)) == 2
    found = refusal(
        preflight_pairs, pairs=pairs, min_size=covering([(32, 32), (96, 32)]), flag="--train_data_dir", skip_bad=False
    )
    assert "1 of 2 pairs" in found and "[7]: 32x90 is smaller than its bucket 96,32 (height,width)" in found


# ---- transparent and blank condition images ------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "colours, background, lines",
    [
        ([WHITE] * 4, "black", ["4 transparent condition images are put on black"]),
        ([BLACK] * 4, "white", []),
        ([RED] * 4, "white", []),
        (
            [RED, WHITE, RED, RED],
            "black",
            ["4 transparent condition images are put on black; on white 25% of their drawing would not be visible"],
        ),
        (
            [BLACK, WHITE, WHITE, WHITE],
            "white",
            [
                "4 transparent condition images are put on white, where 75% of",
                "3 of 4 condition images are blank, all pixels have the same colour",
            ],
        ),
    ],
    ids=["white", "black", "red", "red and white", "black and white"],
)
def test_all_transparent_conditions_are_put_on_one_background(tmp_path, capsys, streaming, colours, background, lines):
    """On black only if white would hide the drawings, the same for all. The target images stay on white."""
    (tmp_path / "d").mkdir()
    source = drawn(tmp_path / "d", colours)
    if streaming:
        pairs = PairStream(source, count=4, buffer_size=1)
    else:
        pairs = preflight_pairs(load_pairs(source), 16, "--train_data_dir", False).select([0, 1, 2, 3])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines) and all(line in found for line, found in zip(lines, printed))
    assert pairs.background == background
    for pair in pickle.loads(pickle.dumps(pairs)):
        corner = {"white": (255,) * 3, "black": (0,) * 3}[background]
        assert pair.condition.open().getpixel((0, 0)) == corner and pair.image.background == "white"


def test_the_digest_of_conditions_depends_on_the_background(tmp_path):
    """Cached latents and the identity of a run depend on the background."""
    (tmp_path / "d").mkdir()
    pairs = load_pairs(drawn(tmp_path / "d", [WHITE] * 2))
    black = preflight_pairs(pairs, 16, "--train_data_dir", False)
    assert pairs[0].condition.digest != black[0].condition.digest and pairs[0].image.digest == black[0].image.digest


def test_opaque_conditions_of_a_single_colour_are_reported(tmp_path, capsys):
    flat = io.BytesIO()
    Image.new("RGB", (16, 16)).save(flat, "png")
    (tmp_path / "d").mkdir()
    table(3, conditioning_image=[CONDITIONS[0], flat.getvalue(), CONDITIONS[2]]).to_parquet(
        tmp_path / "d/train.parquet"
    )
    pairs = load_pairs(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert len(preflight_pairs(pairs, 16, "--train_data_dir", False)) == len(pairs)
    assert (
        capsys.readouterr().out
        == f"--train_data_dir: 1 of 3 condition images are blank, all pixels have the same colour: {tmp_path}/d[1]\n"
    )


# ---- pairs without a condition, and conditions of other sizes -------------------------------------


@pytest.fixture
def varied(tmp_path):
    """Pairs with a condition of the same size, of another one, without one, and with one that is not an image."""
    images = [png(40, 32), png(40, 32, 1), png(40, 32, 2), png(40, 32, 3)]
    conditions = [png(40, 32, 4), png(20, 30, 5), None, b"no image"]
    table(4, image=images, conditioning_image=conditions, text=list("abcd")).save_to_disk(tmp_path / "varied")
    return load_pairs(Source(train_data_dir=str(tmp_path / "varied"), condition_optional=True))


def test_what_is_found_of_a_condition_is_its_own(varied, capsys):
    good = preflight_pairs(varied, 32, "--flag", skip_bad=True, own_condition_size=True)
    assert [pair.caption for pair in good] == ["a", "b", "c"]
    assert [pair.image.size for pair in good] == [(40, 32)] * 3
    assert [pair.condition and pair.condition.size for pair in good] == [(40, 32), (20, 30), None]
    for pair in good:
        assert pair.image.known_digest == hashlib.sha256(pair.image.read()).hexdigest()
        if pair.condition:
            assert pair.condition.known_digest == hashlib.sha256(pair.condition.read()).hexdigest()
    assert [pair.caption for pair in good.select([2, 1])] == ["c", "b"]
    assert [pair.condition and pair.condition.size for pair in good.select([2, 1])] == [None, (20, 30)]
    printed = capsys.readouterr().out.splitlines()
    assert "continuing without 1 of 4 pairs" in printed[0] and "varied[3]: its condition: not an image" in printed[1]
    assert printed[2:] == [f"--flag: 1 of 3 pairs have no condition, such as {varied.name}[2]"]


def test_a_condition_of_another_size_is_refused_where_sizes_must_agree(varied):
    found = refusal(preflight_pairs, pairs=varied.select([0, 1, 2]), min_size=32, flag="--flag", skip_bad=False)
    assert "1 of 3 pairs cannot be used" in found and "[1]: 40x32, its condition 20x30" in found


def test_an_image_that_is_too_small_is_refused_and_a_condition_is_not(varied):
    options = {"flag": "--flag", "skip_bad": False, "own_condition_size": True}
    found = refusal(preflight_pairs, pairs=varied.select([1, 2]), min_size=40, **options)
    assert "2 of 2 pairs" in found and "[1]: 40x32 is smaller than --resolution 40" in found
    assert len(preflight_pairs(varied.select([1, 2]), 32, **options)) == 2


def test_blank_conditions_are_counted_among_the_conditions(tmp_path, capsys):
    """A mask without anything to fill is such a condition."""
    black = io.BytesIO()
    Image.new("L", (16, 16)).save(black, "png")
    table(3, conditioning_image=[CONDITIONS[0], None, black.getvalue()]).save_to_disk(tmp_path / "d")
    pairs = load_pairs(Source(train_data_dir=str(tmp_path / "d"), condition_optional=True))
    preflight_pairs(pairs, 16, "--flag", False)
    assert capsys.readouterr().out.splitlines() == [
        f"--flag: 1 of 3 pairs have no condition, such as {tmp_path}/d[1]",
        f"--flag: 1 of 2 condition images are blank, all pixels have the same colour: {tmp_path}/d[2]",
    ]
