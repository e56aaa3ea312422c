"""Reads folders of images for the tests."""

import json

from mindtune.data.folders import samples_in_folder


def captions(folder, **options):
    return {sample.name: sample.caption for sample in samples_in_folder(str(folder), "--instance_data_dir", **options)}


def found(folder, **options):
    """({name: caption} of the samples, the lines passed to `say`)."""
    said = []
    samples = samples_in_folder(str(folder), "--instance_data_dir", say=said.append, **options)
    return {sample.name: sample.caption for sample in samples}, said


BARE = {"a.png": None, "b.jpg": None}


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(dict(zip(("file_name", "text"), row))) + "\n" for row in rows)
    )
