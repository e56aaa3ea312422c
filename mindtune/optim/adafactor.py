"""Adafactor: an optimizer that stores only row and column means of the second moments."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops


class Adafactor(nn.Optimizer):
    """Second moments of a matrix as the means of its rows and columns, and no first moments.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235),
    algorithms 4 and 5, with the given learning rate instead of one that depends on the step and the scale of the
    weights. beta2 is 1 - t^-0.8 (section 7.2). An update with a root mean square above 1 is scaled down to 1 (section
    6). 1e-30 is added to squared gradients. Weight decay is decoupled: lr wd p. A tensor with more than two axes is a
    batch of matrices, one with fewer keeps all its second moments.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups[0]["lr"], groups)
        self.decay = tuple(float(w.asnumpy()) for w in self.weight_decay)
        matrix = [p.ndim > 1 for p in self.parameters]
        self.column_of = tuple(sum(matrix[:i]) if matrix[i] else -1 for i in range(len(matrix)))
        # Means over the last axis, or all second moments of a parameter with fewer than two axes.
        self.row = _zeros("row", [(p, p.shape[:-1] if p.ndim > 1 else p.shape) for p in self.parameters])
        self.column = _zeros("column", [(p, p.shape[:-2] + p.shape[-1:]) for p in self.parameters if p.ndim > 1])

    def construct(self, gradients):
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        complement2 = ops.pow(self.global_step[0].to(ms.float32), -0.8)  # 1 - beta2
        for i in range(len(self.parameters)):
            grad = gradients[i].to(ms.float32)
            squares = ops.square(grad) + 1e-30
            row = self.row[i]
            if self.column_of[i] < 0:
                ops.assign_add(row, complement2 * (squares - row))
                update = grad * ops.rsqrt(row)
            else:
                column = self.column[self.column_of[i]]
                ops.assign_add(row, complement2 * (squares.mean(-1) - row))
                ops.assign_add(column, complement2 * (squares.mean(-2) - column))
                update = (
                    grad
                    * ops.rsqrt(row / row.mean(-1, keep_dims=True)).expand_dims(-1)
                    * ops.rsqrt(column).expand_dims(-2)
                )
            update = update / ops.maximum(ops.sqrt(ops.square(update).mean()), 1.0)
            change = self.learning_rate[i] * (update + self.decay[i] * self.parameters[i])
            ops.assign_add(self.parameters[i], -change)
        return True


def _zeros(name: str, shapes: list) -> ms.ParameterTuple:
    """Float32 optimizer state, zeros, for each (parameter, shape)."""
    return ms.ParameterTuple(
        [ms.Parameter(ops.zeros(shape, ms.float32), name=f"{name}.{p.name}") for p, shape in shapes]
    )
