"""Pairs for ControlNet training: found in every kind of data set, checked, put in order, streamed."""

import base64
import io
import json
import pickle
import re
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.crops import pixel_values
from mindtune.data.pair_checks import preflight_pairs
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import Pairs, load_pairs

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "tiny"))
import shapes

COUNT = 7


@pytest.fixture(autouse=True)
def library_cache(monkeypatch, tmp_path_factory):
    """Even a stream makes a lock file there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("library"))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width=16, height=16, seed=0):
    file = io.BytesIO()
    noise(width, height, seed).save(file, "png")
    return file.getvalue()


IMAGES = [png(seed=number) for number in range(COUNT)]
CONDITIONS = [png(seed=100 + number) for number in range(COUNT)]
CAPTIONS = [f"caption {number}" for number in range(COUNT)]
WANTED = list(zip(IMAGES, CONDITIONS, CAPTIONS))


def contents(pairs):
    return [(pair.image.read(), pair.condition.read(), pair.caption) for pair in pairs]


def table(count=COUNT, **columns):
    """A data set of encoded pictures; an argument replaces a column, None takes it away."""
    columns = {"image": IMAGES, "conditioning_image": CONDITIONS, "text": CAPTIONS, **columns}
    found = datasets.Dataset.from_dict({name: cells[:count] for name, cells in columns.items() if cells})
    for name in found.column_names:
        if any(isinstance(cell, bytes) for cell in columns[name]):
            found = found.cast_column(name, datasets.Image())
    return found


# ---- one data set in every form ------------------------------------------------------------------


def as_parquet(folder):
    table().to_parquet(folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def as_parquet_of_plain_structs(folder):
    """As other programs write it: no note for the datasets library that the structs are pictures."""
    plain = (
        table()
        .cast_column("image", datasets.Image(decode=False))
        .cast_column("conditioning_image", datasets.Image(decode=False))
    )
    pyarrow.parquet.write_table(plain.data.table.replace_schema_metadata(None), folder / "train.parquet")
    return {"dataset_name": str(folder)}


def as_arrow(folder):
    table().save_to_disk(folder / "saved")
    (folder / "plain").mkdir()
    next((folder / "saved").glob("*.arrow")).rename(folder / "plain" / "data.arrow")
    return {"train_data_dir": str(folder / "plain")}


def as_saved(folder):
    table().save_to_disk(folder)
    return {"train_data_dir": str(folder)}


def as_saved_with_splits(folder):
    datasets.DatasetDict({"test": table(2), "train": table()}).save_to_disk(folder)
    return {"dataset_name": str(folder)}


def as_only_split(folder):
    table().to_parquet(folder / "validation.parquet")
    return {"dataset_name": str(folder)}


def write_files(folder):
    for kind, pictures in (("images", IMAGES), ("conditions", CONDITIONS)):
        (folder / kind).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            (folder / kind / f"{number}.png").write_bytes(picture)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_folder(folder, sub=""):
    write_files(folder / sub)
    rows = [
        {"file_name": f"images/{n}.png", "conditioning_image_file_name": f"conditions/{n}.png", "text": CAPTIONS[n]}
        for n in range(COUNT)
    ]
    write_lines(folder / sub / "metadata.jsonl", rows)
    return {"train_data_dir": str(folder)}


def as_folder_with_train(folder):
    """This one the library's imagefolder reads."""
    return as_folder(folder, "train")


def as_jsonl(folder):
    """Relative and absolute paths, and pairs.jsonl away from the pictures' folder."""
    write_files(folder / "data")
    rows = [
        {
            "image": str(folder / f"data/images/{n}.png"),
            "conditioning_image": f"data/conditions/{n}.png",
            "text": CAPTIONS[n],
        }
        for n in range(COUNT)
    ]
    return {"jsonl_for_train": str(write_lines(folder / "pairs.jsonl", rows))}


def as_metadata_csv(folder):
    write_files(folder)
    lines = [f"./images/{n}.png;conditions\\{n}.PNG;{CAPTIONS[n]}" for n in range(COUNT)]
    (folder / "metadata.csv").write_text(
        "\r\n".join(["file_name;conditioning_image_file_name;text", *lines]), encoding="utf-8-sig"
    )
    return {"train_data_dir": str(folder)}


def as_metadata_csv_in_train(folder):
    as_metadata_csv(folder / "train")
    return {"train_data_dir": str(folder)}


def as_csv_that_is_named(folder):
    as_metadata_csv(folder)
    (folder / "metadata.csv").rename(folder / "pairs.csv")
    return {"jsonl_for_train": str(folder / "pairs.csv")}


def as_jsonl_in_base64(folder):
    rows = [[base64.b64encode(cell).decode() for cell in cells] for cells in (IMAGES, CONDITIONS)]
    rows = [
        {"image": a, "conditioning_image": f"data:image/png;base64,{b}", "text": c} for a, b, c in zip(*rows, CAPTIONS)
    ]
    return {"jsonl_for_train": str(write_lines(folder / "pairs.jsonl", rows))}


def as_parquet_in_base64(folder):
    columns = [[base64.b64encode(cell).decode() for cell in cells] for cells in (IMAGES, CONDITIONS)]
    names = ["image", "conditioning_image", "text"]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, (*columns, CAPTIONS)))), folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def as_parquet_of_relative_paths(folder):
    write_files(folder)
    columns = [f"images/{n}.png" for n in range(COUNT)], [f"conditions/{n}.png" for n in range(COUNT)]
    names = ["image", "conditioning_image", "text"]
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(names, (*columns, CAPTIONS)))), folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def as_csv_of_paths(folder):
    write_files(folder)
    lines = [f"{folder}/images/{n}.png,{folder}/conditions/{n}.png,{CAPTIONS[n]}" for n in range(COUNT)]
    (folder / "train.csv").write_text("\n".join(["image,conditioning_image,text", *lines]))
    return {"dataset_name": str(folder)}


def write_tar(path, samples):
    """`samples`: {key: {extension: bytes}}."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def shard(numbers, image="image.png", condition="conditioning.png"):
    return {
        f"{n:04d}": {image: IMAGES[n], condition: CONDITIONS[n], "txt": CAPTIONS[n].encode(), "json": b'{"other": 1}'}
        for n in numbers
    }


def as_shards(folder, **names):
    write_tar(folder / "0.tar", shard(range(4), **names))
    write_tar(folder / "1.tar", shard(range(4, COUNT), **names))
    return {"train_data_dir": str(folder)}


def as_shards_with_short_names(folder):
    return as_shards(folder, image="png", condition="condition.png")


FORMS = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The arguments that open each form, written once; with a cache of their own."""
    found = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp(form.__name__)
        found[form] = {**form(folder), "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_pairs(sources, form):
    pairs = load_pairs(Source(**sources[form]))
    assert len(pairs) == COUNT and contents(pairs) == WANTED


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_streams_the_same_pairs(sources, form):
    """One pass, in whatever order."""
    stream = PairStream(Source(**sources[form]), seed=3, buffer_size=4, count=COUNT)
    assert sorted(contents(stream)) == sorted(WANTED)


def test_the_shapes_world_loads(tmp_path):
    shapes.make_folder(tmp_path / "world", 5, 16, 0, "train")
    rows = [json.loads(line) for line in (tmp_path / "world" / "metadata.jsonl").read_text().splitlines()]
    for flag in ("train_data_dir", "dataset_name"):
        pairs = load_pairs(Source(**{flag: str(tmp_path / "world")}, cache_dir=str(tmp_path / "cache")))
        assert [pair.caption for pair in pairs] == [row["text"] for row in rows]
        for pair, row in zip(pairs, rows):
            assert pair.image.read() == (tmp_path / "world" / row["image_file_name"]).read_bytes()
            assert pair.condition.name == str(tmp_path / "world" / row["conditioning_image_file_name"])


def test_pictures_are_named_by_their_file_or_their_row(sources):
    arguments = sources[as_jsonl]
    assert load_pairs(Source(**arguments))[6].image.name == str(
        Path(arguments["jsonl_for_train"]).parent / "data/images/6.png"
    )
    arguments = sources[as_parquet]
    assert load_pairs(Source(**arguments))[6].condition.name == f"{arguments['train_data_dir']}[6]"


def test_pairs_are_a_sequence(sources):
    pairs = load_pairs(Source(**sources[as_parquet]))
    assert pairs[-1].caption == "caption 6"
    with pytest.raises(IndexError):
        pairs[7]
    chosen = pairs.select([5, 1, 5]).select(np.array([0, 1]))
    assert isinstance(chosen, Pairs) and len(chosen) == 2
    assert contents(chosen) == [WANTED[5], WANTED[1]] and chosen[0].image.name.endswith("[5]")


def test_pairs_pickle_without_their_pictures(tmp_path):
    large = [np.random.default_rng(n).bytes(100_000) for n in range(COUNT)]
    table(image=large).to_parquet(tmp_path / "train.parquet")
    pairs = load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))).select([2, 0])
    packed = pickle.dumps(pairs)
    assert len(packed) < 50_000
    assert [pair.image.read() for pair in pickle.loads(packed)] == [large[2], large[0]]


def test_columns_may_be_named_and_empty_captions_are_empty(tmp_path):
    renamed = table(
        image=None, conditioning_image=None, text=None, photo=IMAGES, edges=CONDITIONS, words=["a", None, "", *"defg"]
    )
    renamed.to_parquet(tmp_path / "train.parquet")
    columns = {"image_column": "photo", "conditioning_image_column": "edges", "caption_column": "words"}
    pairs = load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), **columns))
    assert contents(pairs) == list(zip(IMAGES, CONDITIONS, ["a", "", "", *"defg"]))


def test_one_column_is_not_both_image_and_condition(tmp_path):
    table().to_parquet(tmp_path / "train.parquet")
    found = refusal(train_data_dir=str(tmp_path), image_column="image", conditioning_image_column="image")
    assert "column image is named for two purposes. Name each column once." in found


def test_the_first_other_image_column_is_the_target(tmp_path):
    renamed = table(image=None, conditioning_image=None, text=None, condition=CONDITIONS, photo=IMAGES, prompt=CAPTIONS)
    renamed.to_parquet(tmp_path / "train.parquet")
    assert contents(load_pairs(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")))) == WANTED


# ---- what cannot be loaded -----------------------------------------------------------------------


def refusal(call=load_pairs, **arguments):
    """What `call` says to a source of these arguments, or if it takes none to the arguments."""
    with pytest.raises(UserError) as error:
        call(Source(**arguments)) if call in (load_pairs, PairStream) else call(**arguments)
    return str(error.value)


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
@pytest.mark.parametrize(
    "columns, flags, message",
    [
        (
            {},
            {"image_column": "img"},
            "--image_column img: .* has the columns image, conditioning_image, text. Name one of them.",
        ),
        ({}, {"caption_column": "txt"}, "--caption_column txt: .* has the columns"),
        (
            {"conditioning_image": None},
            {},
            "--conditioning_image_column: .* has the columns image, text; none has a known name.",
        ),
        (
            {"text": None},
            {},
            "--caption_column: .* has the columns image, conditioning_image; none .* with --caption_column",
        ),
        ({"image": None}, {}, "--image_column: .* has the columns conditioning_image, text; none"),
        ({"text": list(range(COUNT))}, {}, "--caption_column text: holds int64, not text"),
        ({"text": [None] * COUNT}, {}, "--caption_column text: holds null, not text"),
        ({"text": [["a", "b"]] * COUNT}, {}, "--caption_column text: holds List, not text"),
        ({"text": IMAGES}, {}, "--caption_column text: holds Image, not text"),
        ({"text": [{"a": 1}] * COUNT}, {}, "--caption_column text: holds a struct, not text"),
        ({"image": list(range(COUNT))}, {}, "--image_column image: holds int64, not images"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, open_pairs, columns, flags, message):
    table(**columns).to_parquet(tmp_path / "train.parquet")
    arguments = {"train_data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), **flags}
    assert re.search(message, refusal(open_pairs, **arguments))


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_nothing_there(tmp_path, open_pairs):
    (tmp_path / "empty").mkdir()
    found = refusal(open_pairs, train_data_dir=str(tmp_path / "absent"))
    assert "--train_data_dir" in found and "no such directory. Give the directory that holds the pairs" in found
    found = refusal(open_pairs, dataset_name=str(tmp_path / "empty"))
    assert "--dataset_name" in found and "cannot read it" in found and "Give a directory with metadata.jsonl" in found
    found = refusal(open_pairs, jsonl_for_train=str(tmp_path / "absent.jsonl"))
    assert "--jsonl_for_train" in found and "no such file. Give a .jsonl file" in found


def test_no_train_among_several_splits(tmp_path):
    datasets.DatasetDict({"test": table(2), "dev": table(2)}).save_to_disk(tmp_path / "d")
    assert "has the splits test, dev, not train" in refusal(train_data_dir=str(tmp_path / "d"))


def test_a_data_set_without_rows(tmp_path):
    kinds = datasets.Features(dict.fromkeys(["image", "conditioning_image", "text"], datasets.Value("string")))
    datasets.Dataset.from_dict({name: [] for name in kinds}, features=kinds).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(table().data.table.slice(0, 0), tmp_path / "parquet" / "train.parquet")
    assert "the data set has no rows" in refusal(train_data_dir=str(tmp_path / "saved"))
    assert "the data set has no rows" in refusal(
        train_data_dir=str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert "of size 0" in refusal(PairStream, train_data_dir=str(tmp_path / "saved"))
    with pytest.raises(UserError, match="the data set has no rows"):
        next(iter(PairStream(Source(train_data_dir=str(tmp_path / "parquet")))))


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_shards_whose_samples_are_not_alike(tmp_path, open_pairs):
    samples = shard(range(3))
    del samples["0001"]["conditioning.png"]
    write_tar(tmp_path / "0.tar", samples)
    found = refusal(open_pairs, train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert "--train_data_dir" in found and "needs the same files, such as 01.image.png, 01.conditioning.png" in found


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_shards_that_are_cut_off_are_listed(tmp_path, open_pairs):
    """The library would take them for shorter ones, in silence."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", shard(range(COUNT)))
    for number in (0, 2):
        whole = (tmp_path / f"{number}.tar").read_bytes()
        (tmp_path / f"{number}.tar").write_bytes(whole[: len(whole) // 2])
    found = refusal(open_pairs, train_data_dir=str(tmp_path))
    assert "2 of 3 shards are truncated" in found and "0.tar" in found and "2.tar" in found and "1.tar" not in found


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
@pytest.mark.parametrize("flag", ["jsonl_for_train", "train_data_dir"])
def test_all_bad_lines_are_named_by_their_numbers(tmp_path, open_pairs, flag):
    good = '{"image": "a.png", "conditioning_image": "a.png", "text": "t"}'
    bad = [
        "{broken",
        "[1]",
        '{"image": "a.png", "text": "t"}',
        '{"image": 3, "conditioning_image": "a.png", "text": ["t"]}',
        "{}",
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join([good, *bad, good]))
    found = refusal(
        open_pairs, **{flag: str(tmp_path / "metadata.jsonl") if flag == "jsonl_for_train" else str(tmp_path)}
    )
    assert f"--{flag}" in found and "5 lines of metadata.jsonl cannot be used" in found
    assert "line 2: not JSON (Expecting property name enclosed in double quotes at character 2)" in found
    assert "line 3: not a JSON object" in found
    assert "line 4: lacks conditioning_image; has image, text" in found
    assert "line 5: image is 3, not text; text is ['t'], not text" in found
    assert "line 6: lacks image, conditioning_image, text; has no keys" in found


def test_a_jsonl_file_that_lacks_a_column_from_the_first_line_on(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "a.png", "text": "t"}])
    assert "--conditioning_image_column: " in refusal(jsonl_for_train=str(path))
    found = refusal(jsonl_for_train=str(path), caption_column="txt")
    assert f"--caption_column txt: --jsonl_for_train {path} has the columns image, text" in found


def test_all_missing_files_are_listed_at_once(tmp_path):
    (tmp_path / "there.png").write_bytes(png())
    rows = [{"image": f"{n}.png", "conditioning_image": "there.png", "text": ""} for n in range(30)]
    found = refusal(jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))
    assert (
        "30 files named in a.jsonl are missing" in found
        and f"{tmp_path}/29.png (line 30)" in found
        and "there.png" not in found
    )


def test_a_jsonl_file_without_lines_or_in_another_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "a.jsonl has no lines" in refusal(jsonl_for_train=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    assert "b.jsonl is not UTF-8" in refusal(jsonl_for_train=str(tmp_path / "b.jsonl"))


def test_jsonl_keys_may_be_named_and_a_byte_order_mark_is_no_matter(tmp_path):
    write_files(tmp_path)
    row = {"photo": "images/0.png", "edges_file_name": "conditions/0.png", "words": "one\u2028two", "image": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig", newline="")
    columns = {"image_column": "photo", "conditioning_image_column": "edges_file_name", "caption_column": "words"}
    pairs = load_pairs(Source(jsonl_for_train=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), **columns))
    assert contents(pairs) == [(IMAGES[0], CONDITIONS[0], "one\u2028two")]


def test_an_edited_parquet_file_is_read_anew(tmp_path):
    (tmp_path / "data").mkdir()
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        table(text=captions).to_parquet(tmp_path / "data" / "train.parquet")
        assert [
            pair.caption
            for pair in load_pairs(Source(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")))
        ] == captions


def test_an_edited_jsonl_file_is_read_anew(tmp_path):
    write_files(tmp_path)
    row = {"image": "images/0.png", "conditioning_image": "conditions/0.png"}
    for text in ("before", "after!"):
        path = write_lines(tmp_path / "a.jsonl", [{**row, "text": text}])
        assert load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(tmp_path / "cache")))[0].caption == text


# ---- what is left out, and names as people write them --------------------------------------------


def said(open_pairs=load_pairs, **arguments):
    lines = []
    open_pairs(Source(**arguments), say=lines.append)
    return [line.split(": ", 1)[1] for line in lines]


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_what_is_left_out_of_a_folder_is_said_once(tmp_path, open_pairs):
    folder = tmp_path / "pairs"
    as_folder(folder)
    arguments = {"train_data_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "images/._0.png").write_bytes(b"x")
    assert said(open_pairs, **arguments) == []
    (folder / "images/more.png").write_bytes(IMAGES[0])
    (folder / "clip.mp4").write_bytes(b"x")
    (folder / "metadata.csv").write_text("file_name,text\n")
    line = (folder / "metadata.jsonl").read_text().splitlines()[3]
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    assert said(open_pairs, **arguments) == [
        "1 lines of metadata.jsonl repeat an earlier line; each is a sample of its own",
        "2 files next to metadata.jsonl are not used: clip.mp4, metadata.csv",
        "1 images are not used, because metadata.jsonl does not name them: images/more.png",
    ]


def test_other_folders_than_train_are_named(tmp_path):
    for name in ("train", "test"):
        as_metadata_csv(tmp_path / "d" / name)
    assert said(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")) == [
        "only train/ is used, not test"
    ]


def test_folders_of_images_without_metadata_are_answered_with_how_to_write_it(tmp_path):
    write_files(tmp_path / "d")
    found = refusal(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert (
        "--conditioning_image_column: " in found
        and 'write metadata.jsonl with lines like {"file_name": ..., "conditioning_image_file_name"' in found
    )


def test_an_image_may_have_several_conditions_and_captions(tmp_path):
    """Lines of pairs are what is used, each as it is; nothing is to be said."""
    write_files(tmp_path)
    rows = [
        {"file_name": "images/0.png", "conditioning_image_file_name": f"conditions/{n}.png", "text": f"{text}"}
        for n in range(COUNT) for text in "ab"
    ]  # fmt: skip
    for number in range(1, COUNT):
        (tmp_path / f"images/{number}.png").unlink()
    write_lines(tmp_path / "metadata.jsonl", rows)
    assert said(train_data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "cache")) == []


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_files_that_the_library_does_not_read_are_named(tmp_path, open_pairs):
    (tmp_path / "d").mkdir()
    as_shards(tmp_path / "d")
    table(2).to_parquet(tmp_path / "d/train.parquet")
    found = said(open_pairs, train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert found == ["1 files are not used; those used end in .tar: train.parquet"]


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_a_line_of_csv_that_is_not_clear_is_named(tmp_path, open_pairs):
    write_files(tmp_path)
    lines = [
        "file_name,conditioning_image_file_name,text",
        "images/0.png,conditions/0.png,a cat, gray",
        "images/1.png,conditions/1.png",
    ]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    found = refusal(open_pairs, train_data_dir=str(tmp_path))
    assert (
        "2 lines of metadata.csv cannot be used" in found
        and "line 2: has 4 fields, the first line 3" in found
        and "line 3: has 2" in found
    )


def test_a_moved_file_is_found_again_under_its_new_name(tmp_path):
    """The copy of the rows in the cache holds paths: it is made anew when they change."""
    as_folder(tmp_path / "d")
    arguments = {"train_data_dir": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache")}
    assert contents(load_pairs(Source(**arguments))) == WANTED
    (tmp_path / "d/images/0.png").rename(tmp_path / "d/images/0.PNG")
    assert contents(load_pairs(Source(**arguments))) == WANTED


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_a_directory_that_is_not_utf8_is_refused(tmp_path, open_pairs):
    as_folder(tmp_path / "caf\udce9")
    assert "caf\\xe9 is not UTF-8" in refusal(open_pairs, train_data_dir=str(tmp_path / "caf\udce9"))
    assert "caf\\xe9/metadata.jsonl is not UTF-8" in refusal(
        open_pairs, jsonl_for_train=str(tmp_path / "caf\udce9/metadata.jsonl")
    )


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_long_cells_are_cut_in_messages(tmp_path, open_pairs):
    rows = [{"image": "x." * 50_000, "conditioning_image": "y." * 50_000, "text": ""}]
    assert len(refusal(open_pairs, jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))) < 2000
    rows = [{"image": ["x" * 100_000], "conditioning_image": "y", "text": ""}]
    assert len(refusal(open_pairs, jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))) < 2000


# ---- transparent and blank conditions ------------------------------------------------------------


def drawing(colour, seed=0):
    """A line on a transparent ground."""
    image = Image.new("RGBA", (16, 16))
    image.paste(colour, (2, seed % 12, 14, seed % 12 + 3))
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def drawn(folder, colours):
    table(len(colours), conditioning_image=[drawing(colour, n) for n, colour in enumerate(colours)]).to_parquet(
        folder / "train.parquet"
    )
    return Source(train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"))


WHITE, BLACK, RED = (255, 255, 255, 255), (0, 0, 0, 255), (255, 0, 0, 255)


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
            ["4 transparent condition images are put on black; on white 25% of their drawing would not be seen"],
        ),
        (
            [BLACK, WHITE, WHITE, WHITE],
            "white",
            ["4 transparent condition images are put on white, where 75% of", "3 of 4 conditions are blank, of one colour"],
        ),
    ],
    ids=["white", "black", "red", "red and white", "black and white"],
)
def test_all_transparent_conditions_are_laid_on_one_colour(tmp_path, capsys, streaming, colours, background, lines):
    """On black only where white would hide the drawings, all alike; the targets stay on white."""
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


def test_a_stream_looks_behind_its_beginning_for_transparent_conditions(tmp_path, capsys):
    """Twenty opaque conditions come first, one without an image and one that is none among them."""
    (tmp_path / "d").mkdir()
    conditions = [CONDITIONS[0], None, b"none", *[CONDITIONS[1]] * 17, *(drawing(WHITE, n) for n in range(20))]
    images = [IMAGES[n % COUNT] for n in range(40)]
    rows = {"image": images, "conditioning_image": conditions, "text": ["x"] * 40}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d/train.parquet")
    stream = PairStream(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert stream.background == "black"
    assert ", 30 pairs of its first 256 rows: 16 transparent condition images are put on black" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ["s3://b/a.png", "a\0b", "foo://x", "file://x\0y", "data:image/png;base64,%"])
@pytest.mark.parametrize("column, what", [("image", "image"), ("conditioning_image", "condition")])
def test_a_cell_that_cannot_be_read_is_named_when_the_stream_reaches_it(tmp_path, cell, column, what):
    rows = {"image": ["a.png"] * 2, "conditioning_image": ["a.png"] * 2, "text": ["x"] * 2}
    rows[column] = ["a.png", cell]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    pairs = iter(PairStream(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")), buffer_size=1))
    next(pairs)
    with pytest.raises(UserError, match=f"position 1 of the stream: its {what}: .*Fix the data set"):
        next(pairs)


def test_what_conditions_are_laid_on_tells_data_sets_apart(tmp_path):
    """Latents in the cache and the run's identity are of the pixels that are trained on."""
    (tmp_path / "d").mkdir()
    pairs = load_pairs(drawn(tmp_path / "d", [WHITE] * 2))
    black = preflight_pairs(pairs, 16, "--train_data_dir", False)
    assert pairs[0].condition.digest != black[0].condition.digest and pairs[0].image.digest == black[0].image.digest


def test_opaque_conditions_of_one_colour_are_named(tmp_path, capsys):
    flat = io.BytesIO()
    Image.new("RGB", (16, 16)).save(flat, "png")
    (tmp_path / "d").mkdir()
    table(3, conditioning_image=[CONDITIONS[0], flat.getvalue(), CONDITIONS[2]]).to_parquet(
        tmp_path / "d/train.parquet"
    )
    pairs = load_pairs(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert preflight_pairs(pairs, 16, "--train_data_dir", False) is pairs
    assert (
        capsys.readouterr().out
        == f"--train_data_dir: 1 of 3 condition images are blank, all pixels have the same colour: {tmp_path}/d[1]\n"
    )


# ---- preflight -----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Two good pairs and one of every kind of bad one."""
    good, torn = png(40, 32), png(200, 200)[:9000]
    images = [good, good, None, png(64, 64), torn, png(40, 31), good, png(32, 90)]
    conditions = [good, None, good, png(32, 32), good, png(40, 31), b"no picture", png(32, 90)]
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


def test_preflight_goes_on_without_bad_pairs_if_asked(mixed, capsys):
    good = preflight_pairs(mixed, 32, "--train_data_dir", True)
    assert [pair.caption for pair in good] == ["a", "h"]
    printed = capsys.readouterr().out
    assert "continuing without 6 of 8 pairs" in printed and all(problem in printed for problem in PROBLEMS.values())
    with pytest.raises(UserError, match="no usable pair is left"):
        preflight_pairs(mixed, 1000, "--train_data_dir", True)


def test_preflight_of_good_pairs_gives_them_all(mixed):
    pairs = mixed.select([0, 7])
    assert preflight_pairs(pairs, 32, "--train_data_dir", False) is pairs


def test_preflight_measures_a_picture_by_its_own_bucket(mixed):
    """The 32 x 90 picture must cover 80 x 32 (height x width), not the bucket for flat pictures; then 96 x 32, which it does not."""
    pairs = mixed.select([0, 7])
    assert preflight_pairs(pairs, [(32, 32), (80, 32)], "--train_data_dir", False) is pairs
    found = refusal(preflight_pairs, pairs=pairs, min_size=[(32, 32), (96, 32)], flag="--train_data_dir", skip_bad=False)
    assert "1 of 2 pairs" in found and "[7]: 32x90 is smaller than its bucket 96,32 (height,width)" in found


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [24, (16, 32), (33, 17)])
@pytest.mark.parametrize("u, flip", [(None, False), ((0.3, 0.9), False), ((0.99, 0.0), True)])
def test_target_and_condition_are_cropped_and_flipped_together(tmp_path, resolution, u, flip):
    """The condition is the target as another file and another format: the same pixels must come out, and flip must be seen."""
    picture = noise(51, 47)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.bmp")
    path = write_lines(tmp_path / "p.jsonl", [{"image": "a.png", "conditioning_image": "b.bmp", "text": ""}])
    pair = load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(tmp_path / "cache")))[0]
    image, condition = (pixel_values(sample.open(), resolution, "lanczos", u, flip) for sample in pair[:2])
    np.testing.assert_array_equal(image, condition)
    np.testing.assert_array_equal(image[:, :, ::-1], pixel_values(picture, resolution, "lanczos", u, not flip))


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [as_shards, as_folder, as_parquet, as_saved], ids=lambda form: form.__name__)
def test_a_stream_goes_on_from_every_position(sources, form):
    """Three passes and a bit: the tail from n is what the whole iteration gives from n on, also in the middle of the last pass."""
    stream = PairStream(Source(**sources[form]), seed=5, buffer_size=3, count=24)
    whole = list(stream)
    assert len(whole) == 24 and list(stream) == whole
    for start in range(26):
        assert list(stream.from_position(start)) == whole[start:]
    assert contents(stream.from_position(22)) == contents(whole[22:])


def test_a_stream_is_shuffled_anew_every_pass_and_by_its_seed(sources):
    def passes(**options):
        captions = [
            pair.caption
            for pair in PairStream(Source(**sources[as_parquet]), **{"count": 28, "buffer_size": 7, **options})
        ]
        return [captions[start : start + 7] for start in range(0, 28, 7)]

    found = passes(seed=1)
    assert all(sorted(each) == CAPTIONS for each in found) and len(set(map(tuple, found))) > 1
    assert passes(seed=1) == found != passes(seed=2)
    assert passes(seed=1, buffer_size=1) == [CAPTIONS] * 4


def test_a_stream_without_count_has_no_end(sources):
    stream = PairStream(Source(**sources[as_parquet]), seed=0)
    assert len(list(islice(stream, 100))) == 100


def test_iterating_twice_at_once_changes_neither(sources):
    stream = PairStream(Source(**sources[as_parquet]), seed=0, buffer_size=4, count=20)
    assert list(zip(stream, stream)) == [(pair, pair) for pair in stream]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_stream_pickles(sources, form):
    stream = PairStream(Source(**sources[form]), seed=1, buffer_size=3, count=10)
    assert contents(pickle.loads(pickle.dumps(stream))) == contents(stream)


def test_streamed_pictures_are_their_encoded_bytes(sources):
    pair = next(iter(PairStream(Source(**sources[as_folder]), seed=0)))
    assert isinstance(pair.image.source, bytes) and isinstance(pair.condition.source, bytes)
    assert pair.image.name == f"{sources[as_folder]['train_data_dir']}, position 0 of the stream"


@pytest.mark.parametrize("column, what", [("image", "image"), ("conditioning_image", "condition")])
def test_an_unpaired_picture_is_named_when_the_stream_reaches_it(tmp_path, column, what):
    """Passed over without a word when the stream starts behind it, as a resumed run does."""
    table(**{column: [*IMAGES[:3], None, *IMAGES[4:]]}).to_parquet(tmp_path / "train.parquet")
    stream = PairStream(Source(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")), buffer_size=1, count=7)
    pairs = iter(stream)
    assert [next(pairs).caption for _ in range(3)] == CAPTIONS[:3]
    with pytest.raises(UserError, match=f"position 3 of the stream: its {what}: missing.*Fix the data set"):
        next(pairs)
    assert [pair.caption for pair in stream.from_position(4)] == CAPTIONS[4:]


def test_a_stream_that_breaks_off_says_where(tmp_path):
    samples = shard(range(COUNT))
    samples["0006"]["txt"] = b"caf\xe9"
    write_tar(tmp_path / "0.tar", samples)
    stream = iter(PairStream(Source(train_data_dir=str(tmp_path)), buffer_size=1))
    with pytest.raises(UserError, match="cannot continue reading in pass 0: UnicodeDecodeError"):
        list(islice(stream, COUNT))


def one_pair(folder, image, condition="b.png", name="a.jsonl", **options):
    """The first pair of a .jsonl file of one line."""
    path = write_lines(folder / name, [{"image": image, "conditioning_image": condition, "text": ""}])
    return load_pairs(Source(jsonl_for_train=str(path), cache_dir=str(folder / "cache"), **options))[0]


def test_relative_paths_of_a_jsonl_file_are_taken_from_the_working_directory_too(tmp_path, monkeypatch):
    """Its own directory comes first; metadata that came with a folder may not name files elsewhere."""
    for place in ("lists", "pr"):
        (tmp_path / place).mkdir()
    (tmp_path / "pr/a.png").write_bytes(IMAGES[0])
    (tmp_path / "b.png").write_bytes(IMAGES[1])
    (tmp_path / "lists/b.png").write_bytes(IMAGES[2])
    monkeypatch.chdir(tmp_path)
    pair = one_pair(tmp_path / "lists", "pr/a.png")
    assert (pair.image.read(), pair.condition.read()) == (IMAGES[0], IMAGES[2])
    assert pair.image.name == str(tmp_path / "pr/a.png")
    write_lines(tmp_path / "lists/metadata.jsonl", [{"image": "pr/a.png", "conditioning_image": "b.png", "text": ""}])
    assert "lists/pr/a.png (line 1)" in refusal(train_data_dir=str(tmp_path / "lists"))


@pytest.mark.parametrize("open_pairs", [load_pairs, PairStream])
def test_absolute_paths_in_a_folders_own_metadata(tmp_path, open_pairs):
    (tmp_path / "d").mkdir()
    for place in ("d/a.png", "out.png"):
        (tmp_path / place).write_bytes(IMAGES[0])
    (tmp_path / "link").symlink_to(tmp_path / "d")
    lines = [{"image": str(tmp_path / d / "a.png"), "conditioning_image": "a.png", "text": ""} for d in ("d", "link")]
    write_lines(tmp_path / "d/metadata.jsonl", lines)
    pairs = open_pairs(Source(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")))
    assert [pair.image.read() for pair in islice(pairs, 2)] == [IMAGES[0]] * 2
    write_lines(tmp_path / "d/metadata.jsonl", [{**lines[0], "image": str(tmp_path / "out.png")}])
    assert "out.png is outside the directory" in refusal(open_pairs, train_data_dir=str(tmp_path / "d"))


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
def test_an_image_of_one_colour_is_short_in_base64(tmp_path, form):
    file = io.BytesIO()
    Image.new("L", (80, 80)).save(file, "png")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) < 200
    pair = one_pair(tmp_path, form.format(text), form.format(text))
    assert pair.image.read() == pair.condition.read() == file.getvalue()


def test_broken_base64_is_not_called_a_missing_file(tmp_path):
    text = base64.b64encode(png(64, 64)).decode()
    rows = [
        {"image": cell, "conditioning_image": text, "text": ""}
        for cell in (text[:201], text[:300] + "%" + text[300:], "data:image/png;base64,%" + text)
    ]
    found = refusal(jsonl_for_train=str(write_lines(tmp_path / "a.jsonl", rows)))
    assert found.count("is base64 that is damaged or truncated") == 3 and "missing" not in found and len(found) < 1200


def test_urls_of_files_and_in_capitals(tmp_path):
    (tmp_path / "a b#1.png").write_bytes(IMAGES[0])
    (tmp_path / "b.png").write_bytes(IMAGES[1])
    pair = one_pair(tmp_path, f"file://{tmp_path}/a%20b#1.png", f"FILE:{tmp_path}/b.png")
    assert (pair.image.read(), pair.condition.read()) == (IMAGES[0], IMAGES[1])
    assert one_pair(tmp_path, "HTTPS://Host/A.png").image.name == "https://Host/A.png"


def test_other_files_than_jsonl_are_told_where_they_go(tmp_path):
    as_parquet(tmp_path)
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    for name in ("train.parquet", "a.png"):
        found = refusal(jsonl_for_train=str(tmp_path / name))
        assert (
            f"{name}: not a text file. Give a .jsonl file with a line for every pair; give a directory of" in found
            and len(found) < 400
        )
    assert "is a directory. Give it as --train_data_dir" in refusal(jsonl_for_train=str(tmp_path))


def test_tab_separated_values(tmp_path):
    write_files(tmp_path)
    (tmp_path / "a.tsv").write_text("Image\tconditioning_image\tText\nimages/0.png\tconditions/0.png\ta, b\n")
    pairs = load_pairs(Source(jsonl_for_train=str(tmp_path / "a.tsv"), cache_dir=str(tmp_path / "cache")))
    assert contents(pairs) == [(IMAGES[0], CONDITIONS[0], "a, b")]


def test_files_that_metadata_use_are_not_called_unused(tmp_path):
    """Whatever their names end in; hidden images and those of linked folders that they do not name are said."""
    for name in ("d", "far"):
        (tmp_path / name).mkdir()
    for name in ("d/a.JPG_large", "d/a.mp4", "d/.z.png", "far/m.png", "d/notes.bin"):
        (tmp_path / name).write_bytes(IMAGES[0])
    (tmp_path / "d/more").symlink_to(tmp_path / "far")
    write_lines(tmp_path / "d/metadata.jsonl", [{"image": "a.JPG_large", "conditioning_image": "a.mp4", "text": ""}])
    assert said(train_data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache")) == [
        "1 files next to metadata.jsonl are not used: notes.bin",
        "2 images are not used, because metadata.jsonl does not name them: .z.png, more/m.png",
    ]
