"""Optimizers that tests share, so that each is compiled once per mode: `optimizer` resets one that exists already."""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindtune.optim.optimizers import Settings, create_optimizer, optimizer_state, set_learning_rates
from mindtune.optim.schedules import Schedule

# As the scripts do on the CPU: otherwise PyNative runs every operator in another thread, slow on a busy machine.
ms.runtime.launch_blocking()

NAMES = {"eight_bit": "use_8bit_adam", "offload": "offload_optimizer", "eps": "adam_epsilon"}
_created = {}


def create(name, groups, betas=(0.9, 0.999), **settings):
    """The optimizer as scripts create it; `groups` are dicts with params, lr and weight_decay.

    `settings` are those of `Settings` by the short NAMES, those of Prodigy without prodigy_.
    """
    flags = {NAMES.get(key, f"prodigy_{key}"): value for key, value in settings.items()}
    return create_optimizer(Settings(name, adam_beta1=betas[0], adam_beta2=betas[1], **flags), groups)


def factor(schedule, update, warmup, total):
    """The learning rate of an update divided by the base rate."""
    return Schedule(1.0, total, schedule, warmup).factor(update)


def two_groups(params, rates, decays):
    """The first two parameters (of two the first), and the others."""
    first = min(2, len(params) - 1)
    parts = (params[:first], params[first:])
    return [{"params": part, "lr": rate, "weight_decay": decay} for part, rate, decay in zip(parts, rates, decays)]


def new_optimizer(name, values, rates=(1e-2, 1e-3), decays=(0.1, 0.0), **settings):
    """A new optimizer over two groups of parameters with these values, and the parameters."""
    params = [ms.Parameter(ms.Tensor(np.asarray(value)), name=f"p{index}") for index, value in enumerate(values)]
    return create(name, two_groups(params, rates, decays), **settings), params


def optimizer(name, values, rates=(1e-2, 1e-3), **settings):
    """As new_optimizer, but the same object for the same settings, shapes and mode, in its initial state."""
    values = [np.asarray(value) for value in values]
    key = (name, ms.get_context("mode"), rates, str(sorted(settings.items())), str([value.shape for value in values]))
    if key not in _created:
        cell, params = new_optimizer(name, values, rates, **settings)
        initial = {key: parameter.asnumpy().copy() for key, parameter in optimizer_state(cell).items()}
        _created[key] = (cell, params, initial)
        return cell, params
    cell, params, initial = _created[key]
    starts = {f"start.p{index}": value for index, value in enumerate(values)}  # Prodigy's state has the initial weights
    for state_key, parameter in optimizer_state(cell).items():
        value = starts.get(state_key, initial[state_key])
        ops.assign(parameter, ms.Tensor(value, parameter.dtype))
    for parameter, value in zip(params, values):
        ops.assign(parameter, ms.Tensor(value, parameter.dtype))
    set_learning_rates(cell, list(rates))
    return cell, params


def update(cell, gradients):
    # Mutable, as tensors in a tuple are constants of a graph otherwise: every update would compile it again.
    cell(ms.mutable(tuple(ms.Tensor(np.float32(gradient)) for gradient in gradients)))
