"""Optimizers: AdamW, MindSpore's AdamWeightDecay, 8-bit AdamW, Prodigy and Adafactor."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.amp import DynamicLossScaler

from mindtune.cli import UserError
from mindtune.optim import zero1
from mindtune.optim.adam8bit import AdamW8bit


class Settings(NamedTuple):
    """The optimizer and its hyperparameters, by the names of the flags. adafactor ignores betas and epsilon."""

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
    """The optimizer of `groups`, dicts with params (a list), lr and weight_decay. With ZeRO 1, this rank's part of it.

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
        # Not set_data: AdamWeightDecay, compiled in PyNative too, would keep the rate of its first update.
        ops.assign(parameter, ms.Tensor(rate, ms.float32))


def optimizer_state(optimizer: nn.Optimizer) -> dict[str, ms.Parameter]:
    """The state that the optimizer keeps between updates, by name, without weights and learning rate."""
    own = {id(p) for p in optimizer.parameters} | {id(p) for p in optimizer.learning_rate}
    # A shard of the state (`zero1.ShardedOptimizer`) has the same names as the whole.
    return {re.sub(r"^(optimizer\.)?own\.", r"\1", p.name): p for p in optimizer.get_parameters() if id(p) not in own}


def training_state(optimizer: nn.Cell, scaler: nn.Cell, **more: dict[str, ms.Parameter]) -> dict[str, ms.Parameter]:
    """The state of a checkpoint: optimizer, fp16's loss scale, and `more`, whose names get the keyword as prefix."""
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


def state_bytes(optimizer: nn.Optimizer) -> int:
    """Bytes of the optimizer state on this device."""
    return sum(p.nbytes for p in optimizer_state(optimizer).values())


class AdamW(nn.Optimizer):
    """Adam with decoupled weight decay and bias correction, torch.optim.AdamW's formula.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2. The fused
    operator of MindSpore computes p -= lr' (m / (sqrt(v) + eps') + wd' p) without correction; with c1 = 1 -
    beta1^t, c2 = 1 - beta2^t, lr' = lr sqrt(c2) / c1, eps' = eps sqrt(c2) and wd' = wd lr / lr' make it the
    corrected formula.

    With `offload` the moments are in the host's memory and updated there, by the operator that MindSpore's Adam has
    for this (use_offload, graph mode); the device gets the change. What that saves and costs on Ascend was not
    measured by us.
    """

    def __init__(
        self, groups: list[dict], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, offload: bool = False
    ):
        super().__init__(groups[0]["lr"], groups)
        self.change = _adamw_on_host if offload else _adamw
        self.beta1, self.beta2, self.eps = (ms.Tensor(v, ms.float32) for v in (beta1, beta2, eps))
        self.log_beta1, self.log_beta2 = _log(beta1), _log(beta2)
        self.exp_avg = self.parameters.clone(prefix="exp_avg", init="zeros")
        self.exp_avg_sq = self.parameters.clone(prefix="exp_avg_sq", init="zeros")
        self.decay = tuple(ms.Tensor(float(w), ms.float32) for w in self.weight_decay)
        ends = np.cumsum([len(group["params"]) for group in groups]).tolist()
        self.bounds = tuple(zip([0, *ends], ends))
        self.hyper_map = ops.HyperMap()

    def construct(self, gradients):
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.global_step[0].to(ms.float32)
        # -expm1(t log beta) is 1 - beta^t without losing the first steps' digits.
        correction1 = -ops.expm1(step * self.log_beta1)
        root2 = ops.sqrt(-ops.expm1(step * self.log_beta2))
        rate = root2 / correction1
        # HyperMap over a group compiles in a tenth of the time of a loop: 380 parameters in one second instead of ten.
        for start, end in self.bounds:
            lr, decay = self.learning_rate[start] * rate, self.decay[start] / rate
            update = ops.partial(self.change, self.beta1, self.beta2, lr, self.eps * root2, decay)
            group = slice(start, end)
            self.hyper_map(
                update, self.parameters[group], self.exp_avg[group], self.exp_avg_sq[group], gradients[group]
            )
        return True


_fused_adamw = ops.operations.AdamWeightDecay()


def _adamw(beta1, beta2, lr, eps, decay, parameter, exp_avg, exp_avg_sq, gradient):
    return _fused_adamw(parameter, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, decay, gradient.to(parameter.dtype))


_host_adam = ops.AdamNoUpdateParam().set_device("CPU")
_zero = ms.Tensor(0.0, ms.float32)


def _adamw_on_host(beta1, beta2, lr, eps, decay, parameter, exp_avg, exp_avg_sq, gradient):
    # Powers of the betas as zero: their corrections are in lr and eps already.
    change = _host_adam(exp_avg, exp_avg_sq, _zero, _zero, lr, beta1, beta2, eps, gradient.to(ms.float32))
    return ops.assign_add(parameter, change - lr * decay * parameter)


class Prodigy(nn.Optimizer):
    """Adam whose step size is estimated while training; use a learning rate around 1.

    Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (arXiv 2306.06101),
    algorithm 4, with d0 = 1e-6. `decouple` decays weights as AdamW does; `safeguard_warmup` keeps the learning rate
    out of d's denominator so that a warm-up does not overestimate it; `beta3` None means sqrt(beta2).
    """

    def __init__(
        self,
        groups,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        beta3=None,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    ):
        super().__init__(groups[0]["lr"], groups)
        self.betas = (beta1, beta2, beta3 if beta3 is not None else math.sqrt(beta2))
        self.log_beta1, self.log_beta2 = _log(beta1), _log(beta2)
        self.eps, self.d0 = eps, 1e-6
        self.decouple, self.use_bias_correction, self.safeguard_warmup = decouple, use_bias_correction, safeguard_warmup
        self.decay = tuple(float(w.asnumpy()) for w in self.weight_decay)
        self.exp_avg = self.parameters.clone(prefix="exp_avg", init="zeros")
        self.exp_avg_sq = self.parameters.clone(prefix="exp_avg_sq", init="zeros")
        self.s = self.parameters.clone(prefix="s", init="zeros")
        self.start = self.parameters.clone(prefix="start", init="same")
        self.d = ms.Parameter(ms.Tensor(self.d0, ms.float32), name="d")
        self.d_numerator = ms.Parameter(ms.Tensor(0.0, ms.float32), name="d_numerator")

    def construct(self, gradients):
        beta1, beta2, beta3 = self.betas
        lr = self.learning_rate[0]
        # An update at rate 0 (the first of a warm-up) changes nothing, not even the moments: `on` is 0 then.
        on = (lr > 0).to(ms.float32)
        d, rate = self.d + 0.0, self.d * lr
        if self.use_bias_correction:
            step = (self.global_step[0] + 1).to(ms.float32)
            rate = rate * ops.sqrt(-ops.expm1(step * self.log_beta2)) / -ops.expm1(step * self.log_beta1)
        weight = d if self.safeguard_warmup else rate
        numerator, denominator = self.d_numerator * beta3, ms.Tensor(0.0, ms.float32)
        for i in range(len(self.parameters)):
            parameter, grad = self.parameters[i], gradients[i].to(ms.float32)
            if self.decay[i] > 0 and not self.decouple:
                grad = grad + self.decay[i] * parameter
            numerator = numerator + d / self.d0 * rate * (grad * (self.start[i] - parameter)).sum()
            ops.assign_add(self.exp_avg[i], on * (1 - beta1) * (d * grad - self.exp_avg[i]))
            ops.assign_add(self.exp_avg_sq[i], on * (1 - beta2) * (ops.square(d * grad) - self.exp_avg_sq[i]))
            ops.assign_add(self.s[i], on * ((beta3 - 1) * self.s[i] + d / self.d0 * weight * grad))
            denominator = denominator + self.s[i].abs().sum()
        found = on * (denominator > 0).to(ms.float32)
        new_d = ops.maximum(d, found * numerator / (denominator + (1 - found)))
        ops.assign_add(self.d_numerator, on * (numerator - self.d_numerator))
        for i in range(len(self.parameters)):
            update = self.exp_avg[i] / (ops.sqrt(self.exp_avg_sq[i]) + new_d * self.eps + (1 - found))
            if self.decay[i] > 0 and self.decouple:
                update = update + self.decay[i] * self.parameters[i]
            ops.assign_sub(self.parameters[i], found * rate * update)
        ops.assign(self.d, new_d)
        # Before the first gradient there is nothing to correct: such an update does not count.
        self.assignadd(self.global_step, found.to(ms.int32).reshape((1,)))
        return True


class Adafactor(nn.Optimizer):
    """Second moments of a matrix as the means of its rows and columns, and no first moments.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235),
    algorithms 4 and 5, with the rate as given: neither relative to the update's number nor to the size of the
    weights. beta2 is 1 - t^-0.8 (section 7.2), an update above 1 in root mean square is scaled down to 1 (section
    6), squares are kept above 1e-30. Weight decay is decoupled: lr wd p. More than two axes are matrices of the
    last two; fewer keep whole second moments.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups[0]["lr"], groups)
        self.decay = tuple(float(w.asnumpy()) for w in self.weight_decay)
        matrix = [p.ndim > 1 for p in self.parameters]
        self.column_of = tuple(sum(matrix[:i]) if matrix[i] else -1 for i in range(len(matrix)))
        # Means over the last axis; of a parameter with fewer than two the whole second moments.
        self.row = _zeros("row", [(p, p.shape[:-1] if p.ndim > 1 else p.shape) for p in self.parameters])
        self.column = _zeros("column", [(p, p.shape[:-2] + p.shape[-1:]) for p in self.parameters if p.ndim > 1])

    def construct(self, gradients):
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        share = ops.pow(self.global_step[0].to(ms.float32), -0.8)  # 1 - beta2, 1 at first
        for i in range(len(self.parameters)):
            grad = gradients[i].to(ms.float32)
            squares = ops.square(grad) + 1e-30
            row = self.row[i]
            if self.column_of[i] < 0:
                ops.assign_add(row, share * (squares - row))
                update = grad * ops.rsqrt(row)
            else:
                column = self.column[self.column_of[i]]
                ops.assign_add(row, share * (squares.mean(-1) - row))
                ops.assign_add(column, share * (squares.mean(-2) - column))
                update = (
                    grad
                    * ops.rsqrt(row / row.mean(-1, keep_dims=True)).expand_dims(-1)
                    * ops.rsqrt(column).expand_dims(-2)
                )
            update = update / ops.maximum(ops.sqrt(ops.square(update).mean()), 1.0)
            ops.assign_sub(self.parameters[i], self.learning_rate[i] * (update + self.decay[i] * self.parameters[i]))
        return True


def _zeros(name: str, shapes: list) -> ms.ParameterTuple:
    """A float32 state of a shape for each (parameter, shape)."""
    return ms.ParameterTuple(
        [ms.Parameter(ops.zeros(shape, ms.float32), name=f"{name}.{p.name}") for p, shape in shapes]
    )


def _log(beta: float) -> float:
    """log(beta), finite for 0 too, where exp(t log(beta)) is 0 as beta^t is."""
    return math.log(max(beta, 1e-300))
