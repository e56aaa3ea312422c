"""Models with a DoRA or LoKr for the tests, and the weights that the adapters stand for."""

import mindspore as ms
import numpy as np
from flux_gradients import TARGETS

from mindtune.models import lora, lora_settings, precision

RANK, ALPHA = 4, 6.0
MORE_TARGETS = [*TARGETS, "proj_out", "linear_1", "norm_out.linear"]


def add_adapter(model, kind, compute=ms.float32, targets=MORE_TARGETS, trained=True):
    """Adds a LoRA, DoRA or LoKr, with values as after training unless not `trained`; everything else is frozen."""
    precision.freeze_params(model)
    settings = lora_settings.Settings(adapter=kind, lora_rank=RANK, lora_alpha=ALPHA)
    lora.add_adapters({"transformer": model}, settings, {"transformer": targets}, {}, compute, seed=0)
    rng = np.random.default_rng(0)
    for name, parameter in lora.lora_parameters(model).items() if trained else ():
        change = rng.standard_normal(parameter.shape)
        value = parameter.asnumpy() * (1 + 0.1 * change) if "magnitude" in name else 0.3 * change
        parameter.set_data(ms.Tensor(value, ms.float32))
    return model.set_train(False)


def adapted_weights(model, weights):
    """Layer -> its weight with the adapter of `model`, float64; `weights` are those of the base."""
    parameters = {name: p.asnumpy().astype(float) for name, p in lora.lora_parameters(model).items()}
    found = {}
    for layer in {name.partition(".lo")[0] for name in parameters}:
        get = {name[len(layer) + 1 :]: value for name, value in parameters.items() if name.startswith(f"{layer}.lo")}
        if "lokr_w1" in get:
            low_rank = "lokr_w2_a" in get
            w2 = get["lokr_w2_a"] @ get["lokr_w2_b"] if low_rank else get["lokr_w2"]
            found[layer] = weights[layer] + (ALPHA / RANK if low_rank else 1) * np.kron(get["lokr_w1"], w2)
            continue
        found[layer] = weights[layer] + ALPHA / RANK * get["lora_B.weight"] @ get["lora_A.weight"]
        if "lora_magnitude_vector" in get:
            norms = np.linalg.norm(found[layer], axis=1)
            found[layer] *= (get["lora_magnitude_vector"] / norms)[:, None]
    return found


def merge(model, weights):
    """`model` with these weights."""
    cells = dict(model.cells_and_names())
    for layer, weight in weights.items():
        cells[layer].weight.set_data(ms.Tensor(weight, ms.float32))
    return model


def base_weights(model):
    return {name: cell.weight.asnumpy() for name, cell in model.cells_and_names() if hasattr(cell, "weight")}
