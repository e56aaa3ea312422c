"""Flags of how images are checked, cropped and encoded."""

from __future__ import annotations

from mindtune.cli import UserError
from mindtune.data import buckets
from mindtune.data.crops import INTERPOLATIONS
from mindtune.flags.parser import Parser, Values


def images(parser: Parser, sample: str, multiple: int, smallest: int) -> None:
    """How images are checked, cropped and encoded. `sample` is the word for a sample in help lines: image or pair.

    --resolution must be a multiple of `multiple` and at least `smallest` pixels.
    """
    add = parser.add
    add("max_train_samples", type=int, minimum=1, help=f"Use only the first N {sample}s. Default: all.")
    add(
        "skip_bad_images",
        default=False,
        may_change=True,
        help=f"List {sample}s that cannot be used and train without them. Default: stop with an error.",
    )
    add(
        "verify_data",
        default=False,
        may_change=True,
        help="Decode every image and read every cache entry at the start. Default: only those that are new or changed.",
    )
    add(
        "validation_split",
        type=float,
        default=0.0,
        minimum=0,
        below=1,
        help=f"Fraction of the {sample}s held out of training for the held-out loss. 0: none.",
    )
    crops(parser, sample, multiple, smallest)
    add("center_crop", default=False, help="Crop at the center. Default: a new random crop each time an image is used.")
    add("random_flip", default=False, help="Flip images horizontally with probability 0.5.")
    add(
        "image_interpolation_mode",
        choices=sorted(INTERPOLATIONS),
        default="lanczos",
        help="Interpolation method for resizing.",
    )
    add(
        "cache_latents",
        default=False,
        help=f"Encode the center crop of every {sample} before training; with --random_flip also its flip.",
    )
    add(
        "encode_window",
        type=int,
        minimum=1,
        may_change=True,
        help="Number of updates whose data is encoded at a time. Default: all, or what --cache_limit_gb allows.",
    )
    add(
        "cache_limit_gb",
        type=float,
        above=0,
        may_change=True,
        help="Disk in GB for encoder outputs; more data is encoded in windows. Default: all, for a stream 50.",
    )
    add(
        "dataloader_num_workers",
        type=int,
        default=1,
        minimum=0,
        may_change=True,
        help="Number of threads that prepare batches. 0: the main thread does.",
    )


def crops(parser: Parser, sample: str, multiple: int, smallest: int) -> None:
    """The sizes that images are cropped to. The arguments are those of `images`."""
    add = parser.add
    add(
        "resolution",
        type=buckets.parse_resolution,
        default=512,
        help=f"Side of square crops in pixels, a multiple of {multiple}; with --auto_buckets also several: 512,768.",
    )
    add(
        "aspect_ratio_buckets",
        help=f'Instead of --resolution: sizes "height,width;height,width". A {sample} gets the nearest aspect ratio.',
    )
    add(
        "auto_buckets",
        default=False,
        help=f"Crop each {sample} to a size of its own aspect ratio with at most --resolution x --resolution pixels.",
    )
    add(
        "bucket_step",
        type=int,
        default=64,
        minimum=16,
        help="Sides of --auto_buckets are multiples of this, in pixels.",
    )
    add("bucket_max_ratio", type=float, default=2.0, minimum=1, help="Largest ratio of the sides of --auto_buckets.")
    add("bucket_max_side", type=int, minimum=16, help="Longest side of --auto_buckets in pixels. Default: no limit.")

    def check(args: Values) -> None:
        sides = buckets.resolutions(args.select(buckets.Settings))
        for side in sides:
            if side % multiple or side < smallest:
                nearest = max(smallest, round(side / multiple) * multiple)
                raise UserError(
                    f"--resolution {side}: must be divisible by {multiple} and at least {smallest}. "
                    f"The nearest is {nearest}."
                )
        if args.auto_buckets:
            _check_auto_buckets(args, sides)
            return
        for name, default in buckets.Settings._field_defaults.items():
            if name.startswith("bucket_") and getattr(args, name) != default:
                raise UserError(f"--{name} {getattr(args, name)}: needs --auto_buckets. Add it, or leave this out.")
        if len(sides) > 1:
            raise UserError(
                f"--resolution {','.join(map(str, sides))}: several need --auto_buckets. Add it, or give one."
            )

    parser.checks.append(check)


def _check_auto_buckets(args: Values, resolutions: list[int]) -> None:
    if len(resolutions) > 1 and getattr(args, "with_prior_preservation", False):
        raise UserError(
            "--with_prior_preservation with several values of --resolution: class images have one size. Give one."
        )
    if args.aspect_ratio_buckets:
        raise UserError("--auto_buckets with --aspect_ratio_buckets: leave one of the two out.")
    if args.bucket_step % 16:
        raise UserError(f"--bucket_step {args.bucket_step}: must be a multiple of 16, such as 64.")
    if args.bucket_max_side and args.bucket_step > args.bucket_max_side:
        raise UserError(
            f"--bucket_max_side {args.bucket_max_side}: is smaller than --bucket_step {args.bucket_step}. Give a "
            "larger side, or a step of 16."
        )
    if args.bucket_step > resolutions[0]:
        raise UserError(
            f"--bucket_step {args.bucket_step}: is larger than --resolution {resolutions[0]}. Give 16 or 32."
        )
