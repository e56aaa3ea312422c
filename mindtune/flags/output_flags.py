"""Flags of what a run writes and of its validation."""

from __future__ import annotations

from typing import Any

from mindtune.cli import UserError
from mindtune.flags.parser import NO_EFFECT, Parser, Values


def output(parser: Parser, output_dir: str) -> None:
    """What a run writes, and resuming it."""
    parser.section("output")

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add("output_dir", default=output_dir, help="Directory for everything that the run writes.")
    add(
        "overwrite_output_dir",
        default=False,
        help="Delete the files of an earlier run in --output_dir. Default: stop with an error.",
    )
    add("checkpointing_steps", type=int, default=500, minimum=1, help="Number of updates between checkpoints.")
    add("checkpoints_total_limit", type=int, minimum=1, help="Keep only the newest N checkpoints. Default: all.")
    add(
        "resume_from_checkpoint",
        help="Checkpoint to resume from: latest, a name in --output_dir, or a path. Default: a new run.",
    )
    add("logging_dir", default="logs", help="Directory of the TensorBoard files, inside --output_dir.")
    add(
        "report_to",
        choices=["tensorboard", "wandb", "swanlab", "all", "none"],
        default="tensorboard",
        help="Logging service, besides metrics.jsonl. all: every one that is installed and logged in.",
    )
    add("push_to_hub", default=False, help="Upload the result and a model card to --hub at the end.")
    add(
        "hub_token",
        help="Token with write access, never written. Default: HF_TOKEN or MODELSCOPE_API_TOKEN, or the last login.",
    )
    add("hub_model_id", help="Repository to upload to. Default: the name of --output_dir, in your account.")
    add("dry_run", default=False, help="Print the memory plan and stop. Reads configs only and writes nothing.")
    add(
        "device_memory_gb",
        type=float,
        default=64,
        minimum=1,
        help="Device memory in GB that --dry_run and --fit compare the plan with, such as 32 or 64 on Ascend.",
    )


def validation(parser: Parser, num_inference_steps: int) -> None:
    """Images that are sampled during training and at the end."""
    parser.section("validation")

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add(
        "validation_prompt",
        nargs="+",
        default=[],
        help="Prompts to sample validation images for. Default: none, no images.",
    )
    add("num_validation_images", type=int, default=4, minimum=1, help="Number of images per --validation_prompt.")
    add("validation_file", help="File of JSON lines: an image per line, with its prompt, seed, size ... Default: none.")
    add(
        "num_inference_steps",
        type=int,
        default=num_inference_steps,
        minimum=1,
        help="Number of denoising steps per sampled image.",
    )


def condition_validation(parser: Parser, num_inference_steps: int, image: str) -> None:
    """Images that are sampled from other images during training and at the end. `image` is what those are, in help."""
    validation(parser, num_inference_steps)

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add(
        "validation_image",
        nargs="+",
        default=[],
        help=f"Paths of {image}s: one per prompt, one for all prompts, or several for one prompt.",
    )
    add("validation_steps", type=int, default=100, minimum=1, help="Number of updates between validations.")


def validation_mask(parser: Parser) -> None:
    """Masks of the images that a fill model fills."""
    parser.add(
        "validation_mask",
        nargs="+",
        default=[],
        may_change=True,
        help="With --fill, paths of masks: one per --validation_image, or one for all. White is filled.",
    )

    def check(args: Values) -> None:
        if args.validation_mask and not args.fill:
            raise UserError("--validation_mask: needs --fill. Add it, or leave this out.")
        if args.validation_mask and not (args.validation_image or args.validation_file):
            raise UserError("--validation_mask: needs --validation_image or --validation_file. Add one of them.")

    parser.checks.append(check)


def controlnet_validation(parser: Parser, num_inference_steps: int) -> None:
    """Images of a ControlNet, sampled during training and at the end."""
    condition_validation(parser, num_inference_steps, "condition image")
    parser.add(
        "controlnet_conditioning_scale",
        type=float,
        default=1.0,
        may_change=True,
        help="Strength of the ControlNet in validation.",
    )


def guidance(parser: Parser, guidance_scale: float) -> None:
    """Classifier-free guidance, for models without embedded guidance."""
    parser.add(
        "guidance_scale",
        type=float,
        default=guidance_scale,
        may_change=True,
        help="Scale of classifier-free guidance in validation. 1: none.",
    )


def saved_dtype(parser: Parser) -> None:
    """The dtype of a final ControlNet."""
    parser.add(
        "save_weight_dtype",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        may_change=True,
        help="Dtype of the final weights.",
    )
    parser.add("upcast_before_saving", default=False, may_change=True, help="Same as --save_weight_dtype fp32.")


def upcast(parser: Parser) -> None:
    """The dtype of a final adapter."""
    parser.add("upcast_before_saving", default=False, may_change=True, help="Save the final LoRA in fp32.")


def no_effect(parser: Parser, *names: str) -> None:
    """Flags of diffusers' scripts that are accepted and have no effect."""
    parser.section("accepted without effect")
    for name in names:
        parser.add(name, default=False, may_change=True, help=f"No effect: {NO_EFFECT[name]}.")
