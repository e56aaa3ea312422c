"""A data set of three images with captions in every supported form, and helpers that read it."""

import base64
import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from mindtune.data.columns import Source
from mindtune.data.tables import samples_in_dataset

from .image_files import png

CELLS = [{"bytes": png(seed=number), "path": f"{number}.png"} for number in range(3)]


WORDS = ["one", None, "three"]


def typed():
    return datasets.Dataset.from_dict({"image": CELLS, "text": WORDS}).cast_column("image", datasets.Image())


def as_parquet(folder):
    typed().to_parquet(folder / "train.parquet")


def as_parquet_of_plain_structs(folder):
    pq.write_table(pa.table({"image": pa.array(CELLS), "text": WORDS}), folder / "train.parquet")


def as_parquet_of_bytes(folder):
    pq.write_table(pa.table({"image": [cell["bytes"] for cell in CELLS], "text": WORDS}), folder / "train.parquet")


def as_parquet_of_base64(folder):
    pq.write_table(
        pa.table({"image": [base64.b64encode(cell["bytes"]).decode() for cell in CELLS], "text": WORDS}),
        folder / "a.parquet",
    )


def as_parquet_of_paths(folder):
    (folder / "images").mkdir()
    for number in range(3):
        (folder / f"images/{number}.png").write_bytes(png(seed=number))
    pq.write_table(
        pa.table({"image": [f"images/{number}.png" for number in range(3)], "text": WORDS}), folder / "train.parquet"
    )


def as_saved(folder):
    typed().save_to_disk(folder)


def as_saved_with_splits(folder):
    datasets.DatasetDict({"test": typed().select([0]), "train": typed()}).save_to_disk(folder)


def as_arrow(folder):
    typed().save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).rename(folder / "data.arrow")
    for path in (folder / "saved").iterdir():
        path.unlink()


def as_shard(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(3):
            for ending, content in (("png", png(seed=number)), ("txt", (WORDS[number] or "").encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def as_csv(folder):
    as_parquet_of_paths(folder)
    (folder / "train.parquet").unlink()
    (folder / "metadata.csv").write_text(
        "".join(
            f"{a},{b or ''}\n" for a, b in zip(["file_name", *[f"images/{n}.png" for n in range(3)]], ["text", *WORDS])
        )
    )


FORMS = [value for name, value in list(globals().items()) if name.startswith("as_")]


def read_dataset(folder, cache, image_column=None, caption_column=None):
    return samples_in_dataset(
        Source(str(folder), cache_dir=str(cache), image_column=image_column, caption_column=caption_column)
    )


def notes_on_images(folder, **options):
    lines = []
    samples_in_dataset(Source(str(folder), cache_dir=str(folder.parent / "cache"), **options), lines.append)
    return lines
