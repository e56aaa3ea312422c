"""Optimizers: AdamW, MindSpore's AdamWeightDecay, 8-bit AdamW, Prodigy and Adafactor."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import NamedTuple, Optional

import mindspore as ms
from mindspore import nn, ops
from mindspore.amp import DynamicLossScaler

from mindtune.cli import UserError
from mindtune.optim import zero1
from mindtune.optim.adafactor import Adafactor
from mindtune.optim.adam8bit import BLOCK, MIN_SIZE, AdamW8bit
from mindtune.optim.adamw import AdamW
from mindtune.optim.prodigy import Prodigy


class Settings(NamedTuple):
    """The optimizer and its hyperparameters. The fields have the names of the flags. adafactor has no betas."""

    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    offload_optimizer: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    prodigy_beta3: Optional[float] = None
    prodigy_decouple: bool = True
    prodigy_use_bias_correction: bool = True
    prodigy_safeguard_warmup: bool = True
    zero_stage: int = 0


def check_settings(name: str, *, use_8bit_adam: bool, offload_optimizer: bool, graph_mode: bool) -> None:
    """Raises UserError if --use_8bit_adam or --offload_optimizer does not fit the optimizer, the mode or the other."""
    if use_8bit_adam and name != "adamw":
        raise UserError(
            f"--use_8bit_adam with --optimizer {name}: 8-bit moments are for adamw; leave one of the two out."
        )
    if offload_optimizer and name != "adamw":
        raise UserError(
            f"--offload_optimizer with --optimizer {name}: it moves adamw's moments; leave one of the two out."
        )
    if use_8bit_adam and offload_optimizer:
        raise UserError(
            "--offload_optimizer with --use_8bit_adam: moments on the host are float32; leave one of the two out."
        )
    if offload_optimizer and not graph_mode:
        raise UserError(
            "--offload_optimizer with --mindspore_mode 1: only graph mode keeps state on the host; use mode 0."
        )


def create_optimizer(settings: Settings, groups: list[dict]) -> nn.Cell:
    """The optimizer for `groups`, dicts with params (a list), lr and weight_decay. With ZeRO 1, its shard on this rank.

    Raises UserError for betas of 0 with adamweightdecay.
    """
    if settings.zero_stage:
        return zero1.ShardedOptimizer(partial(_create, settings), groups)
    return _create(settings, groups)


def _create(settings: Settings, groups: list[dict]) -> nn.Optimizer:
    name, beta1, beta2, eps = settings.optimizer, settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon
    if name == "adamw" and settings.use_8bit_adam:
        return AdamW8bit(groups, beta1, beta2, eps)
    if name == "adamw":
        return AdamW(groups, beta1, beta2, eps, settings.offload_optimizer)
    if name == "adafactor":
        return Adafactor(groups)
    if name == "adamweightdecay":
        if not beta1 or not beta2:
            raise UserError("--optimizer adamweightdecay: its betas must be above 0; raise them, or use adamw.")
        return nn.AdamWeightDecay(groups, learning_rate=groups[0]["lr"], beta1=beta1, beta2=beta2, eps=eps)
    if name == "prodigy":
        return Prodigy(
            groups,
            beta1,
            beta2,
            eps,
            beta3=settings.prodigy_beta3,
            decouple=settings.prodigy_decouple,
            use_bias_correction=settings.prodigy_use_bias_correction,
            safeguard_warmup=settings.prodigy_safeguard_warmup,
        )
    raise ValueError(f"unknown optimizer {name}")


def set_learning_rates(optimizer: nn.Optimizer, rates: list[float]) -> None:
    """Sets one learning rate per parameter group, in the order of the groups."""
    distinct: dict[int, ms.Parameter] = {id(p): p for p in optimizer.learning_rate}
    for parameter, rate in zip(distinct.values(), rates):
        if getattr(parameter, "rate", None) != rate:  # an assignment takes 0.4 ms
            # Not set_data: AdamWeightDecay, compiled in PyNative too, would keep the rate of its first update.
            ops.assign(parameter, ms.Tensor(rate, ms.float32))
            parameter.rate = rate


def optimizer_state(optimizer: nn.Optimizer) -> dict[str, ms.Parameter]:
    """The state of the optimizer by name, without weights and learning rates."""
    own = {id(p) for p in optimizer.parameters} | {id(p) for p in optimizer.learning_rate}
    # A shard of the state (`zero1.ShardedOptimizer`) has the same names as the whole.
    return {re.sub(r"^(optimizer\.)?own\.", r"\1", p.name): p for p in optimizer.get_parameters() if id(p) not in own}


def training_state(optimizer: nn.Cell, scaler: nn.Cell, **more: dict[str, ms.Parameter]) -> dict[str, ms.Parameter]:
    """The parameters that a checkpoint saves: optimizer state, fp16's loss scale, and `more` as <keyword>.<name>."""
    state = {f"optimizer.{name}": parameter for name, parameter in optimizer_state(optimizer).items()}
    for prefix, parameters in more.items():
        state.update({f"{prefix}.{name}": parameter for name, parameter in parameters.items()})
    if isinstance(scaler, DynamicLossScaler):
        state.update(loss_scale=scaler.scale_value, loss_scale_counter=scaler.counter)
    return state


def logged_values(optimizer: nn.Cell, scaler: nn.Cell) -> dict[str, float]:
    """What is logged per update besides loss, rate and norm: prodigy's step size estimate d, and fp16's loss scale."""
    values = {}
    if isinstance(optimizer, Prodigy):
        values["d"] = float(optimizer.d)
    if isinstance(scaler, DynamicLossScaler):
        values["loss_scale"] = float(scaler.scale_value)
    return values


def state_bytes(trained: list[tuple[int, ...]], optimizer: str, eight_bit: bool) -> int:
    """Bytes of optimizer state for trained tensors of these shapes."""
    sizes = [math.prod(shape) for shape in trained]
    if eight_bit:  # two moments: codes in blocks, each with a float32 scale; small tensors keep float32
        return sum(2 * (-(-size // BLOCK)) * (BLOCK + 4) if size >= MIN_SIZE else 8 * size for size in sizes)
    if optimizer == "adafactor":  # a row and a column statistic per matrix
        factored = [math.prod(s[:-1]) + math.prod(s[:-2] + s[-1:]) if len(s) > 1 else math.prod(s) for s in trained]
        return 4 * sum(factored)
    return (16 if optimizer == "prodigy" else 8) * sum(sizes)
