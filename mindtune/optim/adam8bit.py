"""AdamW with two bytes of state a parameter instead of eight: its moments are 8-bit codes, in blocks that have a scale each.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): block-wise
quantisation (section 2.1), dynamic codes (section 1.3 and appendix). A tensor's moments are float32 only while it is updated. Its
operators are documented for Ascend too; run by us on the CPU only.

In a graph the CPU's kernels for division, and those for operands of unlike shapes, keep 16 bytes an element for life: there are reciprocals
and products with ones in their place.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.models.fast_ops import ON_CPU, matmul, ones

# An outlier makes the codes of its whole block coarse. The paper's blocks of 2048 cost 2.004 bytes a parameter, these 2.031.
BLOCK = 256
# Smaller tensors (biases, norms) keep float32 moments: they are sensitive, and there is nothing to save.
SMALLEST = 4096
CELLS = 1024


def dynamic_codes(signed: bool) -> np.ndarray:
    """The 256 values that codes stand for, rising, float64: in [-1, 1] (signed) or [0, 1].

    A decade has twice the values of the one below, in the middles of equal parts: from 10^-1 to 1 there are 128 (signed: 64 of each
    sign), from 10^-7 to 10^-6 two (one). Zero and one are codes of their own.
    """
    positive = []
    for decade in range(-6, 1):
        parts = 2 ** (decade + (6 if signed else 7))
        positive += [10.0**decade * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    return np.array([-value for value in reversed(positive)] * signed + [0.0, *positive, 1.0])


@ms.jit_class
class Quantiser:
    """Between float32 [blocks, BLOCK] and uint8 codes with float32 scales [blocks, 1]. Signed for first moments.

    Unlike the paper's, second moments have no code for zero: one that vanishes under a first moment that does not makes a step of
    m / eps, thousands of times the rate. The least value, 3.25e-7 of the block's largest, stands for all below.
    """

    def __init__(self, signed: bool):
        values = dynamic_codes(signed)
        middles = (values[1:] + values[:-1]) / 2
        if not signed:
            middles[0] = -2.0
        # The code of x is the number of middles below it. Cells are even in the signed fourth root of x, and none has two middles, so
        # one comparison remains. 4 million values on the CPU: 23 ms. searchsorted takes 144 ms, bucketize 129 ms, decade and fraction
        # by log and exp 38 ms, wrong at the ends of decades. The margin of 1e-3 is for the roots' rounding.
        starts = np.arange(2 * CELLS + 1) - CELLS - 1e-3
        below = np.searchsorted(np.sign(middles) * np.abs(middles) ** 0.25 * CELLS, starts)
        self.below = ms.Tensor(below, ms.float32)
        self.middle = ms.Tensor(np.append(middles, 2.0)[below], ms.float32)
        self.values = ms.Tensor(values, ms.float32)

    def encode(self, x):
        """Codes and scales: the largest magnitude of each block."""
        scale = ops.maximum(x.abs().max(axis=1, keepdims=True), 1e-30)
        x = x * _spread(ops.reciprocal(scale))
        cell = ((ops.sign(x) * ops.sqrt(ops.sqrt(x.abs())) + 1.0) * CELLS).to(ms.int32)
        # Not a number is an index out of range, of which ops.gather would complain instead of the loop that sees the loss.
        cell = ops.clamp(cell, 0, 2 * CELLS)
        above = (x >= ops.gather(self.middle, cell, 0)).to(ms.float32)
        return (ops.gather(self.below, cell, 0) + above).to(ms.uint8), scale

    def decode(self, codes, scale):
        return ops.gather(self.values, codes.to(ms.int32), 0) * _spread(scale)


def _spread(column):
    """[blocks, 1] as [blocks, BLOCK], or as it is where a product of unlike shapes costs nothing."""
    return matmul(column, ones(1, BLOCK)) if ON_CPU else column


class AdamW8bit(nn.Optimizer):
    """`optim.AdamW`'s formula, bias-corrected with decoupled decay, over block-wise 8-bit moments.

    Tensors of fewer than `SMALLEST` elements keep float32 moments of their shape and are updated as there.
    """

    def __init__(self, groups: list[dict], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        super().__init__(groups[0]["lr"], groups)
        self.beta1, self.beta2, self.eps = (ms.Tensor(v, ms.float32) for v in (beta1, beta2, eps))
        self.share1, self.share2 = 1 - beta1, 1 - beta2  # not from float32 betas, where 0.001 is off by 5e-5
        self.log_beta1, self.log_beta2 = (math.log(max(beta, 1e-300)) for beta in (beta1, beta2))
        self.decay = tuple(ms.Tensor(float(w), ms.float32) for w in self.weight_decay)
        self.signed, self.unsigned = Quantiser(signed=True), Quantiser(signed=False)
        self.quantised = tuple(p.size >= SMALLEST for p in self.parameters)
        self.scale_of = tuple(sum(self.quantised[:i]) for i in range(len(self.quantised)))
        self.exp_avg, self.exp_avg_scale = self._moments("exp_avg")
        self.exp_avg_sq, self.exp_avg_sq_scale = self._moments("exp_avg_sq")
        self.fused = ops.operations.AdamWeightDecay()

    def _moments(self, name):
        """Zeros: codes, of small tensors the moments themselves, one a parameter; and scales, one a quantised parameter."""
        codes, scales = [], []
        for p, quantised in zip(self.parameters, self.quantised):
            blocks = -(-p.size // BLOCK)
            start = np.zeros((blocks, BLOCK), np.uint8) if quantised else np.zeros(p.shape, np.float32)
            codes.append(ms.Parameter(ms.Tensor(start), name=f"{name}.{p.name}", requires_grad=False))
            if quantised:
                start = np.zeros((blocks, 1), np.float32)
                scales.append(ms.Parameter(ms.Tensor(start), name=f"{name}_scale.{p.name}", requires_grad=False))
        return ms.ParameterTuple(codes), ms.ParameterTuple(scales)

    def construct(self, gradients):
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.global_step[0].to(ms.float32)
        # As in optim.AdamW: p -= lr' (m / (sqrt(v) + eps') + wd' p).
        root2 = ops.sqrt(-ops.expm1(step * self.log_beta2))
        rate = root2 / -ops.expm1(step * self.log_beta1)
        eps = self.eps * root2
        done = rate
        for i in range(len(self.parameters)):
            lr, decay = self.learning_rate[i] * rate, self.decay[i] / rate
            if self.quantised[i]:
                # One after the other: a graph would begin with all of them, and hold all their float32 moments.
                done = self._update(i, ops.depend(gradients[i], done), lr, eps, decay)
            else:
                grad = gradients[i].to(self.parameters[i].dtype)
                self.fused(
                    self.parameters[i],
                    self.exp_avg[i],
                    self.exp_avg_sq[i],
                    lr,
                    self.beta1,
                    self.beta2,
                    eps,
                    decay,
                    grad,
                )
        return True

    def _update(self, i, gradient, lr, eps, decay):
        """One tensor, with the moments as they are before they are rounded. Returns what is known when it is done."""
        parameter = self.parameters[i]
        padding = self.exp_avg[i].size - parameter.size
        grad = gradient.to(ms.float32).reshape(-1)
        if padding:
            grad = ops.cat((grad, ops.zeros((padding,), ms.float32)))
        grad = grad.reshape(-1, BLOCK)
        first, second = self.exp_avg_scale[self.scale_of[i]], self.exp_avg_sq_scale[self.scale_of[i]]
        m = self.signed.decode(ops.depend(self.exp_avg[i], grad), first)
        m = m + self.share1 * (grad - m)
        v = self.unsigned.decode(ops.depend(self.exp_avg_sq[i], grad), second)
        v = v + self.share2 * (ops.square(grad) - v)
        change = (m * ops.reciprocal(ops.sqrt(v) + eps)).reshape(-1)
        if padding:
            change = change[: parameter.size]
        ops.assign_sub(parameter, lr * (change.reshape(parameter.shape) + decay * parameter))
        codes, scale = self.signed.encode(m)
        ops.assign(self.exp_avg[i], codes)
        ops.assign(first, scale)
        codes, scale = self.unsigned.encode(v)
        ops.assign(self.exp_avg_sq[i], codes)
        return ops.assign(second, scale)
