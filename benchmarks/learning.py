"""Trains the demos in every setting that must learn equally well, and in settings that must not learn. For `make
bench`.

    python benchmarks/learning.py [lora] [masks] [controlnet] [control-lora] [kontext]

Expect about an hour on two cores. Prints one line per measured value with its bound, and exits with 1 if a bound
is not met. `make test` trains less: the LoRA for fewer updates, the ControlNet on eight pairs
(tests/examples/test_learning.py, test_control_learning.py).
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "tiny")]

import demo_flux_control_lora
import demo_flux_controlnet
import demo_flux_kontext
import demo_flux_lora
import evaluate_shapes
import shapes

BACKGROUNDS = [name for name in shapes.COLOURS if name not in shapes.SUBJECT]
SUBJECT_PROMPTS = [f"a sks circle on a {background} background" for background in BACKGROUNDS]
CLASS_PROMPTS = [
    f"a {colour} circle on a {background} background"
    for colour in shapes.COLOURS
    for background in BACKGROUNDS
    if colour != background
]
INT8 = ("--base_precision", "int8")


def run(words, *flags):
    """Runs a script of the repository; later flags win over earlier ones."""
    line = [sys.executable, *shlex.split(words), *map(str, flags)]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:])


# ---- the LoRA demo -------------------------------------------------------------------------------


def train_lora(work, name, *flags):
    """The output directory of the demo's training with further flags. Runs below one `work` share data and cache."""
    if not (work / "subject").exists():
        shapes.make_subject(work / "subject", 64)
    # Validation images would take longer than the training.
    words = re.sub('--validation_prompt ".*?"', "", demo_flux_lora.TRAIN).format(out=shlex.quote(str(work)))
    run(words, "--output_dir", work / name, "--cache_dir", work / "cache", "--report_to", "none", *flags)
    return work / name


def generate(output, adapter, prompts, count, *flags):
    """`count` images per prompt with an adapter, or from the same noise without one (None); `output` is their grid."""
    words = demo_flux_lora.INFER.replace("--lora {out}/lora", "").replace("--compare", "")
    words = words.format(out="unused", prompts=shlex.join(prompts))
    adapter_flags = ["--lora", adapter] if adapter else []
    run(words, *adapter_flags, "--num_images_per_prompt", count, "--output", output, *flags)
    return [Image.open(output.with_name(f"{output.stem}-{n + 1}.png")) for n in range(count * len(prompts))]


def subject_rate(images):
    """The fraction of images that show the subject."""
    return float(np.mean([evaluate_shapes.is_subject(image, shapes.SUBJECT) for image in images]))


def mean_loss(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(np.mean([line["loss"] for line in lines if "loss" in line]))


def lora(work):
    """Rows of (what, value, least, most)."""

    def rate(name, count, *flags, adapter=True):
        folder = work / name if adapter else None
        return subject_rate(generate(work / f"{name} images" / "grid.png", folder, SUBJECT_PROMPTS, count, *flags))

    train_lora(work, "fp32")
    yield "base model: rate of the subject", rate("base", 2, adapter=False), 0.0, 0.1
    full = rate("fp32", 4)
    yield "float32: rate of the subject", full, 0.8, 1.0
    train_lora(work, "rate 0", "--learning_rate", 0, "--max_train_steps", 10)
    yield "learning rate 0: rate of the subject", rate("rate 0", 2), 0.0, 0.1
    for name in ("fp16", "bf16"):
        train_lora(work, name, "--mixed_precision", name)
        yield f"{name}: rate of the subject", rate(name, 4), 0.95 * full, 1.0
    train_lora(work, "int8", *INT8)
    yield "int8: mean loss over that of float32", mean_loss(work / "int8") / mean_loss(work / "fp32"), 0.99, 1.01
    yield "int8: rate of the subject", rate("int8", 4, *INT8), full - 0.05, 1.0
    yield from prior_preservation(work, rate)


def prior_preservation(work, rate):
    """Class images of every second class prompt, made by the base model, keep the other class prompts as they were."""
    trained = CLASS_PROMPTS[::2]
    asked = CLASS_PROMPTS[1::2]
    folder = work / "class"
    folder.mkdir()
    images = evaluate_shapes.generate(ROOT / "examples/tiny/flux-shapes", trained, seed=5)
    for number, (image, caption) in enumerate(zip(images, trained)):
        image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption)
    flags = ["--with_prior_preservation", "--class_data_dir", folder, "--class_prompt", "a circle"]
    adapter = train_lora(work, "prior", *flags, "--num_class_images", len(trained))
    base, adapted = (
        evaluate_shapes.score(generate(work / name / "grid.png", lora_folder, asked, 1), asked)["all"]
        for name, lora_folder in (("class base", None), ("class adapted", adapter))
    )
    yield "prior preservation: base model's score of the class", base, 0.5, 1.0
    yield "prior preservation: adapter's score of the class", adapted, 0.9 * base, 1.0
    yield "prior preservation: rate of the subject", rate("prior", 2), 0.8, 1.0


# ---- masks ---------------------------------------------------------------------------------------

STAMP = 14  # pixels along a side of the square in the corner of every image


def stamp(image):
    """Puts a square, half black and half white, into the upper left corner."""
    image.paste((20, 20, 20), (0, 0, STAMP, STAMP))
    image.paste((245, 245, 245), (STAMP // 2, 0, STAMP, STAMP))
    return image


def stamp_rate(images):
    """The fraction of images with the stamp: the brightness of its halves differs by a quarter of what it should."""
    corners = np.array([np.asarray(image.convert("L"), np.float32)[2 : STAMP - 2, 1 : STAMP - 1] for image in images])
    half = corners.shape[2] // 2
    return float(np.mean(corners[:, :, half:].mean(axis=(1, 2)) - corners[:, :, :half].mean(axis=(1, 2)) > 56))


def masks(work, picture=ROOT / "docs" / "masked_loss.png"):
    """All training images have a stamp in a corner, which the masks leave out. Rows of (what, value, least, most).

    Draws the images without and with masks side by side.
    """
    shapes.make_subject(work / "subject", 64)
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 16, 16))  # whole latents
    for path in sorted((work / "subject").glob("sks-*.png")):
        stamp(Image.open(path)).save(path)
        mask.save(path.with_suffix(".mask.png"))
    grids = []
    for name, flags, least, most in (("without masks", [], 0.6, 1.0), ("with masks", ["--masked_loss"], 0.0, 0.1)):
        train_lora(work, name, *flags)
        images = generate(work / f"{name} images" / "grid.png", work / name, SUBJECT_PROMPTS, 4)
        grids.append(Image.open(work / f"{name} images" / "grid.png"))
        yield f"{name}: rate of the stamp", stamp_rate(images), least, most
        yield f"{name}: rate of the subject", subject_rate(images), 0.8, 1.0
    side_by_side = Image.new("RGB", (2 * grids[0].width + 16, grids[0].height), "white")
    side_by_side.paste(grids[0], (0, 0))
    side_by_side.paste(grids[1], (grids[0].width + 16, 0))
    side_by_side.quantize(64).save(picture, optimize=True)


# ---- the ControlNet demo -------------------------------------------------------------------------


def make_pairs(work, shuffled=False):
    """Training and held-out pairs below `work`; `shuffled` gives every training image the outline of another one."""
    shapes.make_folder(work / "train", 400, 64, 0, "train")
    shapes.make_folder(work / "held_out", 16, 64, 0, "held_out")
    if shuffled:
        path = work / "train" / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        outlines = [row["conditioning_image_file_name"] for row in rows]
        for row, outline in zip(rows, np.random.default_rng(0).permutation(outlines)):
            row["conditioning_image_file_name"] = str(outline)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_controlnet(work, updates, *flags):
    """A short run of the demo's training, with further flags, on the pairs below `work`."""
    words = demo_flux_controlnet.TRAIN.format(out=shlex.quote(str(work)), steps=updates)
    run(words, "--validation_split", 0, "--report_to", "none", *flags)


def mean_overlap(work, name, scale):
    """Mean intersection over union with the target on the held-out pairs, with the ControlNet at `scale`."""
    return float(np.mean(demo_flux_controlnet.generate(work, name, scale)[1]))


def controlnet(work):
    """Rows of (what, value, least, most)."""
    for name, shuffled in (("paired", False), ("shuffled", True)):
        make_pairs(work / name, shuffled)
        train_controlnet(work / name, 250)
    base = mean_overlap(work / "paired", "base", 0.0)
    yield "paired outlines: overlap", mean_overlap(work / "paired", "controlled", 1.0), max(0.58, base + 0.25), 1.0
    yield "shuffled outlines: overlap", mean_overlap(work / "shuffled", "controlled", 1.0), 0.0, 0.5


# ---- the Control-LoRA demo -----------------------------------------------------------------------


def train_control_lora(work, updates, *flags):
    """A short run of the demo's training, with further flags, on the pairs below `work`."""
    words = demo_flux_control_lora.TRAIN.format(out=shlex.quote(str(work)), steps=updates)
    run(words, "--validation_split", 0, "--report_to", "none", *flags)


def control_lora(work):
    """Rows of (what, value, least, most)."""
    for name, shuffled in (("paired", False), ("shuffled", True)):
        make_pairs(work / name, shuffled)
        train_control_lora(work / name, 250)

    def overlap(name, scale):
        return float(np.mean(demo_flux_control_lora.generate(work / name, f"scale {scale}", scale)[1]))

    base = overlap("paired", 0.0)
    yield "paired outlines, Control-LoRA: overlap", overlap("paired", 1.0), max(0.58, base + 0.25), 1.0
    yield "shuffled outlines, Control-LoRA: overlap", overlap("shuffled", 1.0), 0.0, 0.5


# ---- the Kontext demo ----------------------------------------------------------------------------


def train_kontext(work, updates, *flags):
    """A run of the demo's training, with further flags, on the edits below `work`."""
    words = demo_flux_kontext.TRAIN.format(out=shlex.quote(str(work)), steps=updates)
    run(words, "--validation_split", 0, "--report_to", "none", *flags)


def kontext(work):
    """Rows of (what, value, least, most)."""
    shapes.make_edits(work / "train", demo_flux_kontext.PAIRS, 64, 0, "train")
    shapes.make_edits(work / "held_out", 48, 64, 0, "held_out")

    def rate(name, scale):
        return float(np.mean(demo_flux_kontext.generate(work, name, scale)[1]))

    train_kontext(work, 10, "--learning_rate", 0)
    yield "base model: rate of right edits", rate("base", 0.0), 0.0, 0.2
    yield "learning rate 0: rate of right edits", rate("rate 0", 1.0), 0.0, 0.2
    train_kontext(work, demo_flux_kontext.UPDATES)
    yield "rate of right edits", rate("edited", 1.0), 0.7, 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    demos = {"lora": lora, "masks": masks, "controlnet": controlnet, "control-lora": control_lora, "kontext": kontext}
    parser.add_argument(
        "demos", nargs="*", metavar="DEMO", default=list(demos), help=f"{', '.join(demos)}. Default: all."
    )
    failed = False
    for name in parser.parse_args().demos:
        with tempfile.TemporaryDirectory() as folder:
            for what, value, least, most in demos[name](Path(folder)):
                met = least <= value <= most
                failed |= not met
                print(f"{'ok  ' if met else 'MISS'}  {what}: {value:.3f}, bounds {least:.3f} to {most:.3f}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
