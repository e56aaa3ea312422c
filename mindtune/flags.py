"""The flags that training scripts share, declared once, in groups that a script calls one by one.

    parser = flags.Parser(__doc__)
    flags.model(parser, pipeline="FLUX.1")
    parser.add("lora_rank", type=int, default=4, minimum=1, help="Rank of the LoRA matrices.")
    args = parser.parse_args(argv)

A declaration holds everything about a flag: its help, its bounds, and whether its value may change when a run is resumed.
The tables in docs/ are written from the same declarations by `python docs/flags.py`.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

from mindtune.cli import UserError
from mindtune.data.crops import INTERPOLATIONS
from mindtune.flow import WEIGHTING_SCHEMES
from mindtune.optim import optimizers, schedules, zero1

# Flags of diffusers' commands that change nothing here, and why.
NO_EFFECT = {
    "allow_tf32": "a CUDA setting; matrix products run in the dtype that --mixed_precision names",
    "enable_xformers_memory_efficient_attention": "a CUDA kernel; on Ascend mindone uses its own flash attention",
    "enable_npu_flash_attention": "mindone uses flash attention on Ascend without a flag",
    "set_grads_to_none": "a PyTorch setting; MindSpore returns gradients and keeps none between updates",
}


class Flag(NamedTuple):
    """What is declared of a flag besides argparse's own settings. A bound of None is no bound."""

    minimum: Optional[float]
    above: Optional[float]
    below: Optional[float]
    may_change: bool


class Values(argparse.Namespace):
    """The values of all flags, read-only."""

    def __init__(self, values: dict[str, Any], declared: dict[str, Flag]) -> None:
        self.__dict__.update(values, _declared=declared)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"args.{name}: flags are never changed; use a local variable")

    def select(self, cls: type, **more: Any) -> Any:
        """An instance of `cls` whose arguments are the flags of the same names, and `more`."""
        names = [name for name in inspect.signature(cls).parameters if name in self._declared and name not in more]
        return cls(**{name: getattr(self, name) for name in names}, **more)

    def recorded(self) -> dict[str, Any]:
        """Every flag with its value, for run.json. The hub's token is left out."""
        return {name: None if name == "hub_token" else getattr(self, name) for name in self._declared}

    def fixed(self) -> dict[str, Any]:
        """The flags that must keep their values when the run is resumed."""
        return {name: getattr(self, name) for name, flag in self._declared.items() if not flag.may_change}


class Parser(argparse.ArgumentParser):
    """argparse with sections, bounds and checks of several flags together. `doc` is the script's docstring."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc.split("\n")[0], allow_abbrev=False)
        self.declared: dict[str, Flag] = {}
        self.checks: list[Callable[[Values], None]] = []
        self._section: Any = self

    def section(self, title: str) -> None:
        """Flags that are added from here on stand under `title` in --help."""
        self._section = self.add_argument_group(title)

    def add(
        self,
        name: str,
        *aliases: str,
        minimum: Optional[float] = None,
        above: Optional[float] = None,
        below: Optional[float] = None,
        may_change: bool = False,
        **settings: Any,
    ) -> None:
        """Declares --name. `settings` are argparse's; a default of False makes a switch.

        Values must be at least `minimum`, above `above` and below `below`. With `may_change`, a resumed run may have another
        value and is still the exact continuation of the run that was stopped.
        """
        if settings.get("default") is False:
            settings = {**settings, "action": "store_true"}
        self._section.add_argument(f"--{name}", *(f"--{alias}" for alias in aliases), **settings)
        self.declared[name] = Flag(minimum, above, below, may_change)

    def parse_args(self, args: Optional[Sequence[str]] = None, namespace: None = None) -> Values:
        """The values, after every check. Raises UserError."""
        values = Values(vars(super().parse_args(args)), self.declared)
        for name, why in NO_EFFECT.items():
            if getattr(values, name, False):
                print(f"--{name}: {why}")
        for name, flag in self.declared.items():
            check_value(name, getattr(values, name), flag)
        for check in self.checks:
            check(values)
        return values


def check_value(name: str, value: Any, flag: Flag) -> None:
    """Raises UserError if a value is outside the bounds of its flag, or if the name of a model is empty."""
    if value == "" and name.endswith("_name_or_path"):
        raise UserError(f"--{name}: is empty; was a shell variable not set? Give a value or leave the flag out.")
    if value is None:
        return
    if flag.minimum is not None and not value >= flag.minimum:
        raise UserError(f"--{name} {value}: must be at least {flag.minimum}.")
    if flag.above is not None and not value > flag.above:
        raise UserError(f"--{name} {value}: must be above {flag.above}.")
    if flag.below is not None and not value < flag.below:
        raise UserError(f"--{name} {value}: must be below {flag.below}.")


def boolean(text: str) -> bool:
    """The value of a flag that takes true or false. Raises argparse.ArgumentTypeError for anything else."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


# ---- model and data ------------------------------------------------------------------------------


def model(parser: Parser, pipeline: str) -> None:
    """The base model. `pipeline` names what is expected, such as FLUX.1."""
    add = parser.add
    parser.section("model")
    add(
        "pretrained_model_name_or_path",
        required=True,
        may_change=True,
        help=f"Directory or hub id of a {pipeline} pipeline.",
    )
    add("revision", may_change=True, help="Branch, tag or commit on the hub. Default: main.")
    add("variant", help="Variant of the weight files, such as fp16. Default: none.")
    add(
        "cache_dir",
        may_change=True,
        help="Directory for hub downloads and encoder outputs. Default: the hub's cache, and <output_dir>/cache.",
    )
    add(
        "mindspore_mode",
        type=int,
        choices=[0, 1],
        default=0,
        help="0: compile the training step to a graph. 1: run it in PyNative.",
    )


def controlnet(parser: Parser, copied: str) -> None:
    """The ControlNet to start from. `copied` says which layers a new one copies."""
    parser.add(
        "controlnet_model_name_or_path",
        may_change=True,
        help=f"Directory or hub id of a ControlNet to start from. Default: a copy of {copied}.",
    )


def dataset(parser: Parser, image: str) -> None:
    """A data set for the datasets library. `image` names the default image column."""
    add = parser.add
    add("dataset_name", may_change=True, help="Hub id or directory of a data set for the datasets library.")
    add("dataset_config_name", help="Configuration of the data set. Default: its only one.")
    add("image_column", help=f"Column of the images. Default: {image}.")


def pairs(parser: Parser) -> None:
    """Pairs of an image and a condition image, from one of three sources, or streamed."""
    add = parser.add
    parser.section("data")
    dataset(parser, image="image, or the first image column")
    add(
        "train_data_dir",
        may_change=True,
        help="Instead of --dataset_name: a directory of images with metadata.jsonl or .csv, parquet, arrow or .tar files.",
    )
    add(
        "jsonl_for_train",
        may_change=True,
        help="Instead of --dataset_name: a .jsonl file whose lines have image, conditioning_image (paths) and text.",
    )
    add(
        "conditioning_image_column", help="Column of the condition images. Default: the one that begins with condition."
    )
    add("caption_column", help="Column of the captions. Default: text, caption or prompt.")
    add("streaming", default=False, help="Read the data set while training. Needs --max_train_steps.")
    add("shuffle_buffer_size", type=int, default=1000, minimum=1, help="Number of samples that --streaming shuffles.")
    add(
        "proportion_empty_prompts",
        type=float,
        default=0.0,
        minimum=0,
        help="Fraction of uses of a pair with an empty caption, drawn anew for every use.",
    )
    parser.checks.append(_check_pairs)


def _check_pairs(args: Values) -> None:
    names = ("dataset_name", "train_data_dir", "jsonl_for_train")
    given = [name for name in names if getattr(args, name)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"give one of --dataset_name, --train_data_dir and --jsonl_for_train, not {found}.")
    if args.dataset_config_name and not args.dataset_name:
        raise UserError(f"--dataset_config_name {args.dataset_config_name}: needs --dataset_name; leave it out.")
    if args.proportion_empty_prompts > 1.0:
        raise UserError(f"--proportion_empty_prompts {args.proportion_empty_prompts}: must be between 0 and 1.")
    if args.streaming and not args.max_train_steps:
        raise UserError("--streaming needs --max_train_steps: the length of a stream is not known.")
    for name in ("max_train_samples", "validation_split", "aspect_ratio_buckets", "skip_bad_images"):
        if args.streaming and getattr(args, name):
            raise UserError(f"--{name} with --streaming: needs all pairs before training; leave one of the two out.")


def images(parser: Parser, sample: str, multiple: int, smallest: int) -> None:
    """How images are checked, cropped and encoded. `sample` is image or pair; sides are multiples of `multiple` pixels."""
    add = parser.add
    add("max_train_samples", type=int, minimum=1, help=f"Use only the first N {sample}s. Default: all.")
    add(
        "skip_bad_images",
        default=False,
        may_change=True,
        help=f"Train without {sample}s that cannot be used, and list them. Default: stop.",
    )
    add(
        "validation_split",
        type=float,
        default=0.0,
        minimum=0,
        below=1,
        help=f"Fraction of the {sample}s held out of training to measure the loss on. 0: none.",
    )
    add(
        "resolution",
        type=int,
        default=512,
        help=f"Height and width of the training crops in pixels, a multiple of {multiple}.",
    )
    add(
        "aspect_ratio_buckets",
        help=f'Instead of --resolution: "height,width;height,width"; each {sample} goes to the nearest ratio.',
    )
    add("center_crop", default=False, help="Crop the center. Default: a random crop for every use.")
    add("random_flip", default=False, help="Flip half of the uses horizontally, at random.")
    add(
        "image_interpolation_mode",
        choices=sorted(INTERPOLATIONS),
        default="lanczos",
        help="Interpolation for resizing.",
    )
    add(
        "cache_latents",
        default=False,
        help=f"Encode every {sample} once before training, center-cropped (twice with --random_flip).",
    )
    add(
        "dataloader_num_workers",
        type=int,
        default=1,
        minimum=0,
        may_change=True,
        help="Threads that prepare batches in advance. 0: none.",
    )

    def check(args: Values) -> None:
        if args.resolution % multiple or args.resolution < smallest:
            nearest = max(smallest, round(args.resolution / multiple) * multiple)
            raise UserError(
                f"--resolution {args.resolution}: must be divisible by {multiple} and at least {smallest}. "
                f"The nearest is {nearest}."
            )

    parser.checks.append(check)


# ---- step ----------------------------------------------------------------------------------------


def flux(parser: Parser, weighting_scheme: str) -> None:
    """Timesteps, guidance and text length of FLUX.1."""
    add = parser.add
    parser.section("training step")
    add(
        "max_sequence_length",
        type=int,
        default=512,
        minimum=1,
        help="Number of T5 tokens per prompt, at most 512.",
    )
    add(
        "weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        default=weighting_scheme,
        help="Distribution of the timesteps and weighting of the loss.",
    )
    add("logit_mean", type=float, default=0.0, help="Mean of logit_normal.")
    add("logit_std", type=float, default=1.0, help="Standard deviation of logit_normal.")
    add("mode_scale", type=float, default=1.29, help="Scale of mode.")
    add(
        "timestep_shift",
        default="1",
        help="Shift of the timesteps towards noise: a number, or auto for the shift of the resolution. 1: none, as FLUX.1-dev.",
    )
    add(
        "guidance_scale",
        type=float,
        default=3.5,
        help="Guidance given to a guidance-distilled transformer, in training and validation.",
    )
    add(
        "base_precision",
        choices=["same", "int8"],
        default="same",
        help="int8: store the frozen transformer and T5 in int8. same: in the dtype of --mixed_precision.",
    )
    parser.checks.append(_check_flux)


def _check_flux(args: Values) -> None:
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: FLUX.1's T5 takes at most 512 tokens; use 512 or less."
        )
    try:
        usable = args.timestep_shift == "auto" or 0 < float(args.timestep_shift) < math.inf
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"--timestep_shift {args.timestep_shift}: give a positive number or auto.")


def step(parser: Parser, sample: str) -> None:
    """Precision, batch, length of the run and devices. `sample` is image or pair."""
    add = parser.add
    add(
        "mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="dtype of the frozen weights and of the computation. no: fp32.",
    )
    add(
        "gradient_checkpointing",
        default=False,
        help="Recompute the blocks in the backward pass to save memory.",
    )
    add(
        "train_batch_size",
        type=int,
        default=4,
        minimum=1,
        may_change=True,
        help=f"Number of {sample}s per device and micro-batch.",
    )
    add(
        "gradient_accumulation_steps",
        type=int,
        default=1,
        minimum=1,
        may_change=True,
        help="Number of micro-batches per update.",
    )
    add(
        "num_train_epochs",
        type=int,
        default=1,
        minimum=1,
        may_change=True,
        help=f"Number of passes over the {sample}s.",
    )
    add(
        "max_train_steps",
        type=int,
        minimum=1,
        may_change=True,
        help="Number of updates of the whole run. Default: what --num_train_epochs takes.",
    )
    add(
        "seed",
        type=int,
        may_change=True,
        help="Seed of all random numbers. Default: a random one, written to run.json.",
    )
    add(
        "zero_stage",
        type=int,
        choices=[0, 1, 2, 3],
        default=0,
        may_change=True,
        help="1: partition the optimizer state over the devices (ZeRO). 0: every device has all of it.",
    )
    add(
        "distributed",
        default=False,
        may_change=True,
        help="Train on several devices; msrun starts one process per device.",
    )


# ---- optimizer and schedule ----------------------------------------------------------------------


def optimizer(parser: Parser, learning_rate: float, adam_weight_decay: float) -> None:
    """The optimizer, its learning rate and the clipping of gradients."""
    add = parser.add
    parser.section("optimizer")
    add(
        "optimizer",
        type=str.lower,
        choices=["adamw", "adamweightdecay", "prodigy", "adafactor"],
        default="adamw",
        help="adamweightdecay is MindSpore's AdamW without bias correction. adafactor ignores the --adam_ flags but decay.",
    )
    add("use_8bit_adam", default=False, help="AdamW with 8-bit moments: 2 bytes per parameter instead of 8.")
    add(
        "offload_optimizer",
        default=False,
        help="Keep AdamW's moments in host memory and update them there. Graph mode only.",
    )
    add("learning_rate", type=float, default=learning_rate, minimum=0, help="Learning rate. About 1 for prodigy.")
    add(
        "scale_lr",
        default=False,
        help="Multiply --learning_rate by batch size, accumulation steps and number of devices.",
    )
    add("adam_beta1", type=float, default=0.9, minimum=0, below=1, help="Decay rate of the first moment.")
    add("adam_beta2", type=float, default=0.999, minimum=0, below=1, help="Decay rate of the second moment.")
    add("adam_epsilon", type=float, default=1e-8, help="Added to the root of the second moment.")
    add("adam_weight_decay", type=float, default=adam_weight_decay, help="Decoupled weight decay.")
    add(
        "max_grad_norm",
        type=float,
        default=1.0,
        minimum=0,
        help="Clip the gradient norm to this value. 0: no clipping.",
    )
    parser.checks.append(_check_optimizer)


def _check_optimizer(args: Values) -> None:
    optimizers.check_settings(
        args.optimizer,
        use_8bit_adam=args.use_8bit_adam,
        offload_optimizer=args.offload_optimizer,
        graph_mode=args.mindspore_mode == 0,
    )
    zero1.check_flags(args.zero_stage, args.distributed, args.optimizer)


def schedule(parser: Parser) -> None:
    """The learning-rate schedule."""
    add = parser.add
    add("lr_scheduler", choices=schedules.SCHEDULES, default="constant", help="Learning-rate schedule.")
    add(
        "lr_warmup_steps",
        type=int,
        default=500,
        minimum=0,
        help="Number of warm-up updates of every schedule but constant.",
    )
    add(
        "lr_schedule_steps",
        type=int,
        minimum=1,
        may_change=True,
        help="Length of the schedule in updates, warm-up included. Default: the length of the run.",
    )
    add("lr_num_cycles", type=float, default=1, help="Number of cycles of cosine_with_restarts.")
    add("lr_power", type=float, default=1.0, help="Power of polynomial.")


def ema(parser: Parser) -> None:
    """An exponential moving average of the trained weights."""
    parser.add(
        "use_ema",
        default=False,
        help="Keep a moving average of the weights, for validation and as the result.",
    )
    parser.add("ema_decay", type=float, default=0.9999, minimum=0, below=1, help="Largest decay of the moving average.")


# ---- output --------------------------------------------------------------------------------------


def output(parser: Parser, output_dir: str) -> None:
    """What a run writes, and resuming it."""
    parser.section("output")

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add("output_dir", default=output_dir, help="Directory of everything that the run writes.")
    add("overwrite_output_dir", default=False, help="Remove the files of another run there first.")
    add("checkpointing_steps", type=int, default=500, minimum=1, help="Number of updates between checkpoints.")
    add("checkpoints_total_limit", type=int, minimum=1, help="Number of checkpoints to keep, the newest. Default: all.")
    add(
        "resume_from_checkpoint",
        help="latest, the name of a checkpoint in --output_dir, or a path. Default: start anew.",
    )
    add("logging_dir", default="logs", help="Directory of the TensorBoard files, inside --output_dir.")
    add(
        "report_to",
        choices=["tensorboard", "wandb", "swanlab", "all", "none"],
        default="tensorboard",
        help="Where to log, besides metrics.jsonl. all: every service that is installed and logged in.",
    )
    add("push_to_hub", default=False, help="Upload the result with a model card at the end.")
    add("hub_token", help="Token with write access, never written to a file. Default: HF_TOKEN, or the last login.")
    add("hub_model_id", help="Repository to upload to. Default: the name of --output_dir, in your account.")
    add("dry_run", default=False, help="Print the memory plan and stop. Reads configs only and writes nothing.")
    add(
        "device_memory_gb",
        type=float,
        default=64,
        minimum=1,
        help="Device memory that the plan is compared with, such as 64 or 32 on Ascend.",
    )


def validation(parser: Parser, num_inference_steps: int) -> None:
    """Images that are sampled while training and at the end."""
    parser.section("validation")

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add("validation_prompt", nargs="+", default=[], help="Prompts to sample images of. Default: none.")
    add("num_validation_images", type=int, default=4, minimum=1, help="Number of images per prompt.")
    add(
        "num_inference_steps",
        type=int,
        default=num_inference_steps,
        minimum=1,
        help="Number of denoising steps.",
    )


def controlnet_validation(parser: Parser, num_inference_steps: int) -> None:
    """The same for a ControlNet, with condition images."""
    validation(parser, num_inference_steps)

    def add(name: str, **settings: Any) -> None:
        parser.add(name, may_change=True, **settings)

    add(
        "validation_image",
        nargs="+",
        default=[],
        help="Condition images: one per prompt, one for all prompts, or several for one prompt.",
    )
    add("controlnet_conditioning_scale", type=float, default=1.0, help="Strength of the ControlNet.")
    add("validation_steps", type=int, default=100, minimum=1, help="Number of updates between validations.")


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
        help="dtype of the final weights.",
    )
    parser.add("upcast_before_saving", default=False, may_change=True, help="Same as --save_weight_dtype fp32.")


def no_effect(parser: Parser, *names: str) -> None:
    """Flags of diffusers' commands that are accepted and change nothing."""
    parser.section("accepted without effect")
    for name in names:
        parser.add(name, default=False, may_change=True, help=f"No effect: {NO_EFFECT[name]}.")
