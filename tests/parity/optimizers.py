"""Our side of the optimizer check: 100 updates on a noisy quadratic, and every schedule, compared with PyTorch's.

`compare` runs both sides, `golden` keeps a few of PyTorch's results, and `check_golden` compares ours with these,
without PyTorch.
"""

import json
import subprocess
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np

from mindtune import rng
from mindtune.optim import optimizers, schedules

UPDATES = 100
KEPT = 8  # entries per parameter in golden.json
# Shape -> rows of its matrix: the gradient is the matrix times the distance from the minimum. 5000 is not a multiple of
# the block size of 8-bit moments.
SHAPES = {(96, 64): 96, (64,): 64, (8, 4, 3, 3): 8, (1,): 1, (5000,): 50}
# decay: of the first two parameters, and of the others.
ADAM = {"lr": 3e-2, "betas": [0.9, 0.999], "eps": 1e-8, "decay": [0.1, 0.02]}
PRODIGY = {**ADAM, "optimizer": "prodigy", "lr": 1.0, "schedule": "constant", "beta3": None, "bound": 1e-3}
SETTINGS = {
    f"{label}, {schedule}": {**ADAM, "optimizer": name, "schedule": schedule, "bound": bound}
    # 8-bit: a rounding difference in float32 can change the code of a moment by one, about 1 %. Measured 1e-3.
    for name, label, bound in (
        ("adamw", "AdamW", 1e-4),
        ("adamw8bit", "8-bit AdamW", 1e-2),
        ("adafactor", "Adafactor", 1e-3),
    )
    for schedule in ("constant_with_warmup", "cosine")
}
SETTINGS["Prodigy"] = PRODIGY
SETTINGS["Prodigy, other betas"] = {**PRODIGY, "betas": [0.8, 0.99], "beta3": 0.95, "eps": 1e-6, "decay": [0.0, 0.3]}
SCHEDULE = {"warmup": 10, "updates": UPDATES, "cycles": 3, "power": 2.0, "lr": 1e-2}
# Bound for 8-bit against float32 AdamW: the effect of rounding the moments. Measured 1.9e-2.
ROUNDING = 0.1


def normal_values(index, what, *shape):
    return rng.normal(0, f"optimizers {what}", index, shape=shape)


def inputs():
    """The inputs of both sides: start, minimum (bottom), matrix and noise of every parameter."""
    found = {}
    for i, (shape, rows) in enumerate(SHAPES.items()):
        normal = partial(normal_values, i)
        root = normal("matrix", rows, rows) / np.float32(np.sqrt(rows))
        found[f"start {i}"] = 0.01 * normal("start", *shape)
        found[f"bottom {i}"] = normal("bottom", *shape)
        found[f"matrix {i}"] = root @ root.T + 0.1 * np.eye(rows, dtype=np.float32)
        found[f"noise {i}"] = 0.3 * normal("noise", UPDATES, *shape)
    return found


def run(setting, given):
    """Our weights after 100 updates, and d of Prodigy."""
    params = [ms.Parameter(ms.Tensor(given[f"start {i}"]), name=f"p{i}") for i in range(len(SHAPES))]
    groups = [
        {"params": part, "lr": setting["lr"], "weight_decay": w}
        for part, w in zip((params[:2], params[2:]), setting["decay"])
    ]
    name = setting["optimizer"]
    settings = optimizers.Settings(
        optimizer=name.replace("8bit", ""),
        use_8bit_adam=name == "adamw8bit",
        adam_beta1=setting["betas"][0],
        adam_beta2=setting["betas"][1],
        adam_epsilon=setting["eps"],
        prodigy_beta3=setting.get("beta3"),
    )
    optimizer = optimizers.create_optimizer(settings, groups)
    schedule = schedules.Schedule(setting["lr"], UPDATES, setting["schedule"], SCHEDULE["warmup"])
    for k in range(UPDATES):
        gradients = []
        for i, rows in enumerate(SHAPES.values()):
            away = (params[i].asnumpy() - given[f"bottom {i}"]).reshape(rows, -1)
            gradients.append(ms.Tensor((given[f"matrix {i}"] @ away).reshape(params[i].shape) + given[f"noise {i}"][k]))
        optimizers.set_learning_rates(optimizer, [schedule.rate(k)] * 2)
        optimizer(tuple(gradients))
    return [p.asnumpy() for p in params], float(optimizer.d) if name == "prodigy" else 0.0


def distance(ours, theirs, start):
    """Euclidean distance between both results, relative to the distance from the start, over all parameters."""
    error, change = (
        np.sqrt(sum(np.square(a.astype(float) - b).sum() for a, b in zip(theirs, other))) for other in (ours, start)
    )
    return float(error / change)


def compare(work: Path, reference: str) -> dict:
    """Row label -> (error, bound). `reference` is the interpreter with PyTorch, `work` the folder for its files."""
    given = inputs()
    np.savez(work / "optimizers.npz", **given)
    (work / "optimizers.json").write_text(
        json.dumps({"settings": SETTINGS, "schedule": SCHEDULE, "schedules": schedules.SCHEDULES})
    )
    subprocess.run([reference, str(Path(__file__).with_name("optimizers_reference.py")), str(work)], check=True)
    found = {}
    start = [given[f"start {i}"] for i in range(len(SHAPES))]
    with np.load(work / "optimizers_theirs.npz") as left:
        theirs = {label: [left[f"{label}/{i}"] for i in range(len(SHAPES))] for label in SETTINGS}
        for label, setting in SETTINGS.items():
            ours, d = run(setting, given)
            found[label] = distance(ours, theirs[label], start), setting["bound"]
            if setting["optimizer"] == "prodigy":
                found[f"{label}: d"] = abs(d / float(left[f"{label}/d"]) - 1), setting["bound"]
            if setting["optimizer"] == "adamw8bit":
                found[f"{label}, and PyTorch's AdamW"] = (
                    distance(ours, theirs[label.replace("8-bit ", "")], start),
                    ROUNDING,
                )
        for name in schedules.SCHEDULES:
            s = SCHEDULE
            schedule = schedules.Schedule(s["lr"], UPDATES, name, s["warmup"], s["cycles"], s["power"])
            ours = [schedule.factor(k) for k in range(UPDATES + 1)]
            found[f"schedule {name}"] = float(np.abs(ours - left[f"schedule/{name}"]).max()), 1e-6
    return found


def golden(work: Path) -> dict:
    """Setting -> the first entries of PyTorch's weights per parameter, from the files of `compare` in `work`."""
    with np.load(work / "optimizers_theirs.npz") as left:
        return {
            label: [[float(f"{value:.9g}") for value in left[f"{label}/{i}"].flat[:KEPT]] for i in range(len(SHAPES))]
            for label in SETTINGS
        }


def check_golden(golden: dict) -> dict:
    """Setting -> `distance` of our weights from the kept entries."""
    given = inputs()
    first = [given[f"start {i}"].flat[:KEPT] for i in range(len(SHAPES))]
    ours = {label: [weight.flat[:KEPT] for weight in run(SETTINGS[label], given)[0]] for label in golden}
    return {label: distance(ours[label], [np.array(row) for row in rows], first) for label, rows in golden.items()}
