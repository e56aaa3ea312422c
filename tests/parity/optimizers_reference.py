"""The PyTorch side of the optimizer check: 100 updates of each setting on a noisy quadratic, and the schedules.

    python optimizers_reference.py WORK

Reads WORK/optimizers.npz and WORK/optimizers.json; writes WORK/optimizers_theirs.npz. AdamW is torch's, 8-bit AdamW
torchao's, Prodigy prodigyopt's, Adafactor transformers', the schedules diffusers'.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers.optimization import get_scheduler

BLOCK = 256  # entries
SMALLEST = 4096  # entries of a parameter whose moments are quantized


def create(setting, groups):
    """The optimizer of a setting."""
    name = setting["optimizer"]
    adam = {"lr": setting["lr"], "betas": setting["betas"], "eps": setting["eps"]}
    if name == "adamw":
        return torch.optim.AdamW(groups, **adam)
    if name == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, **adam, block_size=BLOCK)
    if name == "prodigy":
        from prodigyopt import Prodigy

        more = {"beta3": setting["beta3"], "decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
        return Prodigy(groups, **adam, **more)
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=setting["lr"], scale_parameter=False, relative_step=False, warmup_init=False)


def whole_blocks(values, setting):
    """Pads with zeros: torchao does not quantize a tensor whose size is not a multiple of the block."""
    if setting["optimizer"] != "adamw8bit" or values.numel() < SMALLEST:
        return values
    return torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK))


def run(setting, given, schedule):
    """Weights after the last update, and the optimizer."""
    starts = [given[f"start {i}"] for i in range(sum(name.startswith("start") for name in given))]
    params = [torch.nn.Parameter(whole_blocks(start, setting).clone()) for start in starts]
    groups = [
        {"params": part, "weight_decay": decay} for part, decay in zip((params[:2], params[2:]), setting["decay"])
    ]
    optimizer = create(setting, groups)
    scheduler = get_scheduler(
        setting["schedule"], optimizer, num_warmup_steps=schedule["warmup"], num_training_steps=schedule["updates"]
    )

    def weights():
        return [p.detach().reshape(-1)[: start.numel()].reshape(start.shape) for p, start in zip(params, starts)]

    for k in range(schedule["updates"]):
        for i, weight in enumerate(weights()):
            matrix = given[f"matrix {i}"]
            away = (weight - given[f"bottom {i}"]).reshape(len(matrix), -1)
            params[i].grad = whole_blocks((matrix @ away).reshape(weight.shape) + given[f"noise {i}"][k], setting)
        optimizer.step()
        scheduler.step()
    return weights(), optimizer


def factors(name, schedule):
    """The factor of the learning rate at every update and at the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule["lr"])
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=schedule["warmup"],
        num_training_steps=schedule["updates"],
        num_cycles=schedule["cycles"],
        power=schedule["power"],
    )
    found = []
    for _ in range(schedule["updates"] + 1):
        found.append(scheduler.get_last_lr()[0] / schedule["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(found)


def main(work):
    torch.compile = (
        lambda function, **_: function
    )  # torchao would compile its update: that takes half a minute and a C++ compiler
    asked = json.loads((work / "optimizers.json").read_text())
    with np.load(work / "optimizers.npz") as arrays:
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = {f"schedule/{name}": factors(name, asked["schedule"]) for name in asked["schedules"]}
    for label, setting in asked["settings"].items():
        weights, optimizer = run(setting, given, asked["schedule"])
        found.update({f"{label}/{i}": weight.numpy() for i, weight in enumerate(weights)})
        if setting["optimizer"] == "prodigy":
            found[f"{label}/d"] = np.array(optimizer.param_groups[0]["d"])
    np.savez(work / "optimizers_theirs.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
