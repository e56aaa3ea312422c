"""Flags of the models, the training step, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

from mindtune.cli import UserError
from mindtune.flags.parser import Parser, Values
from mindtune.flow import WEIGHTING_SCHEMES
from mindtune.optim import optimizers, schedules, zero1


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
        help="Shift of the timesteps towards noise: a number, or auto for that of the resolution. 1: no shift.",
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


def optimizer(parser: Parser, learning_rate: float, adam_weight_decay: float) -> None:
    """The optimizer, its learning rate and the clipping of gradients."""
    add = parser.add
    parser.section("optimizer")
    add(
        "optimizer",
        type=str.lower,
        choices=["adamw", "adamweightdecay", "prodigy", "adafactor"],
        default="adamw",
        help="adamweightdecay: MindSpore's AdamW without bias correction. adafactor ignores the adam_ betas.",
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
