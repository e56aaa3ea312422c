"""Prodigy: an Adam that estimates its step size during training."""

from __future__ import annotations

import math

import mindspore as ms
from mindspore import nn, ops

from mindtune.optim.adamw import log_beta


class Prodigy(nn.Optimizer):
    """Adam that estimates its step size d during training. Use a learning rate around 1.

    Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (arXiv 2306.06101),
    algorithm 4, with d0 = 1e-6. `decouple` decays weights as AdamW does. `safeguard_warmup` keeps the learning rate
    out of the denominator of d, so that a warm-up does not overestimate d. `beta3` None means sqrt(beta2).
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
        self.log_beta1, self.log_beta2 = log_beta(beta1), log_beta(beta2)
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
        # An update at rate 0 (the first of a warm-up) changes nothing, not even the moments: `active` is 0 then.
        active = (lr > 0).to(ms.float32)
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
            ops.assign_add(self.exp_avg[i], active * (1 - beta1) * (d * grad - self.exp_avg[i]))
            ops.assign_add(self.exp_avg_sq[i], active * (1 - beta2) * (ops.square(d * grad) - self.exp_avg_sq[i]))
            ops.assign_add(self.s[i], active * ((beta3 - 1) * self.s[i] + d / self.d0 * weight * grad))
            denominator = denominator + self.s[i].abs().sum()
        has_gradient = active * (denominator > 0).to(ms.float32)
        new_d = ops.maximum(d, has_gradient * numerator / (denominator + (1 - has_gradient)))
        ops.assign_add(self.d_numerator, active * (numerator - self.d_numerator))
        for i in range(len(self.parameters)):
            update = self.exp_avg[i] / (ops.sqrt(self.exp_avg_sq[i]) + new_d * self.eps + (1 - has_gradient))
            if self.decay[i] > 0 and self.decouple:
                update = update + self.decay[i] * self.parameters[i]
            ops.assign_add(self.parameters[i], -has_gradient * rate * update)
        ops.assign(self.d, new_d)
        # The bias correction counts updates from the first gradient that is not zero.
        self.assignadd(self.global_step, has_gradient.to(ms.int32).reshape((1,)))
        return True
