"""Flags of the models and of the training step."""

from __future__ import annotations

import math

from mindtune.cli import UserError
from mindtune.flags.parser import Parser, Values
from mindtune.flow import HUBER_SCHEDULES, LOSSES, WEIGHTING_SCHEMES
from mindtune.models import hubs


def model(parser: Parser, pipeline: str) -> None:
    """The base model. `pipeline` names the supported pipeline in help lines, such as FLUX.1."""
    add = parser.add
    parser.section("model")
    add(
        "pretrained_model_name_or_path",
        required=True,
        may_change=True,
        help=f"Directory or hub id of a {pipeline} pipeline.",
    )
    add(
        "hub",
        choices=list(hubs.HUBS),
        default=hubs.default(),
        may_change=True,
        help="Where the models of hub ids are, and where --push_to_hub uploads. Default: MINDTUNE_HUB, or huggingface.",
    )
    add("revision", may_change=True, help="Branch, tag or commit on the hub. Default: main, on ModelScope master.")
    add("variant", help="Variant of the weight files, such as fp16. Default: the files without a variant.")
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
    """The ControlNet to start from. `copied` names the layers that a new one copies, in help lines."""
    parser.add(
        "controlnet_model_name_or_path",
        may_change=True,
        help=f"Directory or hub id of a ControlNet to start from. Default: a copy of {copied}.",
    )


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
        help="Timestep distribution and loss weighting, as in Stable Diffusion 3. none: uniform, unweighted.",
    )
    add("logit_mean", type=float, default=0.0, help="Mean of the logit_normal distribution.")
    add("logit_std", type=float, default=1.0, help="Standard deviation of the logit_normal distribution.")
    add("mode_scale", type=float, default=1.29, help="Scale of the mode distribution.")
    add(
        "timestep_shift",
        default="1",
        help="Shift of the sigmas towards noise: a number, or auto for FLUX.1's own by the image's size. 1: no shift.",
    )
    add(
        "guidance_scale",
        type=float,
        default=3.5,
        help="Guidance input of a guidance-distilled transformer, in training and validation.",
    )
    add(
        "base_precision",
        choices=["same", "int8"],
        default="same",
        help="Weights of the frozen transformer and T5. int8: quantized. same: the dtype of --mixed_precision.",
    )
    parser.checks.append(_check_flux)


def initial_lora(parser: Parser) -> None:
    """The adapter to start from."""
    parser.add(
        "lora_model_name_or_path",
        may_change=True,
        help="LoRA (file or directory) to start from. Default: a new one.",
    )


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


def loss(parser: Parser) -> None:
    """The loss function."""
    add = parser.add
    add("loss", choices=LOSSES, default="mse", help="Loss function. huber, smooth_l1: less influence of large errors.")
    add(
        "huber_delta",
        type=float,
        above=0,
        help="Errors far above it count linearly in huber and smooth_l1. Default: 0.1.",
    )
    add(
        "huber_schedule",
        choices=HUBER_SCHEDULES,
        help="How delta falls from 1 at the image to --huber_delta at the noise. Default: exponential.",
    )

    def check(args: Values) -> None:
        for name in ("huber_delta", "huber_schedule"):
            if args.loss == "mse" and getattr(args, name):
                raise UserError(
                    f"--{name} {getattr(args, name)}: needs --loss huber or smooth_l1. Add it, or leave this out."
                )

    parser.checks.append(check)


def step(parser: Parser, sample: str) -> None:
    """Precision, batch size, length of the run and devices. `sample` is image or pair, for help lines."""
    add = parser.add
    add(
        "mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="Dtype of the frozen weights and of the computation; trained weights are fp32. no: fp32.",
    )
    add(
        "gradient_checkpointing",
        default=False,
        help="Recompute activations in the backward pass to save memory.",
    )
    add(
        "gradient_checkpointing_blocks",
        type=int,
        minimum=1,
        may_change=True,
        help="With --gradient_checkpointing, recompute only the first N blocks of the model. Default: all blocks.",
    )
    add(
        "fit",
        default=False,
        may_change=True,
        help="Recompute only as many blocks as the memory plan needs to fit in --device_memory_gb.",
    )
    add(
        "train_batch_size",
        type=int,
        default=4,
        minimum=1,
        may_change=True,
        help=f"Number of {sample}s in a micro-batch, per device.",
    )
    add(
        "gradient_accumulation_steps",
        type=int,
        default=1,
        minimum=1,
        may_change=True,
        help="Number of micro-batches per update (optimizer step).",
    )
    add(
        "num_train_epochs",
        type=int,
        default=1,
        minimum=1,
        may_change=True,
        help=f"Number of epochs (passes over the {sample}s). Not used with --max_train_steps.",
    )
    add(
        "max_train_steps",
        type=int,
        minimum=1,
        may_change=True,
        help="Total number of updates, also those before a resume. Default: given by --num_train_epochs.",
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
        help="ZeRO stage. 0: off. 1: shard the optimizer state over the devices. 2, 3: not supported.",
    )
    add(
        "distributed",
        default=False,
        may_change=True,
        help="Train on several devices. Start the script with msrun, one process per device.",
    )
    parser.checks.append(_check_step)


def _check_step(args: Values) -> None:
    if args.gradient_checkpointing_blocks is None:
        return
    flag = f"--gradient_checkpointing_blocks {args.gradient_checkpointing_blocks}"
    if args.fit:
        raise UserError(f"{flag}: --fit chooses the number of blocks; leave one of the two flags out.")
    if not args.gradient_checkpointing:
        raise UserError(f"{flag}: has no effect without --gradient_checkpointing; add it.")
