"""A data set of pairs in every supported form, and helpers that read it."""

import base64
import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindtune.cli import UserError
from mindtune.data.columns import Source
from mindtune.data.pair_stream import PairStream
from mindtune.data.pairs import load_pairs

from .image_files import png

COUNT = 7


IMAGES = [png(seed=number) for number in range(COUNT)]


CONDITIONS = [png(seed=100 + number) for number in range(COUNT)]


CAPTIONS = [f"caption {number}" for number in range(COUNT)]


WANTED = list(zip(IMAGES, CONDITIONS, CAPTIONS))


def contents(pairs):
    return [(pair.image.read(), pair.condition and pair.condition.read(), pair.caption) for pair in pairs]


def table(count=COUNT, **columns):
    """A data set of encoded images. An argument replaces a column; None removes it."""
    columns = {"image": IMAGES, "conditioning_image": CONDITIONS, "text": CAPTIONS, **columns}
    found = datasets.Dataset.from_dict({name: cells[:count] for name, cells in columns.items() if cells})
    for name in found.column_names:
        if any(isinstance(cell, bytes) for cell in columns[name]):
            found = found.cast_column(name, datasets.Image())
    return found


def as_parquet(folder):
    table().to_parquet(folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def as_parquet_of_plain_structs(folder):
    """As other programs write it: without the datasets library's note that the structs are images."""
    plain = (
        table()
        .cast_column("image", datasets.Image(decode=False))
        .cast_column("conditioning_image", datasets.Image(decode=False))
    )
    pq.write_table(plain.data.table.replace_schema_metadata(None), folder / "train.parquet")
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
    for kind, cells in (("images", IMAGES), ("conditions", CONDITIONS)):
        (folder / kind).mkdir(parents=True)
        for number, cell in enumerate(cells):
            (folder / kind / f"{number}.png").write_bytes(cell)


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
    """The form that the imagefolder of the datasets library reads."""
    return as_folder(folder, "train")


def as_jsonl(folder):
    """Relative and absolute paths, with pairs.jsonl outside the images' folder."""
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
    pq.write_table(pa.table(dict(zip(names, (*columns, CAPTIONS)))), folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def as_parquet_of_relative_paths(folder):
    write_files(folder)
    columns = [f"images/{n}.png" for n in range(COUNT)], [f"conditions/{n}.png" for n in range(COUNT)]
    names = ["image", "conditioning_image", "text"]
    pq.write_table(pa.table(dict(zip(names, (*columns, CAPTIONS)))), folder / "train.parquet")
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


# ---- pairs without a condition -------------------------------------------------------------------

# The library takes the columns of .tar shards from the first one, of 4 samples.
LACKING = (4, 6)


SOME_CONDITIONS = [None if number in LACKING else cell for number, cell in enumerate(CONDITIONS)]


SOME_WANTED = list(zip(IMAGES, SOME_CONDITIONS, CAPTIONS))


def some_as_parquet(folder):
    table(conditioning_image=SOME_CONDITIONS).to_parquet(folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def some_as_parquet_of_plain_structs(folder):
    """An empty struct and a null."""
    cells = [cell and {"bytes": cell, "path": "any.png"} for cell in SOME_CONDITIONS]
    cells[LACKING[0]] = {"bytes": None, "path": ""}
    columns = {"image": [{"bytes": cell, "path": None} for cell in IMAGES], "conditioning_image": cells}
    pq.write_table(pa.table({**columns, "text": CAPTIONS}), folder / "train.parquet")
    return {"dataset_name": str(folder)}


def some_as_saved(folder):
    table(conditioning_image=SOME_CONDITIONS).save_to_disk(folder)
    return {"train_data_dir": str(folder)}


def some_as_parquet_of_bytes(folder):
    columns = {"image": IMAGES, "conditioning_image": SOME_CONDITIONS, "text": CAPTIONS}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def some_as_parquet_in_base64(folder):
    """An empty text and a null, in the type of texts that newer programs write."""
    conditions = [cell and base64.b64encode(cell).decode() for cell in SOME_CONDITIONS]
    conditions[LACKING[1]] = ""
    columns = {"image": IMAGES, "conditioning_image": pa.array(conditions, pa.large_string()), "text": CAPTIONS}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return {"train_data_dir": str(folder)}


def some_rows(folder, image="file_name", condition="conditioning_image_file_name"):
    """The first of the rows without a condition lacks the key, the second one has null."""
    write_files(folder)
    rows = [{image: f"images/{n}.png", condition: f"conditions/{n}.png", "text": CAPTIONS[n]} for n in range(COUNT)]
    del rows[LACKING[0]][condition]
    rows[LACKING[1]][condition] = None
    for number in LACKING:
        (folder / f"conditions/{number}.png").unlink()
    return rows


def some_as_folder(folder):
    write_lines(folder / "metadata.jsonl", some_rows(folder))
    return {"train_data_dir": str(folder)}


def some_as_jsonl(folder):
    rows = some_rows(folder, "image", "conditioning_image")
    return {"jsonl_for_train": str(write_lines(folder / "pairs.jsonl", rows))}


def some_as_metadata_csv(folder):
    keys = ["file_name", "conditioning_image_file_name", "text"]
    rows = [[row.get(key) or "" for key in keys] for row in some_rows(folder)]
    (folder / "metadata.csv").write_text("\n".join(",".join(row) for row in [keys, *rows]))
    return {"train_data_dir": str(folder)}


def some_as_shards(folder):
    samples = shard(range(COUNT))
    for number in LACKING:
        del samples[f"{number:04d}"]["conditioning.png"]
    names = list(samples)
    write_tar(folder / "0.tar", {name: samples[name] for name in names[:4]})
    write_tar(folder / "1.tar", {name: samples[name] for name in names[4:]})
    return {"train_data_dir": str(folder)}


SOME_FORMS = [value for name, value in list(globals().items()) if name.startswith("some_as_")]


def refusal(call=load_pairs, **arguments):
    """The message of the UserError that `call` raises for a `Source` with these arguments, or for the arguments."""
    with pytest.raises(UserError) as error:
        call(Source(**arguments)) if call in (load_pairs, PairStream) else call(**arguments)
    return str(error.value)


def notes_on_pairs(open_pairs=load_pairs, **arguments):
    lines = []
    open_pairs(Source(**arguments), say=lines.append)
    return [line.split(": ", 1)[1] for line in lines]


WHITE, BLACK, RED = (255, 255, 255, 255), (0, 0, 0, 255), (255, 0, 0, 255)


def drawing(colour, seed=0):
    """A line on a transparent background."""
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
