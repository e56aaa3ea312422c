"""Adafactor: second moments as the means of rows and columns."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops


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
