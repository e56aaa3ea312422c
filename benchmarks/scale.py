"""How starts, disk and memory grow with the data set.

    python benchmarks/scale.py [--counts 1000 10000 50000] [--work FOLDER]

Generates pairs of 512 pixels in the manner of fill50k and trains Stable Diffusion's ControlNet script on them: a tiny
model, cached latents of 64 pixels, batch size 4, in PyNative. Each set is mapped (encoded whole before training),
windowed (--cache_limit_gb for an eighth of 1,000 pairs) and streamed. A run ends after its second update; then it is
resumed for one more. Expect an hour on two cores, 2 GB of disk in FOLDER, and nothing else running. Writes
benchmarks/results/scale.json, and the tables and docs/scale.png of docs/scale.md; --report writes only these.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "tiny")]
SCRIPT = ROOT / "examples" / "controlnet" / "train_controlnet.py"
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
COUNTS = [1000, 10_000, 50_000]
CAPTIONS = 500  # different ones, whatever the number of pairs
COLOURS = ["red", "green", "blue", "cyan", "magenta", "yellow", "orange", "purple", "brown", "gray"]
WAYS = {
    "mapped": [],
    "windowed": ["--cache_limit_gb", "0.004"],
    "streamed": ["--streaming", "--shuffle_buffer_size", "100"],
}


# ---- pairs ---------------------------------------------------------------------------------------


def draw_pair(job):
    """A filled circle on a background, and its outline as the condition image: PNG files of 512 pixels."""
    folder, number = job
    numbers = random.Random(number)
    x, y, radius = numbers.randrange(100, 412), numbers.randrange(100, 412), numbers.randrange(30, 100)
    box = (x - radius, y - radius, x + radius, y + radius)
    colours = [tuple(numbers.randrange(256) for _ in range(3)) for _ in range(2)]
    image, outline = Image.new("RGB", (512, 512), colours[0]), Image.new("RGB", (512, 512))
    ImageDraw.Draw(image).ellipse(box, fill=colours[1])
    ImageDraw.Draw(outline).ellipse(box, outline="white", width=2)
    image.save(folder / f"images/{number:06d}.png", compress_level=1)
    outline.save(folder / f"conditions/{number:06d}.png", compress_level=1)


def make_pairs(folder, count):
    """`count` pairs with a metadata.jsonl."""
    if (folder / "metadata.jsonl").exists():
        return
    for name in ("images", "conditions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw_pair, ((folder, number) for number in range(count)), chunksize=100))
    lines = []
    for number in range(count):
        colour, variant = COLOURS[number % 10], number // 10 % (CAPTIONS // 10)
        row = {"file_name": f"images/{number:06d}.png"}
        row["conditioning_image_file_name"] = f"conditions/{number:06d}.png"
        row["text"] = f"{colour} circle with background {variant}"
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


# ---- a run ---------------------------------------------------------------------------------------


def run_watched(job):
    """Runs the script in this process, and prints when its first update ended and the processor time of its stages."""
    from mindtune.data import pair_data
    from mindtune.encode.encoder_stage import EncoderStage
    from mindtune.run.record import Run

    found = {"check_cpu": 0.0, "encode_cpu": 0.0}

    def cpu():
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    def watch(owner, name, key):
        function = getattr(owner, name)

        def watched(*arguments, **options):
            before = cpu()
            result = function(*arguments, **options)
            found[key] += cpu() - before
            return result

        setattr(owner, name, watched)

    def ended(run, *arguments, **options):
        update(run, *arguments, **options)
        found.setdefault("first_update", time.time() - job["started"])

    update = Run.update
    Run.update = ended
    watch(pair_data, "load", "check_cpu")
    watch(EncoderStage, "prepare", "encode_cpu")
    spec = importlib.util.spec_from_file_location("script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(job["flags"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print("RESULT" + json.dumps({**found, "peak_mb": peak, "encoder_peak_mb": child}))


def run(flags):
    """What `run_watched` finds, in a process of its own."""
    job = json.dumps({"flags": [str(flag) for flag in flags], "started": time.time()})
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads(re.search(r"RESULT(\{.*\})", done.stdout)[1])


def measure(work, count, way):
    """One row: a fresh run and a resumed one."""
    out, cache = work / f"out-{way}-{count}", work / f"cache-{way}-{count}"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    flags = ["--pretrained_model_name_or_path", work / "sd", "--train_data_dir", work / f"pairs-{count}"]
    flags += ["--output_dir", out, "--cache_dir", cache, "--resolution", 64, "--train_batch_size", 4]
    flags += [
        "--cache_latents",
        "--mindspore_mode",
        1,
        "--seed",
        0,
        "--report_to",
        "none",
        "--lr_scheduler",
        "constant",
    ]
    flags += ["--dataloader_num_workers", 2, *WAYS[way]]
    fresh = run([*flags, "--max_train_steps", 2])
    resumed = run([*flags, "--max_train_steps", 3, "--resume_from_checkpoint", "latest"])
    entries = [path.stat().st_size for path in (cache / "mindtune").rglob("*.safetensors")]
    facts = cache / "mindtune" / "images.jsonl"
    row = {
        "way": way,
        "count": count,
        "fresh": fresh["first_update"],
        "resumed": resumed["first_update"],
        "check_cpu": fresh["check_cpu"],
        "resumed_check_cpu": resumed["check_cpu"],
        "encode_cpu": fresh["encode_cpu"],
        "entries": len(entries),
        "disk_mb": (sum(entries) + (facts.stat().st_size if facts.exists() else 0)) / 2**20,
        "peak_mb": max(fresh["peak_mb"], resumed["peak_mb"]),
        "encoder_peak_mb": fresh["encoder_peak_mb"],
    }
    shutil.rmtree(cache)
    return row


# ---- the page ------------------------------------------------------------------------------------


def table(rows):
    """The measured rows as Markdown."""
    lines = ["| pairs | way | first update, s | resumed, s | checking, CPU ms per pair | resumed, CPU ms per pair |"]
    lines[0] += " encoding, CPU s | disk, MB | peak, MB | encoder's peak, MB |"
    lines.append("| --- " * 10 + "|")
    for row in rows:
        cells = [f"{row['count']:,}", row["way"], f"{row['fresh']:.0f}", f"{row['resumed']:.0f}"]
        if row["way"] == "streamed":
            cells += ["when it is read", "when it is read"]
        else:
            cells += [f"{1000 * row[key] / row['count']:.2f}" for key in ("check_cpu", "resumed_check_cpu")]
        cells += [f"{row['encode_cpu']:.0f}", f"{row['disk_mb']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['peak_mb']:,}", f"{row['encoder_peak_mb']:,}"]) + " |")
    return "\n".join(lines)


def computed():
    """Disk and encoder time for FLUX.1-dev, computed from the sizes of its entries and a rate that is assumed."""
    from mindtune.encode.estimate import FLUX_DEV, EntrySizes

    rate = 10.0  # captions or images per second
    lines = [
        "| data | captions | images | text, GB | images, GB | encoder hours at 10 per second |",
        "| --- " * 6 + "|",
    ]
    for name, captions, images in (
        ("fill50k, ControlNet", 50_000, 100_000),
        ("a million captions, LoRA", 10**6, 10**6),
    ):
        for length in (512, 128):
            sizes = EntrySizes.of_encoders(FLUX_DEV, "bf16", length)
            text, latents = captions * sizes.text / 1e9, images * sizes.image((512, 512)) / 1e9
            hours = (captions + images) / rate / 3600
            what = f"{name}, {length} tokens"
            lines.append(f"| {what} | {captions:,} | {images:,} | {text:,.0f} | {latents:,.0f} | {hours:.1f} |")
    return "\n".join(lines)


def plot(rows):
    """docs/scale.png: seconds to the first update, fresh and resumed, by the number of pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("fresh", "resumed")):
        for way in WAYS:
            points = [(row["count"], row[key]) for row in rows if row["way"] == way]
            axes.plot(*zip(*points), marker="o", label=way)
        axes.set(xscale="log", xlabel="pairs of 512 pixels", title=f"seconds to the first update, {key}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(ROOT / "docs" / "scale.png", dpi=110)


def report(result):
    """Puts the tables into docs/scale.md."""
    text = PAGE.read_text()
    for name, lines in (("measured", table(result["rows"])), ("computed", computed())):
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marked.sub(lambda match, lines=lines: match[1] + lines + "\n" + match[2], text)
    PAGE.write_text(text)
    plot(result["rows"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="Numbers of pairs.")
    parser.add_argument("--work", type=Path, help="Folder for pairs and runs, kept. Default: a temporary one.")
    parser.add_argument("--report", action="store_true", help="Only write tables and plot from the saved results.")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return run_watched(json.loads(args.job))
    if args.report:
        return report(json.loads(RESULTS.read_text()))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "sd").exists():
            from make_tiny_pipeline import make_sd15

            make_sd15(work / "sd")
        rows = []
        for count in args.counts:
            make_pairs(work / f"pairs-{count}", count)
            for way in WAYS:
                rows.append(measure(work, count, way))
                print(json.dumps(rows[-1]), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rows": rows}
    if args.counts == COUNTS:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        report(result)


if __name__ == "__main__":
    main()
