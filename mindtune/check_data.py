"""Checks a data set before a run: what the training scripts would refuse, and how they would use the rest.

    python -m mindtune.check_data --instance_data_dir photos --resolution 512
    python -m mindtune.check_data --train_data_dir pairs --aspect_ratio_buckets "512,512;448,576" --json report.json

Takes the data flags of the scripts and lists all problems at once, without loading a model. With
--pretrained_model_name_or_path it also counts the tokens of captions. It changes nothing and writes no file but that
of --json. The exit code is 0 if a run could start with this data, and 1 if not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from mindtune.cli import UserError, printable, run_script
from mindtune.data import buckets, check_report
from mindtune.data.columns import Source, check_source
from mindtune.data.condition_sizes import enlarged_note
from mindtune.data.folders import holds_no_image, samples_in_folder
from mindtune.data.image_sample import Sample
from mindtune.data.pairs import Pairs, load_pairs
from mindtune.data.statistics import Item, bucket_rows, duplicates, inspect_images, inspect_pairs
from mindtune.data.tables import samples_in_dataset
from mindtune.encode.estimate import EntrySizes, captions_too_long, read_encoders, shorter_captions
from mindtune.files import free_bytes, require_writable
from mindtune.flags.image_flags import crops
from mindtune.flags.parser import Parser, Values
from mindtune.models import hubs


def parse_args(argv: Optional[list[str]] = None) -> Values:
    parser = Parser(__doc__)
    parser.prog = "python -m mindtune.check_data"
    add = parser.add
    add("instance_data_dir", help="Directory of images for a LoRA.")
    add("class_data_dir", help="Directory of class images for a LoRA, checked too.")
    add("train_data_dir", help="Directory of pairs.")
    add(
        "task",
        choices=["controlnet", "kontext", "fill"],
        default="controlnet",
        help="What pairs are for: for kontext and fill a condition may be missing, for kontext have another size.",
    )
    add("jsonl_for_train", help="A .jsonl file of pairs.")
    add("dataset_name", help="A data set for the datasets library; of pairs if --conditioning_image_column is given.")
    add("dataset_config_name", help="Configuration of that data set. Default: its only one.")
    add("image_column", help="Column of images. Default: found by its name.")
    add("conditioning_image_column", "cond_image_column", help="Column of conditions. Default: found by its name.")
    add("caption_column", help="Column of captions. Default: for pairs found by its name; for images of a LoRA none.")
    add("instance_prompt", help="Prompt of images without a caption of their own.")
    add("class_prompt", help="Prompt of class images without a caption of their own.")
    add("masked_loss", default=False, help="Check the masks too: NAME.mask.png beside an image, or --mask_column.")
    add("mask_column", help="Column of masks. Default: none.")
    add("max_train_samples", type=int, minimum=1, help="Number of images or pairs to check. Default: all.")
    crops(parser, sample="image", multiple=8, smallest=16)
    add(
        "mixed_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        default="no",
        help="Dtype of the run, and so of the encoder cache.",
    )
    add("random_flip", default=False, help="Count the cached latents of mirrored images too.")
    add(
        "pretrained_model_name_or_path",
        help="Pipeline whose tokenizers count tokens. Default: none, with the sizes of FLUX.1-dev.",
    )
    add(
        "hub",
        choices=list(hubs.HUBS),
        default=hubs.default(),
        help="Where the pipeline of a hub id is. Default: MINDTUNE_HUB, or huggingface.",
    )
    add("max_sequence_length", type=int, default=512, minimum=1, help="T5 tokens of a caption.")
    add("cache_dir", help="Directory of the datasets library's downloads. Default: a temporary directory.")
    add("dataloader_num_workers", type=int, default=2, minimum=0, help="Threads that read images.")
    add("json", help="Write the report to this file too. Default: none.")
    return parser.parse_args(argv)


# ---- reading the data ----------------------------------------------------------------------------


class Found(NamedTuple):
    """The checked items, by the name of their directory or data set, and notes on them.

    `task` is --task if they are pairs, and "" if they are images of a LoRA. `where` starts a note.
    """

    task: str
    where: str
    groups: dict[str, list[Item]]
    notes: list[str]


def check_items(flags: dict, min_size: buckets.MinSize, cache_dir: str) -> Found:
    """Checks the images or pairs that the flags name. Raises UserError if they cannot be read at all."""
    return (check_images if is_images(flags) else check_pairs)(flags, min_size, cache_dir)


def is_images(flags: dict) -> bool:
    """Whether the flags name the images of a LoRA, and not pairs."""
    is_of_pairs = flags["conditioning_image_column"] or flags["task"] != "controlnet"
    named = flags["instance_data_dir"] or (flags["dataset_name"] and not is_of_pairs)
    return bool(named and not flags.get("pairs"))  # the form knows the script


def check_images(flags: dict, min_size: buckets.MinSize, cache_dir: str) -> Found:
    """Checks the images of a LoRA and its class images."""
    if others := [name for name in ("train_data_dir", "jsonl_for_train") if flags[name]]:
        raise UserError(f"--{others[0]}: holds pairs, but the other flags name images. Give one data set.")
    if flags["task"] != "controlnet":
        raise UserError(f"--task {flags['task']}: is for pairs, and --instance_data_dir holds images. Leave one out.")
    notes: list[str] = []
    threads = flags["dataloader_num_workers"]
    flag, samples = find_samples(flags, cache_dir, notes.append)
    name = flags[flag.lstrip("-")]
    for sample in samples:
        sample.mask = sample.mask if flags["masked_loss"] else None
    where = f"{flag} {printable(name)}"
    groups = {name: inspect_images(samples, min_size, threads, where, notes)}
    if folder := flags["class_data_dir"]:
        class_flag = f"--class_data_dir {printable(folder)}"
        samples = class_samples(folder, class_flag, notes)
        if flags["auto_buckets"]:  # class images have the sizes of the instance images
            rows, _ = bucket_rows(groups[name], buckets.Settings.of(flags))
            min_size = buckets.covering([row.size for row in rows]) if rows else min_size
        groups[folder] = inspect_images(samples, min_size, threads, class_flag, notes)
    return Found("", where, groups, notes)


def find_samples(flags: dict, cache_dir: str, say: Callable[[str], None]) -> tuple[str, list[Sample]]:
    """The flag that names the images of a LoRA, and the images. `say` receives a line for everything not used."""
    if flags["instance_data_dir"] and flags["dataset_name"]:
        raise UserError("give either --instance_data_dir or --dataset_name, not both.")
    if flags["instance_data_dir"]:
        flag = "--instance_data_dir"
        samples = samples_in_folder(flags["instance_data_dir"], flag, flags["caption_column"], say)
    else:
        flag = "--dataset_name"
        source = Source(
            dataset_name=flags["dataset_name"],
            dataset_config_name=flags["dataset_config_name"],
            cache_dir=cache_dir,
            image_column=flags["image_column"],
            caption_column=flags["caption_column"],
            conditioning_image_column=flags["mask_column"],
            hub=flags["hub"],
        )
        samples = samples_in_dataset(source, say)
    return flag, samples[: flags["max_train_samples"]]


def class_samples(folder: str, where: str, notes: list[str]) -> list[Sample]:
    """The class images of a folder, none if it is missing or has no image."""
    if holds_no_image(Path(folder), "--class_data_dir"):
        notes.append(f"{where}: no image yet; a run generates them")
        return []
    return samples_in_folder(folder, "--class_data_dir", say=notes.append)


def check_pairs(flags: dict, min_size: buckets.MinSize, cache_dir: str) -> Found:
    """Checks pairs by the rules of --task."""
    notes: list[str] = []
    flag, pairs = find_pairs(flags, cache_dir, notes.append)
    name, task = flags[flag.lstrip("-")], flags["task"]
    where = f"{flag} {printable(name)}"
    items = inspect_pairs(pairs, min_size, flags["dataloader_num_workers"], where, notes, task == "kontext")
    return Found(task, where, {name: items}, notes)


def find_pairs(flags: dict, cache_dir: str, say: Callable[[str], None]) -> tuple[str, Pairs]:
    """The flag that names the pairs, and the pairs. `say` receives a line for everything not used."""
    source_flags = {name: flags[name] for name in Source._fields if name in flags and name != "cache_dir"}
    source = Source(**source_flags, cache_dir=cache_dir, condition_optional=flags["task"] != "controlnet")
    check_source(source)
    pairs = load_pairs(source, say)
    count = min(flags["max_train_samples"] or len(pairs), len(pairs))
    return source.flag, pairs.select(range(count))


# ---- the report ----------------------------------------------------------------------------------


def make_report(flags: dict, cache_dir: str) -> dict:
    """The report, as --json writes it."""
    crops_of_run = buckets.Settings.of(flags)
    found = check_items(flags, buckets.min_size(crops_of_run), cache_dir)
    items = [item for group in found.groups.values() for item in group]
    problems = [f"{item.name}: {item.problem}" for item in items if item.problem]
    captions = used_captions(flags, found)
    without_caption = [name for name, caption in captions if not caption]
    model = flags["pretrained_model_name_or_path"]
    encoders = read_encoders(model, flags["cache_dir"], flags["hub"])
    prompts = [(f"--{name}", flags[name]) for name in ("instance_prompt", "class_prompt") if flags[name]]
    own_captions = [(item.name, item.caption or "") for item in items]
    rows, enlarged = bucket_rows(items, crops_of_run, found.task == "kontext")
    entries = EntrySizes.of_encoders(encoders, flags["mixed_precision"], flags["max_sequence_length"])
    latents = latent_bytes(rows, found.task if encoders.kind == "flux" else "", entries)
    cache_sizes = {
        "text": entries.text * len({caption for _, caption in captions}),
        "latents": (1 + flags["random_flip"]) * latents,
    }
    return {
        "data": list(found.groups),
        # "pictures" here and in `check_report.bucket` is part of the file format.
        "kind": "pairs" if found.task else "pictures",
        "found": len(items),
        "usable": len(items) - len(problems),
        "without_condition": sum(not (item.problem or item.condition_size) for item in items) if found.task else 0,
        "can_start": not problems and bool(found.task or not without_caption),
        "problems": problems,
        "notes": found.notes + enlarged_note(enlarged, found.where),
        "duplicates": duplicates(items),
        "without_caption": without_caption,
        "tokens_counted_with": model,
        "captions_too_long": captions_too_long(
            own_captions + prompts, encoders.tokenizers, flags["max_sequence_length"]
        ),
        "shorter_captions": shorter_captions(
            [caption for _, caption in captions],
            encoders.tokenizers["T5"],
            flags["max_sequence_length"],
            cache_sizes["text"],
        )
        if "T5" in encoders.tokenizers
        else [],
        "buckets": [check_report.bucket(row, found.task) for row in rows],
        "cache_for": model or "FLUX.1-dev",
        "cache_bytes": cache_sizes,
        "free_bytes": free_bytes(Path(flags["cache_dir"] or ".")),
    }


def used_captions(flags: dict, found: Found) -> list[tuple[str, str]]:
    """(name, caption) of every item, with the prompt of its directory if it has no caption of its own."""
    captions = []
    for name, group in found.groups.items():
        prompt = flags["class_prompt"] if name == flags["class_data_dir"] else flags["instance_prompt"]
        captions += [(item.name, item.caption or prompt or "") for item in group]
    return captions


def latent_bytes(rows: list[buckets.Row], task: str, entries: EntrySizes) -> int:
    """Bytes of the cached latents of all images, and for a ControlNet and for Kontext of their conditions."""
    total = 0
    for row in rows:
        condition = {"controlnet": row.size, "kontext": row.condition}.get(task)
        total += row.count * sum(entries.image(size) for size in (row.size, condition) if size)
    return total


def main(argv: Optional[list[str]] = None) -> int:
    flags = parse_args(argv).recorded()
    require_writable("--cache_dir", flags["cache_dir"])
    if flags["json"]:
        require_writable("--json", Path(flags["json"]).absolute().parent)
    with tempfile.TemporaryDirectory() as folder:
        report = make_report(flags, flags["cache_dir"] or folder)
    print(check_report.format_report(report))
    if flags["json"]:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        # Bytes of names that are not UTF-8 are written as \\udce9, which is an escape of JSON too.
        Path(flags["json"]).write_text(text, encoding="utf-8", errors="backslashreplace")
    return 0 if report["can_start"] else 1


if __name__ == "__main__":
    run_script(main)
