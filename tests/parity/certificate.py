"""Compares our training steps with PyTorch's on the same weights, batches and draws; writes docs/parity.md and
golden.json.

    python tests/parity/certificate.py --reference PYTHON

`make parity` runs this. PYTHON is the interpreter with tests/parity/requirements.txt. --only WORDS runs the cases whose
names contain all of them, and writes nothing. golden.json keeps the results of PyTorch that `make test` compares with
(test_golden.py).
"""

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path

import interchange
import mindspore as ms
import numpy as np
import optimizers
from cases import CASES, ROOT, Ours, all_settings, arguments, make_batches, make_pipeline, make_stage, scene
from PIL import Image
from shapes import render, render_outline

from mindtune import rng
from mindtune.data import crops
from mindtune.models import execution
from mindtune.run import tracking

HERE = Path(__file__).parent
TITLES = {
    "flux_lora": "flux_lora/train_dreambooth_lora_flux.py",
    "flux_controlnet": "flux_controlnet/train_controlnet_flux.py",
    "flux_kontext": "examples/flux_kontext/train_lora_flux_kontext.py",
    "flux_control": "examples/flux_control/train_control_lora_flux.py",
    "sd15": "examples/controlnet/train_controlnet.py",
    "sdxl": "examples/controlnet/train_controlnet_sdxl.py",
}
# What is compared -> the bounds on the largest relative error and on the median.
BOUNDS = {
    "text states": (1e-4, None),
    "VAE latents": (1e-4, None),
    "output of each block": (1e-4, None),
    "prediction": (1e-4, None),
    "target": (1e-4, None),
    "loss": (1e-5, None),
    "gradient of each trainable": (2e-3, 2e-4),
    "weights after 20 updates": (1e-3, None),
    "loss of 50 updates": (1e-3, None),
    "image, mean difference of 255": (1.0, None),
}


def run_reference(python, script, *folders):
    """Runs a script beside this one with the interpreter that has PyTorch."""
    subprocess.run([python, str(HERE / script), *map(str, folders)], check=True)


def relative(ours, theirs):
    """The difference of every entry, relative to the largest entry of `theirs`."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    return (np.abs(ours - theirs) / max(np.abs(theirs).max(), 1e-12)).ravel()


def worst(ours, theirs):
    return relative(ours, theirs).max()


# ---- one case ------------------------------------------------------------------------------------


def prepare(case, work, pipelines, stages):
    """Writes the inputs of reference.py; returns settings, pipeline, encoder stage and batches."""
    work.mkdir()
    root = make_pipeline(case, pipelines)
    settings = all_settings(case, root)
    stage = make_stage(settings, root, stages)
    batches = make_batches(settings, root, settings["updates"], stage)
    example = scene(0, 0)
    size = (64, 64) if settings.get("trained") else (64, 96)
    fit = {"size": size, "interpolation": "lanczos", "place": None, "flip": False}
    pixels = crops.pixel_values(render(example, 96), *fit.values())[None]
    outline = render_outline(example, 96).resize(size[::-1])
    outline.convert("L").save(work / "mask.png")
    condition = outline.convert("RGB")
    if settings.get("fill") or settings.get("source"):
        condition = render(example, 96).resize(size[::-1])
    if source := settings.get("source"):
        factor = size[0] // batches[0]["noise"].shape[2]
        condition = condition.resize((factor * source[1], factor * source[0]))
    condition.save(work / "condition.png")
    start = rng.normal(0, "start", shape=(1, batches[0]["noise"].shape[1], size[0] // 8, size[1] // 8))
    flat = {f"{number}/{name}": value for number, batch in enumerate(batches) for name, value in batch.items()}
    np.savez(work / "inputs.npz", pixels=pixels, start=start, **flat)
    (work / "settings.json").write_text(json.dumps(settings))
    Ours(settings, root).save(work)
    return settings, root, stage, batches


def compare(work, settings, root, stage, batches):
    """Row of the table -> (largest, median) of its relative errors, over entries, blocks, parameters or updates."""
    theirs = np.load(work / "theirs.npz")
    inputs = np.load(work / "inputs.npz")
    errors = {}
    stage.prepare([*settings["texts"], settings["caption"], ""], [])
    texts = [stage.text(caption) for caption in settings["texts"]]
    text = {f"text {number} {name}": value for number, found in enumerate(texts) for name, value in found.items()}
    assert text.keys() == {name for name in theirs.files if name.startswith("text ")}
    errors["text states"] = np.concatenate([relative(value, theirs[name]) for name, value in text.items()])
    moments = stage.load_vae().encode(ms.Tensor(inputs["pixels"]))[0]
    errors["VAE latents"] = relative(moments.asnumpy(), theirs["VAE moments"])

    ours = Ours(settings, root)
    given = [arguments(settings, batch) for batch in batches]
    step = ours.step(train=False)
    blocks, (prediction, target, _) = ours.block_outputs(lambda: step.predict(*given[0]))
    assert blocks.keys() == {name for name in theirs.files if name.startswith("block ")}
    errors["output of each block"] = [worst(value, theirs[name]) for name, value in blocks.items()]
    errors["prediction"] = relative(prediction.asnumpy(), theirs["prediction"])
    errors["target"] = relative(target.asnumpy(), theirs["target"])
    errors["loss"] = [abs(float(step(*given[0])[1]) / theirs["losses"][0] - 1)]
    gradients = ours.gradients(step)
    assert {f"gradient {name}" for name in gradients} == {name for name in theirs.files if name.startswith("gradient ")}
    errors["gradient of each trainable"] = [
        worst(value, theirs[f"gradient {name}"]) for name, value in gradients.items()
    ]
    shown = [Image.open(work / f"{name}.png") for name in ("condition", "mask")]
    image = ours.image(stage, inputs["start"], *shown).astype(float)
    errors["image, mean difference of 255"] = [np.abs(image - theirs["image"]).mean()]

    start = {name: p.asnumpy().copy() for name, p in ours.trained.items()}
    step = ours.step()
    losses = []
    for number, batch in enumerate(given):
        losses.append(float(step(*batch)[1]))
        if number == 19:
            trained = {name: p.asnumpy() for name, p in ours.trained.items()}
            error = sum(np.square(value - theirs[f"weight {name}"]).sum() for name, value in trained.items())
            change = sum(np.square(theirs[f"weight {name}"] - value).sum() for name, value in start.items())
            errors["weights after 20 updates"] = [np.sqrt(error) / np.sqrt(change)]
    errors["loss of 50 updates"] = np.abs(np.array(losses) / theirs["losses"] - 1)
    return {row: (float(np.max(values)), float(np.median(values))) for row, values in errors.items()}


# ---- golden values -------------------------------------------------------------------------------


def rounded(values):
    """To nine significant digits."""
    return [float(f"{value:.9g}") for value in np.ravel(values)]


def golden(work):
    """The results of PyTorch that golden.json keeps: losses, and of twelve gradients the norm and four entries."""
    theirs = np.load(work / "theirs.npz")
    names = sorted(name for name in theirs.files if name.startswith("gradient "))
    kept = [names[i] for i in np.linspace(0, len(names) - 1, 12).round().astype(int)]
    gradients = {}
    for name in kept:
        value = theirs[name]
        largest = np.argsort(np.abs(value).ravel())[-4:]
        gradients[name[len("gradient ") :]] = {
            "norm": rounded(np.linalg.norm(value)),
            "at": largest.tolist(),
            "entries": rounded(value.ravel()[largest]),
        }
    return {
        "losses": rounded(theirs["losses"][:3]),
        "prediction": rounded(theirs["prediction"].ravel()[:8]),
        "gradients": gradients,
    }


# ---- the page ------------------------------------------------------------------------------------


def beyond(found):
    """A line for every error outside its bounds."""
    for name, errors in found.items():
        for row, values in errors.items():
            for value, bound, what in zip(values, BOUNDS[row], ("largest", "median")):
                if bound is not None and not value <= bound:
                    yield f"{name}: {row}: {what} {value:.1e}, bound {bound:.0e}"


def table(found):
    """The Markdown table of a script: a row per quantity, a column per case."""
    names = [label.partition(": ")[2] for label in found]
    head = "| largest (median) | bound | " + " | ".join(names) + " |\n| --- | --- |" + " --- |" * len(found) + "\n"
    for row, (bound, median) in BOUNDS.items():
        limit = f"{bound:.0e}" + (f" ({median:.0e})" if median else "")
        cells = [errors[row] for errors in found.values()]
        shown = [f"{a:.1e}" if a == b else f"{a:.1e} ({b:.1e})" for a, b in cells]
        head += f"| {row} | {limit} | {' | '.join(shown)} |\n"
    return head


def plain_table(head, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def page(found, exchanged, optimized, reference):
    """The text of docs/parity.md."""
    code = "import json, torch, diffusers, transformers, peft\n"
    code += "print(json.dumps([module.__version__ for module in (torch, diffusers, transformers, peft)]))"
    printed = subprocess.run([reference, "-c", code], capture_output=True, text=True, check=True).stdout
    theirs = json.loads(printed.splitlines()[-1])
    ours = tracking.package_versions()
    tables = ""
    for kind, title in TITLES.items():
        cases = {label: errors for label, errors in found.items() if label.startswith(f"{kind}: ")}
        tables += f"\n## {title}\n\n{table(cases)}"
    rows = [
        (what, f"{value:.1e}", f"{bound:g}", "" if other is None else f"{other:.1e}")
        for what, value, bound, other in exchanged
    ]
    exchange = plain_table(("", "found", "bound", "if it were not loaded, or trained"), rows)
    optimizer = plain_table(
        ("", "found", "bound"), [(what, f"{value:.1e}", f"{bound:.0e}") for what, (value, bound) in optimized.items()]
    )
    return TEXT.format(
        theirs=theirs, ours=ours, machine=platform.machine(), tables=tables, exchange=exchange, optimizer=optimizer
    )


TEXT = """# Parity with PyTorch

`make parity` writes this page. Both sides get the same weights, batches and draws, in float32. The
models are tiny random pipelines and the trained one in
[examples/tiny/flux-shapes](../examples/tiny/flux-shapes/README.md). A column with a model's name uses
the file names, config keys and tensor names of that published model at small sizes
(`tests/real_pipelines.py`). Its text states are those of a short caption, of an empty one, and of one
that fills all 77 (CLIP) and 512 (T5) tokens.

- There: PyTorch {theirs[0]}, diffusers {theirs[1]}, transformers {theirs[2]}, peft {theirs[3]} as libraries. Step and
  loop are our own (`tests/parity/reference.py`).
- Here: the scripts' training steps in PyNative on mindspore {ours[mindspore]}, mindone {ours[mindone]}. CPU, {machine}.

Errors of a tensor are relative to its largest entry, errors of a loss to the loss. For weights, the
error is the distance between the two results divided by the distance that training moved them. Each
cell has the largest error and in brackets the median, over entries, blocks, parameters or updates.

Three differences explain the remaining errors:

- mindone computes the frequencies of the timestep's sinusoids with `ops.exp`, whose CPU kernel has an
  error of 5e-6. At a timestep of 1000 this alone caused errors of 3e-4 in FLUX's blocks and 1.3e-3 in
  the gradients. `mindtune/models/replaced_layers.py` computes the frequencies on the host instead, from
  exponents that are rounded to float32 as PyTorch's are. With exact exponents, the sinusoids of
  guidance 3.5, an angle of 3500, differed by 1e-4, and the loss of a Control-LoRA by 2e-5.
- AdamW's epsilon is 1e-5 in these tables. At 1e-8, a gradient that is only rounding error moves its
  weight by a whole step in either direction; one such weight caused an error of 4.4e-3 in the adapter.
  The table of optimizers below uses 1e-8.
- Some parameters do not affect the loss: the last double block's text stream in a ControlNet without
  single blocks. In PyTorch they have no gradient, and AdamW skips them. Here their gradient is zero, and
  their weights decay. The reference does the same.
{tables}
## Files that go both ways

Files come from our scripts (three updates; LoRA of rank 4, alpha 8, with every kind of layer) or from
diffusers and peft (LoRA of rank 6, alpha 9; Control-LoRAs of alpha 6, saved as
`train_control_lora_flux.py` does, and loaded on the text-to-image model). Our inference scripts and
diffusers' pipelines generate images with them from the same noise. The last column is for comparison:
the difference when the file is not loaded or, in the rows about training, when the learning rate is
not 0.

{exchange}
diffusers' converters require FLUX.1's width, so our tensors are repeated to that width. In kohya's
layout, diffusers {theirs[1]} does not read the CLIP part under the name that sd-scripts writes; the test
renames it (`tests/parity/lora_layouts_reference.py`). In Black Forest Labs' Control-LoRAs, diffusers
{theirs[1]} swaps the halves of both A and B of `norm_out.linear`. Only those of B are halves of its
outputs; the test undoes the other swap. The trained norms that diffusers' `train_control_lora_flux.py`
writes have the prefix `transformer.` twice: our scripts load them, diffusers' pipeline ignores them with
a warning. The image to compare with is that of the trained model itself.

## Optimizers and schedules

Each optimizer minimizes a noisy quadratic for 100 updates, with weight decay and schedules, and with the
same noise on both sides. The error is the distance between the two results divided by the distance
that the weights moved. For a schedule it is the largest difference of the factor
(`tests/parity/optimizers.py`).

{optimizer}"""


def check_interchange(reference, work):
    """The rows of `interchange.compare`, and a line for each that is outside its bound."""
    work.mkdir()
    roots, data = interchange.prepare(work)
    run_reference(reference, "interchange_reference.py", work)
    run_reference(reference, "lora_layouts_reference.py", work / "layouts")
    rows = interchange.compare(work, roots, data)
    return rows, [f"{what}: {value:.1e}, bound {bound:g}" for what, value, bound, _ in rows if not value <= bound]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", required=True, help="Python interpreter with tests/parity/requirements.txt.")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="Run only cases whose names contain all these words, and write nothing. Default: all cases.",
    )
    args = parser.parse_args()
    execution.set_up_device(graph_mode=False)
    chosen = [case for case in CASES if all(word in case.label for word in args.only)]
    golden_labels = {case.label for case in chosen if case.golden}
    found = {}
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        works = {case.label: folder / f"case-{number}" for number, case in enumerate(chosen)}
        prepared = {case.label: prepare(case, works[case.label], folder, folder / "cache") for case in chosen}
        run_reference(args.reference, "reference.py", *works.values())
        for label, work in works.items():
            found[label] = compare(work, *prepared[label])
            if label in golden_labels:
                kept[label] = golden(work)
            print(label, *(f"{row}: {a:.1e} ({b:.1e})" for row, (a, b) in found[label].items()), sep="\n  ", flush=True)
        wrong = list(beyond(found))
        if not args.only:
            exchanged, lines = check_interchange(args.reference, folder / "interchange")
            optimized = optimizers.compare(folder, args.reference)
            kept["optimizers"] = optimizers.golden(folder)
            wrong += lines
            for what, (value, bound) in optimized.items():
                if not value <= bound:
                    wrong.append(f"{what}: {value:.1e}, bound {bound:.0e}")
            (ROOT / "docs" / "parity.md").write_text(page(found, exchanged, optimized, args.reference))
            lines = ",\n".join(f"{json.dumps(label)}: {json.dumps(values)}" for label, values in kept.items())
            (HERE / "golden.json").write_text(f"{{\n{lines}\n}}\n")
    if wrong:
        raise SystemExit("outside the bounds:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
