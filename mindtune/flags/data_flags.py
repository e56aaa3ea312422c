"""Flags of the data: pairs of images, and images with captions."""

from __future__ import annotations

from pathlib import Path

from mindtune.cli import UserError
from mindtune.data import metadata
from mindtune.data.columns import Source, check_hub, check_source
from mindtune.flags.parser import Parser, Values


def dataset(parser: Parser, image: str) -> None:
    """A data set that the datasets library reads. `image` describes the default of --image_column."""
    add = parser.add
    add("dataset_name", may_change=True, help="Hub id or directory of a data set that the datasets library can load.")
    add("dataset_config_name", help="Configuration of the data set. Default: the only one it has.")
    add("image_column", help=f"Column of the images. Default: {image}.")


def pairs(
    parser: Parser, conditions: str = "condition images", without: str = "", aliases: tuple[str, ...] = ()
) -> None:
    """Pairs of an image and a condition image, from one of three sources, loaded or streamed.

    `conditions` is the word for condition images in help lines. `without` says what a pair without one is used for, if
    that is allowed. `aliases` are further names of --conditioning_image_column.
    """
    keys = "image, text and perhaps conditioning_image" if without else "image, conditioning_image (paths) and text"
    add = parser.add
    parser.section("data")
    dataset(parser, image="image, or the first image column")
    add(
        "train_data_dir",
        may_change=True,
        help="Instead of --dataset_name: a directory of images with metadata, or of parquet, arrow or .tar files.",
    )
    add(
        "jsonl_for_train",
        may_change=True,
        help=f"Instead of --dataset_name: a .jsonl file whose lines have {keys}.",
    )
    add(
        "conditioning_image_column",
        *aliases,
        help=f"Column of the {conditions}{without and f'; {without}'}. Default: the first that starts with condition.",
    )
    add("caption_column", help="Column of the captions. Default: text, caption or prompt.")
    add("streaming", default=False, help="Read the data set during training, not before it. Needs --max_train_steps.")
    add("shuffle_buffer_size", type=int, default=1000, minimum=1, help="Size of the shuffle buffer of --streaming.")
    add(
        "proportion_empty_prompts",
        type=float,
        default=0.0,
        minimum=0,
        help="Probability of an empty caption instead of the pair's own, drawn each time a pair is used.",
    )
    tags(parser)
    parser.checks.append(_check_pairs)


def _check_pairs(args: Values) -> None:
    check_source(args.select(Source))
    if args.proportion_empty_prompts > 1.0:
        raise UserError(f"--proportion_empty_prompts {args.proportion_empty_prompts}: must be between 0 and 1.")
    if args.streaming and not args.max_train_steps:
        raise UserError("--streaming needs --max_train_steps: the length of a stream is not known.")
    for name in ("max_train_samples", "validation_split", "aspect_ratio_buckets", "auto_buckets", "skip_bad_images"):
        if args.streaming and getattr(args, name):
            raise UserError(f"--{name} with --streaming: needs all pairs before training; leave one of the two out.")


def tags(parser: Parser) -> None:
    """Captions that are lists of tags."""
    add = parser.add
    add("shuffle_tags", default=False, help="Shuffle the tags of a caption, which commas separate, for each use.")
    add("keep_tags", type=int, default=0, minimum=0, help="With --shuffle_tags, keep the first N tags in place.")
    add(
        "tag_orders", type=int, default=8, minimum=2, help="With --shuffle_tags, the number of orders that are encoded."
    )

    def check(args: Values) -> None:
        for name, default in (("keep_tags", 0), ("tag_orders", 8)):
            if getattr(args, name) != default and not args.shuffle_tags and not getattr(args, "dataset_config", None):
                raise UserError(f"--{name} {getattr(args, name)}: needs --shuffle_tags. Add it, or leave this out.")

    parser.checks.append(check)


def instance_images(parser: Parser) -> None:
    """Images of a subject with captions, in a directory or a data set."""
    add = parser.add
    parser.section("data")
    add(
        "instance_data_dir",
        may_change=True,
        help="Directory of instance images; captions in metadata.jsonl, metadata.csv or a .txt file per image.",
    )
    add(
        "dataset_config",
        may_change=True,
        help="Instead: a TOML file with several folders or data sets; docs/flux_lora.md describes it.",
    )
    dataset(parser, image="the first image column")
    add("caption_column", help="Column of the captions. Default: text in a metadata file, none in a data set.")
    add("instance_prompt", help="Caption of images without one; contains a rare word for the subject, such as sks.")
    add("trigger_word", help="Word that is put before each caption that does not contain it. Default: none.")
    add(
        "caption_dropout",
        type=float,
        default=0.0,
        minimum=0,
        below=1,
        help="Probability of an empty caption, drawn each time an image is used.",
    )
    tags(parser)
    add(
        "masked_loss",
        default=False,
        help="Weight the loss by masks: NAME.mask.png beside an image, --mask_column, or its transparency.",
    )
    add("mask_column", help="Column of the masks in a data set. Default: none.")
    add(
        "unmasked_weight",
        type=float,
        default=0.0,
        minimum=0,
        below=1,
        help="With --masked_loss, the weight of the loss where the mask is black.",
    )
    add("repeats", type=int, default=1, minimum=1, help="Number of times every image is used per epoch.")
    parser.checks.append(_check_instance_images)


def _check_instance_images(args: Values) -> None:
    if sum(map(bool, (args.instance_data_dir, args.dataset_name, args.dataset_config))) != 1:
        raise UserError(
            "give one of --instance_data_dir (a directory of images), --dataset_name and --dataset_config, only one."
        )
    check_hub(args.dataset_name, args.hub)
    if args.trigger_word is not None and not args.trigger_word.strip():
        raise UserError("--trigger_word: is empty. Give a word, or leave it out.")
    if (args.mask_column or args.unmasked_weight) and not (args.masked_loss or args.dataset_config):
        raise UserError("--mask_column and --unmasked_weight need --masked_loss. Add it, or leave them out.")
    in_file = (
        "dataset_config_name",
        "image_column",
        "mask_column",
        "class_data_dir",
        "class_prompt",
        "max_train_samples",
    )
    for name in in_file if args.dataset_config else ():
        if getattr(args, name):
            raise UserError(
                f"--{name} with --dataset_config: write {name} into the file, for the concept it belongs to."
            )
    if args.dataset_name or args.dataset_config:
        return
    for name in ("dataset_config_name", "image_column", "mask_column"):
        if getattr(args, name):
            raise UserError(f"--{name} {getattr(args, name)}: needs --dataset_name; leave it out.")
    folder = Path(args.instance_data_dir)
    if args.caption_column and folder.is_dir() and not metadata.metadata_file(folder):
        raise UserError(f"--caption_column {args.caption_column}: {folder} has no metadata.jsonl or metadata.csv.")


def prior_preservation(parser: Parser) -> None:
    """Prior preservation and its class images."""
    add = parser.add
    parser.section("prior preservation")
    add(
        "with_prior_preservation",
        default=False,
        help="Also train on images of the class, so that the model does not forget the class.",
    )
    add(
        "class_data_dir",
        may_change=True,
        help="Directory of the class images; the base model generates those that are missing.",
    )
    add("class_prompt", help="Prompt to generate class images, and caption of those without one.")
    add("num_class_images", type=int, default=100, minimum=1, help="Number of class images.")
    add("prior_loss_weight", type=float, default=1.0, help="Weight of the loss on class images.")
    add(
        "sample_batch_size",
        type=int,
        default=4,
        minimum=1,
        may_change=True,
        help="Batch size for generating class images.",
    )
    add(
        "prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        may_change=True,
        help="Dtype for generating class images. Default: the dtype of --mixed_precision.",
    )
    parser.checks.append(_check_prior_preservation)


def _check_prior_preservation(args: Values) -> None:
    if args.class_prompt and not args.class_data_dir:
        raise UserError("--class_prompt without --class_data_dir: name a directory for the class images.")
    if args.with_prior_preservation and not args.dataset_config and not (args.class_data_dir and args.class_prompt):
        raise UserError("--with_prior_preservation needs --class_data_dir and --class_prompt.")
    if args.class_data_dir and not args.with_prior_preservation:
        print("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
