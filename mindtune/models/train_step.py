"""The base class of the training steps: mindone's `TrainStep` with exact gradient clipping."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn
from mindspore.amp import StaticLossScaler

from mindtune.models import library, precision
from mindtune.models.named_parameters import model_parameters


class TrainStep(library.TrainStep):
    """mindone's training step with our gradient clipping.

    A call runs one micro-batch. Every `gradient_accumulation_steps`-th call also clips the mean gradient of its
    micro-batches and updates the weights. A subclass defines `forward(*inputs)`, which returns a tuple that starts with
    `self.scale_loss(loss)`. A call returns that tuple with the first item unscaled: the loss divided by
    `gradient_accumulation_steps`.

    `model` holds the trained weights and is kept as `self.model`. `loss_scaler` comes from `precision.loss_scaler`.
    After an update `self.grad_clipper.norm` holds the global 2-norm of the gradient before clipping. `max_grad_norm` 0
    turns clipping off; the norm is recorded all the same.
    """

    def __init__(
        self,
        model: nn.Cell,
        optimizer: nn.Optimizer,
        *,
        loss_scaler,
        gradient_accumulation_steps: int,
        max_grad_norm: float,
    ):
        super().__init__(
            model,
            optimizer,
            loss_scaler=loss_scaler,
            gradient_accumulation_steps=gradient_accumulation_steps,
            # Batches continue across epochs: there is no end of a loader at which an update would be cut short.
            gradient_accumulation_kwargs={"sync_with_dataloader": False},
        )
        self.grad_clipper = precision.GradNormClipper(max_grad_norm)
        if isinstance(loss_scaler, StaticLossScaler):
            self.grad_scaler = NoScaling()

    @property
    def compile_phase(self):
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value):
        # MindSpore sets it in all cells at every call: 15 ms for a transformer with FLUX.1's number of blocks.
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)


@ms.jit_class
class NoScaling:
    """Takes the place of mindone's `GradScaler` for the loss scale 1, which would multiply every gradient by 1."""

    def scale(self, inputs):
        return inputs

    def unscale(self, inputs):
        return inputs

    def step(self, optimizer, gradients):
        optimizer(gradients)
        return True

    def update(self):
        return True


def train_all_weights(model: nn.Cell, compute: ms.Type) -> dict[str, ms.Parameter]:
    """Makes every weight of a float32 model trainable, computing in `compute`. Returns the weights by name.

    The weights stay float32 in mixed precision: MindSpore's optimizers update in the dtype of the parameter.
    """
    precision.set_compute_dtype(model, compute).set_train(True)
    for parameter in model.get_parameters():
        parameter.requires_grad = True
    return model_parameters(model)
