"""Flags of the optimizer, the learning-rate schedule and the average of the weights."""

from __future__ import annotations

from mindtune.flags.parser import Parser, Values, boolean
from mindtune.optim import optimizers, schedules, zero1


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


def prodigy(parser: Parser) -> None:
    """The settings of prodigy."""
    add = parser.add
    add("prodigy_beta3", type=float, help="Decay rate of prodigy's step size estimate. Default: sqrt(--adam_beta2).")
    add("prodigy_decouple", type=boolean, default=True, help="prodigy: decoupled weight decay, as in AdamW.")
    add("prodigy_use_bias_correction", type=boolean, default=True, help="prodigy: bias correction, as in Adam.")
    add("prodigy_safeguard_warmup", type=boolean, default=True, help="prodigy: keep warm-up out of the step size.")


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
