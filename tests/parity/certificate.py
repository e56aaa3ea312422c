"""Our training steps against PyTorch's on the same weights, batches and draws; writes docs/parity.md.   (make parity)

    python tests/parity/certificate.py --reference PYTHON        PYTHON: the interpreter that has tests/parity/requirements.txt

Every case makes a tiny pipeline, gives both sides the same numbers by file, and compares what they make of them.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "tiny"), str(ROOT / "examples" / "controlnet")]

import make_tiny_pipeline  # noqa: E402  (examples/tiny)
import train_controlnet  # noqa: E402  (examples/controlnet)
import train_controlnet_sdxl  # noqa: E402
from shapes import conditioning, draw_scene, picture  # noqa: E402

from mindtune import data, diffusion, encode, models, optim, precision, rng, sampling, tracking  # noqa: E402

UPDATES, CAPTION = 50, "a photo of a red circle on a white background"
CASES = {
    "SD 1.5, epsilon": ("sd15", "epsilon", None),
    "SD 1.5, v_prediction": ("sd15", "v_prediction", None),
    "SD 1.5, epsilon, Min-SNR": ("sd15", "epsilon", 5.0),
    "SD 1.5, v_prediction, Min-SNR": ("sd15", "v_prediction", 5.0),
    "SDXL, epsilon": ("sdxl", "epsilon", None),
}
# What is compared -> the largest relative error that is allowed.
BOUNDS = {
    "text states": 1e-4, "VAE moments": 1e-4, "residuals of the ControlNet": 1e-4, "prediction": 1e-4, "loss": 1e-5,
    "gradients, worst": 2e-3, "gradients, median": 2e-4, "weights after 20 updates": 1e-3, "loss of 50 updates": 1e-3,
    "picture, mean difference of 255": 1.0,
}  # fmt: skip


def relative(ours, theirs):
    """The largest difference, relative to the largest entry."""
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def make_batch(kind, number, widths):
    """What both sides get for one update: batch 2, not square, a log-variance that matters."""
    normal = lambda what, *shape: rng.normal(0, f"parity {what}", number, shape=(2, *shape))  # noqa: E731
    batch = {"moments": normal("moments", 8, 8, 12), "posterior": normal("posterior", 4, 8, 12), "noise": normal("noise", 4, 8, 12)}
    batch["condition"] = 1 / (1 + np.exp(-normal("condition", 3, 64, 96)))
    batch["timesteps"] = rng.generator(0, "parity timesteps", number).integers(0, 1000, 2).astype(np.int32)
    batch["text"] = normal("text", 77, sum(widths))
    if kind == "sdxl":
        batch.update(pooled=normal("pooled", widths[1]), time_ids=np.array([[64, 96, 0, 0, 64, 96]] * 2, np.float32))
    return batch


ORDER = ("moments", "condition", "posterior", "noise", "timesteps", "text", "pooled", "time_ids")


def make_step(kind, unet, controlnet, config, prediction_type, gamma, rate, clip):
    script = train_controlnet_sdxl if kind == "sdxl" else train_controlnet
    args = script.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x", f"--max_grad_norm={clip}"])
    alphas = diffusion.alphas_cumprod(config)
    weights = diffusion.min_snr_weights(alphas, gamma, prediction_type)
    optimizer = optim.AdamW([{"params": list(controlnet.get_parameters()), "lr": rate, "weight_decay": 1e-2}], beta1=0.9 if clip else 0.0)
    make = script.TrainStepForControlNetSDXL if kind == "sdxl" else script.TrainStepForControlNet
    return make(
        controlnet, unet, optimizer, ms.Tensor(alphas, ms.float32), ms.Tensor(weights, ms.float32), ms.float32, args, prediction_type,
        0.18215, None, ms.float32, precision.loss_scaler("no"),
    )  # fmt: skip


def new_controlnet(root, unet):
    """One whose zero projections have values, so that everything has a gradient."""
    controlnet = models.unet_controlnet(unet, 0)
    for name, parameter in models.model_parameters(controlnet).items():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
            parameter.set_data(ms.Tensor(0.05 * rng.normal(0, name, shape=parameter.shape)))
    return controlnet


def values(controlnet):
    return {name: np.array(parameter.asnumpy()) for name, parameter in models.model_parameters(controlnet).items()}


def run_case(work, kind, prediction_type, gamma, reference):
    root, full = work / "pipeline", precision.resolve_precision("no")
    make_tiny_pipeline.KINDS[kind](root, scheduler={"prediction_type": prediction_type})
    widths = make_tiny_pipeline.SDXL_WIDTHS if kind == "sdxl" else (make_tiny_pipeline.WIDTH,)
    scene = draw_scene(np.random.default_rng(0), "all")
    conditioning(scene, 64).save(work / "condition.png")
    pixels, start = data.pixel_values(picture(scene, 64), 64, "lanczos", None, False)[None], rng.normal(0, "start", shape=(1, 4, 8, 8))
    batches = [make_batch(kind, number, widths) for number in range(UPDATES)]
    flat = {f"{number}/{name}": value for number, batch in enumerate(batches) for name, value in batch.items()}
    np.savez(work / "inputs.npz", pixels=pixels, start=start, **flat)
    settings = {"kind": kind, "prediction_type": prediction_type, "snr_gamma": gamma, "scaling_factor": 0.18215, "updates": UPDATES}
    settings.update(learning_rate=1e-3, caption=CAPTION, condition=str(work / "condition.png"))
    (work / "settings.json").write_text(json.dumps(settings))

    unet = models.load_model(root, "unet", full)
    precision.freeze_params(unet)
    controlnet = new_controlnet(root, unet)
    models.save_model(controlnet, work / "controlnet", ms.float32)
    subprocess.run([reference, str(Path(__file__).with_name("reference.py")), str(work)], check=True)
    theirs = np.load(work / "theirs.npz")

    errors = {}
    stage = encode.Stage(root, None, "no", work / "cache", 77, kind="sdxl" if kind == "sdxl" else "sd")
    stage.prepare([CAPTION, ""], [])
    text = stage.text(CAPTION)
    states = np.concatenate([theirs[f"text states{tail}"][0] for tail in ("", "_2")[: len(widths)]], axis=-1)
    errors["text states"] = relative(text["prompt_embeds"], states)
    if kind == "sdxl":
        errors["text states"] = max(errors["text states"], relative(text["pooled_prompt_embeds"], theirs["pooled text"][0]))
    vae = stage.load_vae()
    errors["VAE moments"] = relative(vae.encode(ms.Tensor(pixels))[0].asnumpy(), theirs["VAE moments"])

    config = models.read_config(root, "scheduler")
    given = [[ms.Tensor(batch[name]) for name in ORDER if name in batch] for batch in batches]
    step = make_step(kind, unet, controlnet, config, prediction_type, gamma, 0.0, clip=0)
    caught = {}
    original = step.controlnet.construct

    def construct(*args, **kwargs):
        caught["residuals"] = original(*args, **kwargs)
        return caught["residuals"]

    step.controlnet.construct = construct
    errors["prediction"] = relative(step.predict(*given[0])[0].asnumpy(), theirs["prediction"])
    step.controlnet.construct = original
    residuals = [*caught["residuals"][0], caught["residuals"][1]]
    errors["residuals of the ControlNet"] = max(relative(r.asnumpy(), theirs[f"residual {n}"]) for n, r in enumerate(residuals))
    loss = float(step(*given[0])[1])
    errors["loss"] = abs(loss / theirs["losses"][0] - 1)
    names = list(models.model_parameters(controlnet))
    gaps = [relative(moment.asnumpy(), theirs[f"gradient {name}"]) for name, moment in zip(names, step.optimizer.exp_avg)]
    errors["gradients, worst"], errors["gradients, median"] = max(gaps), float(np.median(gaps))

    controlnet = new_controlnet(root, unet)
    before = values(controlnet)
    for parameter in controlnet.get_parameters():
        parameter.requires_grad = True
    step, losses = make_step(kind, unet, controlnet, config, prediction_type, gamma, 1e-3, clip=1.0), []
    for number, batch in enumerate(given):
        losses.append(float(step(*batch)[1]))
        if number == 19:
            moved = [(value, theirs[f"weight {name}"], before[name]) for name, value in values(controlnet).items()]
            apart, way = (np.sqrt(sum(np.square(a - b).sum() for a, b in rows)) for rows in zip(*(((o, t), (t, s)) for o, t, s in moved)))
            errors["weights after 20 updates"] = float(apart / way)
    errors["loss of 50 updates"] = float(np.abs(np.array(losses) / theirs["losses"] - 1).max())

    pixels = sampling.condition_pixels(sampling.condition_picture(str(work / "condition.png"), "", 64, 8))
    with sampling.eager():
        controlnet = new_controlnet(root, unet)
        control = (controlnet, pixels, 1.0)
        drawn = sampling.sample_unet_latents(unet, config, text, stage.unconditional(), start, 8, 5.0, ms.float32, control)
        image = np.asarray(sampling.decode_latents(vae, drawn, ms.float32)[0], float)
    errors["picture, mean difference of 255"] = float(np.abs(image - theirs["picture"]).mean())
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", required=True, help="The interpreter that has tests/parity/requirements.txt.")
    reference = parser.parse_args().reference
    models.set_up_device(graph_mode=False)
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            found[name] = run_case(Path(work), *case, reference)
        print(name, *(f"{what}: {error:.1e}" for what, error in found[name].items()), sep="\n  ", flush=True)
    wrong = [f"{name}: {what} {error:.1e}" for name, errors in found.items() for what, error in errors.items() if not error <= BOUNDS[what]]
    (ROOT / "docs" / "parity.md").write_text(page(found, reference))
    if wrong:
        raise SystemExit("beyond the bounds:\n" + "\n".join(wrong))


def page(found, reference):
    """docs/parity.md."""
    asked = "import json, torch, diffusers, transformers; print(json.dumps([m.__version__ for m in (torch, diffusers, transformers)]))"
    theirs = json.loads(subprocess.run([reference, "-c", asked], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    ours = tracking.package_versions()
    head = "| | bound | " + " | ".join(found) + " |\n| --- | --- |" + " --- |" * len(found) + "\n"
    rows = "".join(
        f"| {what} | {bound:.0e} | " + " | ".join(f"{errors[what]:.1e}" for errors in found.values()) + " |\n"
        for what, bound in BOUNDS.items()
    )
    return f"""# Parity with PyTorch

Written by `make parity`: tiny random pipelines, the same weights, batches and draws on both sides, float32.

- There: PyTorch {theirs[0]}, diffusers {theirs[1]}, transformers {theirs[2]}; step and loop are our own (`tests/parity/reference.py`).
- Here: the scripts' training steps in PyNative on mindspore {ours["mindspore"]}, mindone {ours["mindone"]}. CPU, {platform.machine()}.

Errors are the largest difference relative to the largest entry; of the weights the distance relative to the way moved; of gradients
the worst and the median of all parameters.

{head}{rows}"""


if __name__ == "__main__":
    main()
