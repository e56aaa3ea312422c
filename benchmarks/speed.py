"""Training speed of MindTune, of mindone's own modules, and of PyTorch with diffusers, for docs/performance.md.

    python benchmarks/speed.py [SECTION ...] [--torch .venv-parity/bin/python]

Expect about 80 minutes on two idle cores for all sections, with 14 GB in the temporary directory and 20 GB of memory.
Linux only. Sections: steps, first, limit, sampling, cached, encode, host, growth, loading.

Every measurement is a process of its own, and compared processes alternate: A B A B. The results of a section replace
its earlier ones in benchmarks/results/speed.json; tables and plot are written to docs/. A process that fails is
recorded with its error. CPU time that other processes used is recorded, and the page marks sections that they
disturbed. --try runs everything once, briefly, at the smallest size, and saves nothing.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import operations
import speed_report
import workload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/performance.png"
SHAPES = ROOT / "examples/tiny/flux-shapes"

# Implementation -> its script and entries of the job. The faster one of PyTorch's two counts.
WAYS = {
    "ours": ("step_mindspore.py", {"side": "ours", "mode": "graph"}),
    "ours, PyNative": ("step_mindspore.py", {"side": "ours", "mode": "pynative"}),
    "mindone": ("step_mindspore.py", {"side": "plain", "mode": "graph"}),
    "PyTorch": ("step_torch.py", {}),
    "PyTorch, compiled": ("step_torch.py", {"compile": True}),
}
# MindSpore's CPU kernels try numbers of threads in their first five launches; PyTorch does as many updates first.
WARMUP = 6
# Training step, size, updates per process after WARMUP, and rounds per implementation. mindone's modules take minutes
# to compile at `deep`: the section `first` has them.
STEPS = [
    ("flux_lora", "mid", 8, {"ours": 3, "ours, PyNative": 1, "mindone": 2, "PyTorch": 3, "PyTorch, compiled": 1}),
    ("flux_lora", "wide", 3, {"ours": 2, "ours, PyNative": 1, "mindone": 1, "PyTorch": 2}),
    ("flux_lora", "deep", 8, {"ours": 2, "ours, PyNative": 1, "PyTorch": 2}),
    ("flux_controlnet", "mid", 6, {"ours": 3, "mindone": 1, "PyTorch": 3}),
    ("flux_controlnet", "wide", 2, {"ours": 1, "mindone": 1, "PyTorch": 1}),
    ("flux_controlnet", "deep", 8, {"ours": 2, "PyTorch": 2}),
    ("sd15", "sd", 3, {"ours": 2, "ours, PyNative": 1, "mindone": 1, "PyTorch": 2}),
    ("sdxl", "sdxl", 3, {"ours": 2, "ours, PyNative": 1, "mindone": 1, "PyTorch": 2}),
]
SAMPLED = [("flux_lora", "mid", 3), ("sd15", "sd", 2)]  # pipeline, size, rounds
COUNTED = ("mid", "sd", "sdxl")  # sizes whose operations are also counted by PyTorch
# Shapes of the matrix products of a block at `wide`, and a square one; the best rate of them is the limit.
RATE_SHAPES = [[1536, 3072, 12288], [1536, 15360, 3072], [1536, 3072, 3072], [4096, 4096, 4096]]


class Bench:
    """Starts the measured processes. `short`: everything once, two updates, size `mid` only."""

    def __init__(self, work, torch, short):
        self.work = work
        self.torch = torch
        self.short = short
        self.warmup = 1 if short else WARMUP
        self.cache = self.new("cache")  # for compiled code
        self.others = []  # (cores that other processes used, seconds) of every measured process

    def run(self, script, **job):
        """The results that the process prints, or {"failed": its error}."""
        file = self.work / "job.json"
        began = time.time()
        busy = others_seconds()
        file.write_text(json.dumps({**job, "started": began}, default=str))
        python = self.torch if script == "step_torch.py" else sys.executable
        command = [python, str(ROOT / "benchmarks" / script), str(file)]
        error = self.watch(command)
        if error is None:
            lines = (self.work / "printed").read_text().splitlines()
            found = json.loads([line for line in lines if line.startswith("{")][-1])
        else:
            found = {"failed": last_line(error).replace(f"{ROOT}/", "").replace(f"{self.work}/", "")}
        seconds = time.time() - began
        found["others"] = round(max(0.0, others_seconds() - busy) / seconds, 2)
        self.others.append((found["others"], seconds))
        shown = found
        if error is None:
            shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
        print(f"  {script} {job['do']} {job.get('form', '')}: {shown} ({seconds:.0f} s)", flush=True)
        return found

    def watch(self, command):
        """Runs a process; None, or its error. Stops it after 20 minutes and when less than 1 GB of memory is left."""
        env = {**os.environ, "XDG_CACHE_HOME": str(self.cache)}
        began = time.time()
        why = None
        with open(self.work / "printed", "w") as out, open(self.work / "errors", "w") as errors:
            process = subprocess.Popen(command, cwd=self.work, env=env, stdout=out, stderr=errors)
            try:
                while process.poll() is None and why is None:
                    if time.time() - began > 1200:
                        why = "stopped after 20 minutes"
                    if memory_left() < 1.0:
                        why = "stopped: the machine had less than 1 GB of memory left"
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if why or process.returncode == 0:
            return why
        if process.returncode < 0:
            return f"killed by signal {-process.returncode}"
        return (self.work / "errors").read_text().strip()

    def alternate(self, ways, key):
        """Name -> its runs, with median, least and most of `key` (or of key[name]).

        `ways`: name -> (function that measures once, rounds).
        """
        runs = {name: [] for name in ways}
        for number in range(1 if self.short else max(rounds for _, rounds in ways.values())):
            for name, (measure, rounds) in ways.items():
                if number < rounds:
                    print(f" {name}, round {number + 1}", flush=True)
                    runs[name].append(measure())
        return {name: summary(found, key if isinstance(key, str) else key[name]) for name, found in runs.items()}

    def step_job(self, kind, name, size=None, batch=1, **more):
        """The common entries of a job; its pipeline is written at the first call."""
        size = size or workload.SIZES[name]
        job = {
            "kind": kind,
            "size": size,
            "batch": batch,
            "root": self.work / name,
            "work": self.work / f"{kind} {name}",
        }
        if not job["work"].exists():
            self.run("step_mindspore.py", do="write", **job)
        return {**job, "warmup": self.warmup, **more}

    def images(self, count, side):
        """A folder of `count` images with captions."""
        folder = self.work / f"images {count} {side}"
        if not folder.exists():
            self.run("train_script.py", do="draw", images=folder, count=count, side=side)
        return folder

    def new(self, what):
        """The path of a new folder."""
        return self.work / f"{what} {time.time_ns()}"

    def train(self, form, root=SHAPES, count=32, side=64, length=12, updates=60, batch=4, flags=()):
        """Runs the training script in a `form` of train_script.py."""
        return self.run(
            "train_script.py",
            do="train",
            form=form,
            root=root,
            images=self.images(count, side),
            out=self.new("out"),
            side=side,
            length=length,
            batch=batch,
            updates=6 if self.short else updates,
            warmup=self.warmup,
            flags=list(flags),
        )

    def encode(self, job):
        """Runs the encoder stage with an empty cache."""
        return self.run("train_script.py", out=self.new("encoded"), **job)


def memory_left():
    """Available memory in GB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def others_seconds():
    """CPU seconds used by anything but the finished children of this process, with those stolen by a hypervisor."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def last_line(error):
    """The last line that starts with the name of an exception; MindSpore prints a C++ trace after it."""
    lines = error.splitlines() or ["ended without a message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)), lines[-1])


def summary(runs, key):
    """Median, least and most of `key`, all runs, and the last error if every run failed."""
    good = [run[key] for run in runs if key in run]
    failed = [run["failed"] for run in runs if "failed" in run]
    found = {key: median(good), "least": min(good), "most": max(good)} if good else {}
    return {**found, "runs": runs, **({"failed": failed[-1]} if failed and not good else {})}


# ---- sections ------------------------------------------------------------------------------------


def steps(bench):
    """Seconds per update, its operations, and those of the same step by PyTorch's counter."""
    found = {}
    for kind, name, updates, rounds in STEPS[:1] if bench.short else STEPS:
        print(f"{kind} {name}", flush=True)
        job = bench.step_job(kind, name)
        ways = {way: (partial(once, bench, way, job, updates), count) for way, count in rounds.items()}
        part = {"operations": operations.of_step(kind, workload.SIZES[name]), "ways": bench.alternate(ways, "update")}
        if name in COUNTED:
            part["operations_by_torch"] = bench.run("step_torch.py", do="count", **job).get("operations")
        found[f"{kind} {name}"] = part
    return found


def once(bench, way, job, updates):
    script, more = WAYS[way]
    return bench.run(script, do="updates", updates=2 if bench.short else updates, **job, **more)


def first(bench):
    """Time from the start of a process to the end of its first and second update, at `deep`.

    Ours runs twice, the second time with the files that the first run left.
    """
    bench.cache = bench.new("cache")
    job = bench.step_job("flux_lora", "mid" if bench.short else "deep")
    ways = {"ours": "ours", "ours, the second time": "ours", "mindone": "mindone", "PyTorch": "PyTorch"}
    return {label: once(bench, way, job, 2) for label, way in ways.items()}


def limit(bench):
    """The best rate of a matrix product, alternating with our widest steps."""
    name = "mid" if bench.short else "wide"
    shapes = RATE_SHAPES[-2:] if bench.short else RATE_SHAPES
    ways = {"rate": (partial(bench.run, "step_mindspore.py", do="rate", shapes=shapes, repeats=4), 3)}
    keys = {"rate": "best"}
    counted = {}
    for kind, updates in (("flux_lora", 4), ("flux_controlnet", 2)):
        case = f"{kind} {name}"
        ways[case] = partial(once, bench, "ours", bench.step_job(kind, name), updates), 2
        keys[case] = "update"
        counted[case] = operations.of_step(kind, workload.SIZES[name])
    return {"operations": counted, **bench.alternate(ways, keys)}


def sampling(bench):
    """Seconds of one image, without decoding it: the samplers of the inference scripts, and diffusers' pipelines."""
    found = {}
    for kind, name, rounds in SAMPLED:
        job = bench.step_job(kind, name, do="sample", **workload.SAMPLING[name])
        if bench.short:
            job["steps"] = 4
        scripts = {"ours": "step_mindspore.py", "PyTorch": "step_torch.py"}
        ways = {way: (partial(bench.run, script, **job), rounds) for way, script in scripts.items()}
        found[f"{kind} {name}"] = {"steps": job["steps"], **bench.alternate(ways, "image")}
    return found


def cached(bench):
    """The training script on the shapes pipeline, with caches and with encoders inside the step."""
    forms = ("cached",) if bench.short else ("cached", "vae", "seeds", "seeds text")
    return bench.alternate({form: (partial(bench.train, form), 2) for form in forms}, "images_per_second")


def host(bench):
    """The training script with caches: time outside the step and waits for data."""
    root = bench.step_job("flux_lora", "mid")["root"]
    mid = {"root": root, "side": 256, "length": 128, "batch": 1, "updates": 25}
    alone = {"flags": ["--dataloader_num_workers", "0"]}
    runs = {
        "shapes, batch 4": (partial(bench.train, "cached"), 2),
        "shapes, batch 4, no worker": (partial(bench.train, "cached", **alone), 2),
        "mid, batch 1": (partial(bench.train, "cached", **mid), 1),
        "mid, batch 1, no worker": (partial(bench.train, "cached", **mid, **alone), 1),
    }
    return bench.alternate(runs, "outside")


def encode(bench):
    """Images per second through the VAE, after the first ones: the encoder stage, and PyTorch's encoder alone."""
    real = bench.work / "FLUX.1-dev's VAE"
    found = {}
    # Pipeline, images that do not count (until the encoder stage has compiled), images that do, pixels of their sides.
    cases = {
        "the shapes pipeline's VAE, 64 pixels": (SHAPES, 512, 1024, 64),
        "FLUX.1-dev's VAE, 256 pixels": (real, 8, 8, 256),
    }
    if bench.short:
        cases.popitem()
    elif not real.exists():
        bench.run("step_mindspore.py", do="write_vae", root=real)
    for name, (root, skip, measured, side) in cases.items():
        count = skip + measured
        job = {"do": "encode", "root": root, "images": bench.images(count, side), "side": side}
        job.update(count=count, skip=skip)
        ways = {
            "ours": (partial(bench.encode, job), 2),
            "PyTorch": (partial(bench.run, "step_torch.py", **job), 2),
        }
        found[name] = bench.alternate(ways, "images_per_second")
    return found


def growth(bench):
    """Seconds per update at `mid` with more tokens, a larger batch or more blocks, and of a run with more images."""
    tokens = [8, 16] if bench.short else [8, 16, 24, 32]
    batches = [] if bench.short else [2, 4]
    depths = [] if bench.short else [2, 8]
    base = workload.SIZES["mid"]
    points = [("tokens", n * n, {**base, "tokens": [n, n]}, 1) for n in tokens]
    points += [("batch", n, base, n) for n in batches]
    for n in depths:
        deeper = {**base, "transformer": {**base["transformer"], "num_layers": n, "num_single_layers": 2 * n}}
        points.append(("blocks", 3 * n, deeper, 1))
    found = []
    for what, amount, size, batch in points:
        name = f"mid {amount} blocks" if what == "blocks" else "mid"
        job = bench.step_job("flux_lora", name, size, batch)
        row = {"what": what, "amount": amount, "operations": operations.of_step("flux_lora", size, batch)}
        found.append({**row, **{way: once(bench, way, job, 3).get("update") for way in ("ours", "PyTorch")}})
    same = next(row for row in found if row["amount"] == 256)
    found += [{**same, "what": "batch", "amount": 1}, {**same, "what": "blocks", "amount": 12}]
    for count in (16,) if bench.short else (16, 128, 512):
        run = bench.train("cached", count=count, updates=30)
        row = {key: run.get(key) for key in ("update", "first", "peak_mb")}
        found.append({"what": "images", "amount": count, **row})
    return found


def loading(bench):
    """Memory and time of loading, by benchmarks/loading.py."""
    if bench.short:
        return []
    from loading import measure

    return measure()


# ---- the run -------------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (steps, first, limit, sampling, cached, encode, host, growth, loading)}


def machine():
    """The hardware; no name or path of the machine."""
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    model = next(value.strip() for key, value in lines.items() if key.strip() == "model name")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory), "architecture": platform.machine()}


def versions(torch):
    found = {name: version(name) for name in ("mindspore", "mindone", "numpy")}
    names = ("torch", "diffusers", "peft")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    done = subprocess.run([torch, "-c", code], capture_output=True, text=True)
    return {"python": platform.python_version(), **found, **dict(zip(names, done.stdout.split()))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; Default: all.")
    parser.add_argument(
        "--torch",
        default=str(ROOT / ".venv-parity/bin/python"),
        help="Python with PyTorch and diffusers. Default: .venv-parity/bin/python.",
    )
    parser.add_argument(
        "--work", type=Path, help="Directory for pipelines, kept for later runs. Default: a temporary one."
    )
    parser.add_argument(
        "--try", dest="short", action="store_true", help="Run everything once, briefly, and save nothing."
    )
    parser.add_argument("--report", action="store_true", help="Only write tables and plot from the saved results.")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}. There are {', '.join(SECTIONS)}.")
    if not Path(args.torch).exists():
        parser.error(
            f"--torch {args.torch}: no such Python. `make .venv-parity/made` makes one with PyTorch and diffusers."
        )
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.short else {}
    if args.report and not results:
        parser.error("--report: there are no results yet; run without it first.")
    with tempfile.TemporaryDirectory() as folder:
        work = (args.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, os.path.abspath(args.torch), args.short)
        for name in () if args.report else args.sections or SECTIONS:
            print(f"---- {name}", flush=True)
            bench.others = []
            made = time.strftime("%Y-%m-%d")
            began = time.time()
            found = SECTIONS[name](bench)
            others = max((cores for cores, seconds in bench.others if seconds >= 5), default=0.0)
            results[name] = {
                "made": made,
                "minutes": round((time.time() - began) / 60, 1),
                "others": others,
                "found": found,
            }
            results.update(machine=machine(), versions=versions(bench.torch))
            if not args.short:  # after every section, so that an interrupted run keeps its results
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if args.short:
        print(speed_report.tables(results))
        return
    speed_report.write(results, PAGE, PLOT)


if __name__ == "__main__":
    main()
