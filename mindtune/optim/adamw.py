"""AdamW with bias correction, on the device or with moments on the host."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops


class AdamW(nn.Optimizer):
    """Adam with decoupled weight decay and bias correction, torch.optim.AdamW's formula.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2. The fused
    operator of MindSpore has no bias correction: it computes p -= lr' (m / (sqrt(v) + eps') + wd' p). This is the
    corrected formula for lr' = lr sqrt(c2) / c1, eps' = eps sqrt(c2) and wd' = wd lr / lr', where c1 = 1 - beta1^t and
    c2 = 1 - beta2^t.

    With `offload` the moments are kept and updated in host memory, by the operator of MindSpore's Adam with
    use_offload; only the change of the weights is copied to the device. It needs graph mode. We have not measured it
    on Ascend.
    """

    def __init__(
        self, groups: list[dict], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, offload: bool = False
    ):
        super().__init__(groups[0]["lr"], groups)
        self.change = _adamw_on_host if offload else _adamw
        self.beta1, self.beta2, self.eps = (ms.Tensor(v, ms.float32) for v in (beta1, beta2, eps))
        self.log_beta1, self.log_beta2 = log_beta(beta1), log_beta(beta2)
        self.exp_avg = self.parameters.clone(prefix="exp_avg", init="zeros")
        self.exp_avg_sq = self.parameters.clone(prefix="exp_avg_sq", init="zeros")
        self.decay = tuple(ms.Tensor(float(w), ms.float32) for w in self.weight_decay)
        ends = np.cumsum([len(group["params"]) for group in groups]).tolist()
        self.bounds = tuple(zip([0, *ends], ends))
        self.hyper_map = ops.HyperMap()

    def construct(self, gradients):
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.global_step[0].to(ms.float32)
        # -expm1(t log beta) is 1 - beta^t without cancellation in the first steps.
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
    # Zero for the powers of the betas: lr and eps contain the bias correction already.
    change = _host_adam(exp_avg, exp_avg_sq, _zero, _zero, lr, beta1, beta2, eps, gradient.to(ms.float32))
    return ops.assign_add(parameter, change - lr * decay * parameter)


def log_beta(beta: float) -> float:
    """log(beta), finite for 0 too, where exp(t log(beta)) is 0 as beta^t is."""
    return math.log(max(beta, 1e-300))
