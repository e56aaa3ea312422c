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

from mindtune.cli import UserError, indented_list, printable, run_script, size_text
from mindtune.data import buckets
from mindtune.data.columns import Source, check_source
from mindtune.data.folders import holds_no_image, samples_in_folder
from mindtune.data.image_sample import Sample
from mindtune.data.pairs import Pairs, load_pairs
from mindtune.data.statistics import Item, cropped_shares, duplicates, inspect_images, inspect_pairs
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
    add("train_data_dir", help="Directory of pairs for a ControlNet.")
    add("jsonl_for_train", help="A .jsonl file of pairs.")
    add("dataset_name", help="A data set for the datasets library; of pairs if --conditioning_image_column is given.")
    add("dataset_config_name", help="Configuration of that data set. Default: its only one.")
    add("image_column", help="Column of images. Default: found by its name.")
    add("conditioning_image_column", help="Column of condition images. Default: found by its name.")
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
    """The checked items, by the name of their directory or data set, whether they are pairs, and notes on them."""

    is_pairs: bool
    groups: dict[str, list[Item]]
    notes: list[str]


def check_items(flags: dict, min_size: buckets.MinSize, cache_dir: str) -> Found:
    """Checks the images or pairs that the flags name. Raises UserError if they cannot be read at all."""
    return (check_images if is_images(flags) else check_pairs)(flags, min_size, cache_dir)


def is_images(flags: dict) -> bool:
    """Whether the flags name the images of a LoRA, and not pairs."""
    named = flags["instance_data_dir"] or (flags["dataset_name"] and not flags["conditioning_image_column"])
    return bool(named and not flags.get("pairs"))  # the form knows the script


def check_images(flags: dict, min_size: buckets.MinSize, cache_dir: str) -> Found:
    """Checks the images of a LoRA and its class images."""
    if others := [name for name in ("train_data_dir", "jsonl_for_train") if flags[name]]:
        raise UserError(f"--{others[0]}: holds pairs, but the other flags name images. Give one data set.")
    notes: list[str] = []
    threads = flags["dataloader_num_workers"]
    flag, samples = find_samples(flags, cache_dir, notes.append)
    name = flags[flag.lstrip("-")]
    for sample in samples:
        sample.mask = sample.mask if flags["masked_loss"] else None
    groups = {name: inspect_images(samples, min_size, threads, f"{flag} {printable(name)}", notes)}
    if folder := flags["class_data_dir"]:
        where = f"--class_data_dir {printable(folder)}"
        samples = class_samples(folder, where, notes)
        if flags["auto_buckets"]:  # class images have the sizes of the instance images
            sizes = cropped_shares(groups[name], buckets.Settings.of(flags))
            min_size = buckets.covering(list(sizes)) if sizes else min_size
        groups[folder] = inspect_images(samples, min_size, threads, where, notes)
    return Found(False, groups, notes)


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
    """Checks the pairs of a ControlNet."""
    notes: list[str] = []
    flag, pairs = find_pairs(flags, cache_dir, notes.append)
    name = flags[flag.lstrip("-")]
    items = inspect_pairs(pairs, min_size, flags["dataloader_num_workers"], f"{flag} {printable(name)}", notes)
    return Found(True, {name: items}, notes)


def find_pairs(flags: dict, cache_dir: str, say: Callable[[str], None]) -> tuple[str, Pairs]:
    """The flag that names the pairs of a ControlNet, and the pairs. `say` receives a line for everything not used."""
    source_flags = {name: flags[name] for name in Source._fields if name in flags and name != "cache_dir"}
    source = Source(**source_flags, cache_dir=cache_dir)
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
    sizes = bucket_report(items, crops_of_run)
    entries = EntrySizes.of_encoders(encoders, flags["mixed_precision"], flags["max_sequence_length"])
    encodes_conditions = found.is_pairs and encoders.kind == "flux"
    images_per_item = (1 + flags["random_flip"]) * (2 if encodes_conditions else 1)
    cache_sizes = {
        "text": entries.text * len({caption for _, caption in captions}),
        "latents": images_per_item
        * sum(bucket["pictures"] * entries.image((bucket["height"], bucket["width"])) for bucket in sizes),
    }
    return {
        "data": list(found.groups),
        # "pictures" here and in `bucket_report` is part of the file format.
        "kind": "pairs" if found.is_pairs else "pictures",
        "found": len(items),
        "usable": len(items) - len(problems),
        "can_start": not problems and (found.is_pairs or not without_caption),
        "problems": problems,
        "notes": found.notes,
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
        "buckets": sizes,
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


def bucket_report(items: list[Item], settings: buckets.Settings) -> list[dict]:
    """For every bucket the number of its items, and the mean and the largest of their `cropped_share`."""
    report = []
    for (height, width), shares in cropped_shares(items, settings).items():
        report.append(
            {
                "height": height,
                "width": width,
                "pictures": len(shares),
                "cropped_away_mean": sum(shares) / max(1, len(shares)),
                "cropped_away_most": max(shares, default=0.0),
            }
        )
    return report


def format_report(report: dict) -> str:
    """The report as text."""
    is_pairs = report["kind"] == "pairs"
    names = " and ".join(map(printable, report["data"]))
    lines = [f"{names}: {report['found']} {'pairs' if is_pairs else 'images'}, {report['usable']} usable"]
    lines += report["notes"]
    too_long = [
        f"{item['name']}: {item['tokens']} tokens, {item['encoder']} reads {item['limit']}"
        for item in report["captions_too_long"]
    ]
    sections = {
        "cannot be used": report["problems"],
        "identical files": [" = ".join(names) for names in report["duplicates"]],
        "without a caption" + ("" if is_pairs else ", and no prompt is given"): report["without_caption"],
        "captions that are truncated": too_long,
    }
    for title, items in sections.items():
        if items:
            lines += [f"{title}: {len(items)}", indented_list(items)]
    if report["tokens_counted_with"] is None:
        lines.append("tokens of captions: not counted without --pretrained_model_name_or_path")
    lines.append(f"{'height,width':14s} {'images':>8s}  {'cropped away':>12s}  {'at most':>7s}")
    for bucket in report["buckets"]:
        size = f"{bucket['height']},{bucket['width']}"
        mean = 100 * bucket["cropped_away_mean"]
        most = 100 * bucket["cropped_away_most"]
        lines.append(f"{size:14s} {bucket['pictures']:8d}  {mean:11.1f}%  {most:6.1f}%")
    text, latents = (size_text(report["cache_bytes"][what]) for what in ("text", "latents"))
    lines.append(f"disk for the cache ({report['cache_for']}): text {text}, with --cache_latents {latents} more")
    lines += report["shorter_captions"]
    free = report["free_bytes"]
    lines.append(f"free: {size_text(free)}" + (", too little" if sum(report["cache_bytes"].values()) > free else ""))
    lines.append("a run can start with this data" if report["can_start"] else "a run would not start with this data")
    return "\n".join(lines)


def main(argv: Optional[list[str]] = None) -> int:
    flags = parse_args(argv).recorded()
    require_writable("--cache_dir", flags["cache_dir"])
    if flags["json"]:
        require_writable("--json", Path(flags["json"]).absolute().parent)
    with tempfile.TemporaryDirectory() as folder:
        report = make_report(flags, flags["cache_dir"] or folder)
    print(format_report(report))
    if flags["json"]:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        # Bytes of names that are not UTF-8 are written as \\udce9, which is an escape of JSON too.
        Path(flags["json"]).write_text(text, encoding="utf-8", errors="backslashreplace")
    return 0 if report["can_start"] else 1


if __name__ == "__main__":
    run_script(main)
