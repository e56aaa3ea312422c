"""Flags of the models, the training step, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

from mindtune.cli import UserError
from mindtune.flags.parser import Parser, Values
from mindtune.flow import WEIGHTING_SCHEMES
from mindtune.models import hubs
from mindtune.optim import optimizers, schedules, zero1


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
        help="Shift of the sigmas towards noise: a number, or auto to compute it from the image size. 1: no shift.",
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


def optimizer(parser: Parser, learning_rate: float, adam_weight_decay: float) -> None:
    """The optimizer, its learning rate and the clipping of gradients."""
    add = parser.add
    parser.section("optimizer")
    add(
        "optimizer",
        type=str.lower,
        choices=["adamw", "adamweightdecay", "prodigy", "adafactor"],
        default="adamw",
        help="Optimizer. adamweightdecay: MindSpore's, without bias correction. adafactor: no betas and epsilon.",
    )
    add("use_8bit_adam", default=False, help="AdamW with 8-bit moments: 2 bytes of state per parameter instead of 8.")
    add(
        "offload_optimizer",
        default=False,
        help="Keep AdamW's moments in host memory and update them there. Graph mode only.",
    )
    add(
        "learning_rate",
        type=float,
        default=learning_rate,
        minimum=0,
        help="Learning rate after warm-up; about 1 for prodigy.",
    )
    add(
        "scale_lr",
        default=False,
        help="Multiply --learning_rate by batch size, accumulation steps and number of devices.",
    )
    add("adam_beta1", type=float, default=0.9, minimum=0, below=1, help="Decay rate of the first moment.")
    add("adam_beta2", type=float, default=0.999, minimum=0, below=1, help="Decay rate of the second moment.")
    add("adam_epsilon", type=float, default=1e-8, help="Term added to the square root of the second moment.")
    add("adam_weight_decay", type=float, default=adam_weight_decay, help="Weight decay, decoupled as in AdamW.")
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
        help="Number of warm-up updates. constant has no warm-up.",
    )
    add(
        "lr_schedule_steps",
        type=int,
        minimum=1,
        may_change=True,
        help="Length of the schedule in updates, warm-up included. Default: the length of the run.",
    )
    add("lr_num_cycles", type=float, default=1, help="Number of cycles of the cosine_with_restarts schedule.")
    add("lr_power", type=float, default=1.0, help="Power of the polynomial schedule.")


def ema(parser: Parser) -> None:
    """An exponential moving average of the trained weights."""
    parser.add(
        "use_ema",
        default=False,
        help="Validate and save an exponential moving average of the weights.",
    )
    parser.add(
        "ema_decay",
        type=float,
        default=0.9999,
        minimum=0,
        below=1,
        help="Decay rate of the moving average, lower at first.",
    )
