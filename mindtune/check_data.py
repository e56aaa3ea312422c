"""A look at a data set before a run: what the training scripts would refuse, and what they would do with the rest.

    python -m mindtune.check_data --instance_data_dir photos --resolution 512
    python -m mindtune.check_data --train_data_dir pairs --aspect_ratio_buckets "512,512;448,576" --json report.json

Takes the scripts' flags for data and makes their checks, all problems at once, without loading a model; with
--pretrained_model_name_or_path it also counts captions in that pipeline's tokens. Nothing is changed; --json alone writes a file. Ends
with 0 if a run could start with this data and with 1 if not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from mindtune.cli import UserError, check_flags, listing, run, shown
from mindtune.data.buckets import crop_sizes, min_size, nearest_bucket
from mindtune.data.checks import Inspection, image_notes, usable
from mindtune.data.columns import Source
from mindtune.data.folders import holds_no_image, samples_in_folder
from mindtune.data.image_sample import Sample
from mindtune.data.order import prefetch
from mindtune.data.pair_checks import Notes, usable_pair
from mindtune.data.pairs import check_source_flags, load_pairs
from mindtune.data.tables import samples_in_dataset
from mindtune.files import require_writable

# FLUX.1-dev's: latent channels, pixels a latent, T5's and CLIP's width; tokens are --max_sequence_length.
FLUX_DEV = {"kind": "flux", "channels": 16, "factor": 8, "widths": [4096, 768]}


class Found(NamedTuple):
    """A picture or pair: its size (width, height) or what is wrong with it, a hash of its contents, and its caption."""

    name: str
    size: Union[tuple[int, int], str]
    digest: str
    caption: Optional[str]


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mindtune.check_data", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--instance_data_dir", help="Directory of images for a LoRA.")
    add("--class_data_dir", help="Directory of its class images, looked at too.")
    add("--train_data_dir", help="Directory of pairs for a ControlNet.")
    add("--jsonl_for_train", help="A .jsonl file of pairs.")
    add("--dataset_name", help="A data set for the datasets library; of pairs if --conditioning_image_column is given.")
    add("--dataset_config_name", help="Configuration of that data set. Default: its only one.")
    add("--image_column", help="Column of images. Default: found by its name.")
    add("--conditioning_image_column", help="Column of condition images. Default: found by its name.")
    add("--caption_column", help="Column of captions. Default: found by its name; of images for a LoRA none.")
    add("--instance_prompt", help="Prompt of images without a caption of their own.")
    add("--class_prompt", help="The same of class images.")
    add("--max_train_samples", type=int, help="Look at the first so many. Default: all.")
    add("--resolution", type=int, default=512, help="Side of the square that is trained on, in pixels.")
    add(
        "--aspect_ratio_buckets",
        help='Instead: heights and widths to choose from for every image, "672,1568;1024,1024".',
    )
    add("--random_flip", action="store_true", help="Count a cached latent for both sides of an image.")
    add(
        "--pretrained_model_name_or_path",
        help="Directory of the pipeline, for its tokenizers. Default: sizes of FLUX.1-dev.",
    )
    add("--max_sequence_length", type=int, default=512, help="T5 tokens of a caption.")
    add("--cache_dir", help="Where downloads of the datasets library are kept. Default: a temporary directory.")
    add("--dataloader_num_workers", type=int, default=2, help="Threads that read.")
    add("--json", help="Write the findings to this file too. Default: none.")
    return parser.parse_args(argv)


# ---- finding -------------------------------------------------------------------------------------


def found_pictures(
    samples: list[Sample], sizes: list[tuple[int, int]], threads: int, flag: str, notes: list[str]
) -> list[Found]:
    def one(place: int) -> tuple[Found, Inspection]:
        sample = samples[place]
        looked = usable(sample, min_size(sizes))
        digest = "" if isinstance(looked.size, str) else sample.digest
        return Found(sample.name, looked.size, digest, sample.caption), looked

    found = list(prefetch(one, range(len(samples)), threads))
    notes += image_notes(((item.name, looked) for item, looked in found), flag)
    return [item for item, _ in found]


def found_pairs(pairs: Any, sizes: list[tuple[int, int]], threads: int, flag: str, notes: list[str]) -> list[Found]:
    def one(place: int) -> tuple:
        pair = pairs[place]
        looked = usable_pair(pair, min_size(sizes))
        digest = "" if isinstance(looked.size, str) else pair.image.digest + pair.condition.digest
        return pair, looked, Found(pair.image.name, looked.size, digest, pair.caption)

    found, said = [], Notes()
    for pair, looked, item in prefetch(one, range(len(pairs)), threads):
        said.add(pair, looked)
        found.append(item)
    notes += said.lines(flag)
    return found


def look(
    flags: dict, sizes: list[tuple[int, int]], cache_dir: str, notes: list[str]
) -> tuple[str, dict[str, list[Found]]]:
    """ "pictures" or "pairs", and what each directory or data set holds; `notes` gets what a run would say of it.

    Raises UserError if it cannot be read at all.
    """
    threads, most = flags["dataloader_num_workers"], flags["max_train_samples"]
    if flags["instance_data_dir"] or (flags["dataset_name"] and not flags["conditioning_image_column"]):
        if others := [name for name in ("train_data_dir", "jsonl_for_train") if flags[name]]:
            raise UserError(f"--{others[0]}: holds pairs, the other flags name pictures. Give one data set.")
        if flags["instance_data_dir"] and flags["dataset_name"]:
            raise UserError("give either --instance_data_dir or --dataset_name, one of the two.")
        name = flags["instance_data_dir"] or flags["dataset_name"]
        if flags["instance_data_dir"]:
            flag, samples = (
                "--instance_data_dir",
                samples_in_folder(name, "--instance_data_dir", flags["caption_column"], notes.append),
            )
        else:
            columns = {column: flags[column] for column in ("image_column", "caption_column")}
            source = Source(name, flags["dataset_config_name"], cache_dir=cache_dir, **columns)
            flag, samples = "--dataset_name", samples_in_dataset(source, notes.append)
        groups = {name: found_pictures(samples[:most], sizes, threads, f"{flag} {shown(name)}", notes)}
        if folder := flags["class_data_dir"]:
            flag = f"--class_data_dir {shown(folder)}"
            if holds_no_image(Path(folder), "--class_data_dir"):
                notes.append(f"{flag}: no image yet; a run makes them")
                samples = []
            else:
                samples = samples_in_folder(folder, "--class_data_dir", say=notes.append)
            groups[folder] = found_pictures(samples, sizes, threads, flag, notes)
        return "pictures", groups
    check_source_flags({**flags, "proportion_empty_prompts": 0.0, "streaming": False})
    source = Source(**{name: flags[name] for name in Source._fields if name != "cache_dir"}, cache_dir=cache_dir)
    pairs = load_pairs(source, notes.append)
    pairs = pairs.select(range(min(most or len(pairs), len(pairs))))
    return "pairs", {source.name: found_pairs(pairs, sizes, threads, f"{source.flag} {shown(source.name)}", notes)}


# ---- what it means -------------------------------------------------------------------------------


def cropped_away(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Share of the area of a picture (width, height) that is left out when it just covers a bucket (height, width)."""
    scale = max(bucket[1] / size[0], bucket[0] / size[1])
    return 1.0 - bucket[0] * bucket[1] / (size[0] * scale * size[1] * scale)


def by_bucket(found: Iterable[Found], sizes: list[tuple[int, int]]) -> list[dict]:
    """Of every bucket its pictures and what cropping to it leaves out of them."""
    lost = [[] for _ in sizes]
    for size in (item.size for item in found if not isinstance(item.size, str)):
        number = nearest_bucket(size, sizes)
        lost[number].append(cropped_away(size, sizes[number]))
    return [
        {"height": height, "width": width, "pictures": len(shares), "cropped_away_mean": sum(shares) / max(1, len(shares)),
         "cropped_away_most": max(shares, default=0.0)}
        for (height, width), shares in zip(sizes, lost)
    ]  # fmt: skip


def duplicates(found: Iterable[Found]) -> list[list[str]]:
    """Names of pictures (pairs) with the same bytes, group by group."""
    groups = {}
    for item in found:
        if item.digest:
            groups.setdefault(item.digest, []).append(item.name)
    return [names for names in groups.values() if len(names) > 1]


def pipeline(name: Optional[str], cache_dir: Optional[str]) -> tuple[dict, dict]:
    """A pipeline's sizes, named as in FLUX_DEV, and its tokenizers by encoder. Without a name FLUX.1-dev's sizes and none."""
    if name is None:
        return FLUX_DEV, {}
    from mindtune.models import (  # import mindone, which the check of pictures alone does without
        configs,
        pipelines,
        tokenization,
    )

    root = pipelines.resolve_pipeline(name, None, None, cache_dir, {"vae": (), "text_encoder": ()}, weights=False)
    vae, clip = configs.read_config(root, "vae"), configs.read_config(root, "text_encoder")
    kind = "flux" if (root / "transformer").is_dir() else "sdxl" if (root / "text_encoder_2").is_dir() else "sd"
    sizes = {"kind": kind, "channels": vae["latent_channels"], "factor": 2 ** (len(vae["block_out_channels"]) - 1)}
    second = configs.read_config(root, "text_encoder_2") if kind != "sd" else {}
    sizes["widths"] = {
        "flux": lambda: [second["d_model"], clip["hidden_size"]],
        "sd": lambda: [clip["hidden_size"]],
        "sdxl": lambda: [clip["hidden_size"] + second["hidden_size"], second["projection_dim"]],
    }[kind]()
    folders = {
        "CLIP": "tokenizer",
        **({} if kind == "sd" else {"T5" if kind == "flux" else "the second CLIP": "tokenizer_2"}),
    }
    return sizes, {
        who: tokenization.load_tokenizer(root / folder) for who, folder in folders.items() if (root / folder).is_dir()
    }


def too_long(found: Iterable[Found], tokenizers: dict, t5_length: int) -> list[dict]:
    """Captions with more tokens than an encoder reads."""
    out = []
    for who, tokenizer in tokenizers.items():
        limit = t5_length if who == "T5" else tokenizer.model_max_length
        for item in found:
            tokens = len(tokenizer(item.caption or "", verbose=False).input_ids)
            if tokens > limit:
                out.append({"name": item.name, "encoder": who, "tokens": tokens, "limit": limit})
    return out


def cache_bytes(
    kind: str, sizes: dict, captions: set[str], buckets: list[dict], flips: int, t5_length: int
) -> dict[str, int]:
    """What the encode stage will keep: text states of every caption, and with --cache_latents the VAE's moments, all float32."""
    tokens = t5_length if sizes["kind"] == "flux" else 77
    text = 4 * len(captions) * (tokens * sizes["widths"][0] + sum(sizes["widths"][1:]))
    pictures = flips * (2 if kind == "pairs" and sizes["kind"] == "flux" else 1)
    area = sum(b["pictures"] * (b["height"] // sizes["factor"]) * (b["width"] // sizes["factor"]) for b in buckets)
    return {"text": text, "latents": 4 * pictures * 2 * sizes["channels"] * area}


def findings(flags: dict, cache_dir: str) -> dict:
    """Everything that there is to say, as JSON holds it."""
    sizes = crop_sizes(flags["aspect_ratio_buckets"], flags["resolution"])
    notes = []
    kind, groups = look(flags, sizes, cache_dir, notes)
    found = [item for group in groups.values() for item in group]
    problems = [f"{item.name}: {item.size}" for item in found if isinstance(item.size, str)]
    prompts = [
        Found(flag, "", "", flags[flag[2:]]) for flag in ("--instance_prompt", "--class_prompt") if flags[flag[2:]]
    ]
    own = {name: flags["class_prompt" if name == flags["class_data_dir"] else "instance_prompt"] for name in groups}
    captions = [(item.name, item.caption or own[name] or "") for name, group in groups.items() for item in group]
    bare = [name for name, caption in captions if not caption]
    model, length, shapes = (
        flags["pretrained_model_name_or_path"],
        flags["max_sequence_length"],
        by_bucket(found, sizes),
    )
    counted, tokenizers = pipeline(model, flags["cache_dir"])
    return {
        "data": list(groups), "kind": kind, "found": len(found), "usable": len(found) - len(problems),
        "can_start": not problems and not (bare and kind == "pictures"), "problems": problems, "notes": notes,
        "duplicates": duplicates(found),
        "without_caption": bare, "tokens_counted_with": model, "captions_too_long": too_long(found + prompts, tokenizers, length),
        "buckets": shapes, "cache_for": model or "FLUX.1-dev",
        "cache_bytes": cache_bytes(kind, counted, {caption for _, caption in captions}, shapes, 1 + flags["random_flip"], length),
    }  # fmt: skip


def table(report: dict) -> str:
    """The findings for people."""
    lines = [
        f"{' and '.join(map(shown, report['data']))}: {report['found']} {report['kind']}, {report['usable']} usable"
    ]

    def part(title: str, items: list[str]) -> None:
        if items:
            lines.extend([f"{title}: {len(items)}", listing(items)])

    lines += report["notes"]
    part("cannot be used", report["problems"])
    part("the same contents", [" = ".join(names) for names in report["duplicates"]])
    part(
        "without a caption" + (", and no prompt is given" if report["kind"] == "pictures" else ""),
        report["without_caption"],
    )
    long = [
        f"{item['name']}: {item['tokens']} tokens, {item['encoder']} reads {item['limit']}"
        for item in report["captions_too_long"]
    ]
    part("captions that are cut off", long)
    if report["tokens_counted_with"] is None:
        lines.append("tokens of captions: not counted without --pretrained_model_name_or_path")
    lines.append(f"{'height,width':14s} {'pictures':>8s}  {'cropped away':>12s}  {'at most':>7s}")
    for shape in report["buckets"]:
        away = f"{100 * shape['cropped_away_mean']:11.1f}%  {100 * shape['cropped_away_most']:6.1f}%"
        lines.append(f"{shape['height']},{shape['width']}".ljust(14) + f" {shape['pictures']:8d}  {away}")
    text, latents = (report["cache_bytes"][what] / 1e6 for what in ("text", "latents"))
    lines.append(
        f"disk for the cache ({report['cache_for']}): text {text:.1f} MB, with --cache_latents {latents:.1f} MB more"
    )
    lines.append("a run can start with this data" if report["can_start"] else "a run would not start with this data")
    return "\n".join(lines)


def main(argv: Optional[list[str]] = None) -> int:
    flags = vars(parse_args(argv))
    check_flags(flags, {}, {"max_train_samples": 1, "max_sequence_length": 1, "dataloader_num_workers": 0}, ())
    require_writable("--cache_dir", flags["cache_dir"])
    if flags["json"]:
        require_writable("--json", Path(flags["json"]).absolute().parent)
    with tempfile.TemporaryDirectory() as folder:
        report = findings(flags, flags["cache_dir"] or folder)
    print(table(report))
    if flags["json"]:
        # What is left of names that are not UTF-8 becomes \\udce9, an escape that JSON has too.
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        Path(flags["json"]).write_text(text, encoding="utf-8", errors="backslashreplace")
    return 0 if report["can_start"] else 1


if __name__ == "__main__":
    run(main)
