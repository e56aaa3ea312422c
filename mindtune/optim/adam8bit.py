"""AdamW with two bytes of state per parameter instead of eight: moments are 8-bit codes with one scale per block.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861):
block-wise quantisation (section 2.1), dynamic codes (section 1.3 and appendix). A tensor's moments are float32 only
while it is updated. We tested it on the CPU only; its operators are documented for Ascend too.

In a graph, the CPU kernels for division and for operands of different shapes keep 16 bytes per element until the
process ends. So this module multiplies by reciprocals, and by ones where a shape has to be expanded.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindtune.models.cpu_ops import matmul, ones
from mindtune.models.fast_ops import ON_CPU
from mindtune.optim.adamw import log_beta

# An outlier makes the codes of its whole block coarse. The paper's blocks of 2048 need 2.004 bytes per parameter,
# these 2.031.
BLOCK = 256
# Smaller tensors (biases, norms) keep float32 moments: they are sensitive, and they take little memory.
MIN_SIZE = 4096
CELLS = 1024


def dynamic_codes(signed: bool) -> np.ndarray:
    """The 256 values of the codes in increasing order, float64: in [-1, 1] (signed) or [0, 1].

    Each decade has twice as many values as the one below, at the centres of equal intervals: 128 from 10^-1 to 1
    (signed: 64 of each sign) down to two from 10^-7 to 10^-6 (signed: one). Zero and one have codes too.
    """
    positive = []
    for decade in range(-6, 1):
        parts = 2 ** (decade + (6 if signed else 7))
        positive += [10.0**decade * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    return np.array([-value for value in reversed(positive)] * signed + [0.0, *positive, 1.0])


@ms.jit_class
class Quantiser:
    """Converts float32 [blocks, BLOCK] to uint8 codes with float32 scales [blocks, 1] and back.

    Signed for first moments. Unlike in the paper, second moments have no code for zero: with a second moment of zero
    and a first moment that is not, a step is m / eps, thousands of times the rate. Values below 3.25e-7 of the block's
    maximum get that value.
    """

    def __init__(self, signed: bool):
        values = dynamic_codes(signed)
        midpoints = (values[1:] + values[:-1]) / 2
        if not signed:
            midpoints[0] = -2.0
        # The code of x is the number of midpoints below it. A table of cells that are equally wide in the signed
        # fourth root of x gives that number up to one comparison, because no cell contains two midpoints. For 4
        # million values on the CPU this takes 23 ms, searchsorted 144 ms, bucketize 129 ms, and log and exp 38 ms with
        # errors at the ends of decades. The margin of 1e-3 allows for rounding of the roots.
        starts = np.arange(2 * CELLS + 1) - CELLS - 1e-3
        below = np.searchsorted(np.sign(midpoints) * np.abs(midpoints) ** 0.25 * CELLS, starts)
        self.below = ms.Tensor(below, ms.float32)
        self.midpoint = ms.Tensor(np.append(midpoints, 2.0)[below], ms.float32)
        self.values = ms.Tensor(values, ms.float32)

    def encode(self, x):
        """Codes, and scales: the maximum magnitude per block."""
        scale = ops.maximum(x.abs().max(axis=1, keepdims=True), 1e-30)
        x = x * _expand(ops.reciprocal(scale))
        cell = ((ops.sign(x) * ops.sqrt(ops.sqrt(x.abs())) + 1.0) * CELLS).to(ms.int32)
        # NaN becomes an index out of range. ops.gather would raise an error for it before the training loop reports
        # the loss.
        cell = ops.clamp(cell, 0, 2 * CELLS)
        above = (x >= ops.gather(self.midpoint, cell, 0)).to(ms.float32)
        return (ops.gather(self.below, cell, 0) + above).to(ms.uint8), scale

    def decode(self, codes, scale):
        return ops.gather(self.values, codes.to(ms.int32), 0) * _expand(scale)


def _expand(column):
    """[blocks, 1] as [blocks, BLOCK] on the CPU. Elsewhere broadcasting costs no memory, and `column` is returned."""
    return matmul(column, ones(1, BLOCK)) if ON_CPU else column


class AdamW8bit(nn.Optimizer):
    """AdamW with bias correction and decoupled weight decay, as `adamw.AdamW`, with block-wise 8-bit moments.

    Tensors of fewer than MIN_SIZE elements keep float32 moments and are updated as in `adamw.AdamW`.
    """

    def __init__(self, groups: list[dict], beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        super().__init__(groups[0]["lr"], groups)
        self.beta1, self.beta2, self.eps = (ms.Tensor(v, ms.float32) for v in (beta1, beta2, eps))
        # Not computed from float32 betas, which would make 0.001 wrong by 5e-5 of its value.
        self.complement1 = 1 - beta1
        self.complement2 = 1 - beta2
        self.log_beta1, self.log_beta2 = log_beta(beta1), log_beta(beta2)
        self.decay = tuple(ms.Tensor(float(w), ms.float32) for w in self.weight_decay)
        self.signed, self.unsigned = Quantiser(signed=True), Quantiser(signed=False)
        self.quantised = tuple(p.size >= MIN_SIZE for p in self.parameters)
        self.large = tuple(i for i, quantised in enumerate(self.quantised) if quantised)
        self.small = tuple(i for i, quantised in enumerate(self.quantised) if not quantised)
        self.scale_of = tuple(sum(self.quantised[:i]) for i in range(len(self.quantised)))
        self.exp_avg, self.exp_avg_scale = self._moments("exp_avg")
        self.exp_avg_sq, self.exp_avg_sq_scale = self._moments("exp_avg_sq")
        self.fused = ops.operations.AdamWeightDecay()

    def _moments(self, name):
        """Zero moments: codes (for small tensors float32 moments) per parameter, and scales per quantised parameter."""
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
        # As in adamw.AdamW: p -= lr' (m / (sqrt(v) + eps') + wd' p).
        root2 = ops.sqrt(-ops.expm1(step * self.log_beta2))
        rate = root2 / -ops.expm1(step * self.log_beta1)
        eps = self.eps * root2
        # Two loops, because in a graph each `if` in a loop is a call inside the call of the iteration before: with the
        # 340 tensors of Stable Diffusion's ControlNet they were nested deeper than MindSpore allows.
        for i in self.small:
            self.fused(
                self.parameters[i],
                self.exp_avg[i],
                self.exp_avg_sq[i],
                self.learning_rate[i] * rate,
                self.beta1,
                self.beta2,
                eps,
                self.decay[i] / rate,
                gradients[i].to(self.parameters[i].dtype),
            )
        previous = rate
        for i in self.large:
            lr, decay = self.learning_rate[i] * rate, self.decay[i] / rate
            # One after another: otherwise a graph computes all at once, with the float32 moments of all in memory.
            previous = self._update(i, ops.depend(gradients[i], previous), lr, eps, decay)
        return True

    def _update(self, i, gradient, lr, eps, decay):
        """Updates one tensor by its unrounded moments, then rounds them. Returns a value that depends on the update."""
        parameter = self.parameters[i]
        padding = self.exp_avg[i].size - parameter.size
        grad = gradient.to(ms.float32).reshape(-1)
        if padding:
            grad = ops.cat((grad, ops.zeros((padding,), ms.float32)))
        grad = grad.reshape(-1, BLOCK)
        first, second = self.exp_avg_scale[self.scale_of[i]], self.exp_avg_sq_scale[self.scale_of[i]]
        m = self.signed.decode(ops.depend(self.exp_avg[i], grad), first)
        m = m + self.complement1 * (grad - m)
        # In this order, and one after the other, so that little is in memory at a time.
        codes, scale = self.signed.encode(m)
        done = (ops.assign(self.exp_avg[i], codes), ops.assign(first, scale))
        v = self.unsigned.decode(ops.depend(self.exp_avg_sq[i], done), second)
        v = v + self.complement2 * (ops.square(grad) - v)
        codes, scale = self.unsigned.encode(v)
        done = (ops.assign(self.exp_avg_sq[i], codes), ops.assign(second, scale))
        change = (ops.depend(m, done) * ops.reciprocal(ops.sqrt(v) + eps)).reshape(-1)
        if padding:
            change = change[: parameter.size]
        return ops.assign_add(parameter, -lr * (change.reshape(parameter.shape) + decay * parameter))
