"""How fast training is here, by mindone's modules as they are, and in PyTorch with diffusers: the numbers of
docs/performance.md.

    python benchmarks/speed.py [SECTION ...] [--torch .venv-parity/bin/python]            (make bench)

Sections: steps, first, limit, cached, encode, host, growth, loading; all of them take about 45 minutes on two cores
that do nothing else, 10 GB in the temporary folder and 20 GB of memory. Every measurement is a process of its own, and
what is compared runs in turn, A B A B. Numbers go to benchmarks/results/speed.json, where the other sections keep
theirs, tables and plot to docs/. A process that fails is recorded with the line that names its error. Beside other work
the numbers are worth nothing: what others took of the processors is recorded, and the page says so. `--try` runs
everything once, shortly, at the smallest size, and keeps nothing. Linux only.
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
RESULTS, PAGE, PLOT = (
    ROOT / "benchmarks/results/speed.json",
    ROOT / "docs/performance.md",
    ROOT / "docs/performance.png",
)
SHAPES = ROOT / "examples/tiny/flux-shapes"

# Way -> its process and what the job says. Of PyTorch's two the better one counts.
WAYS = {
    "ours": ("step_mindspore.py", {"side": "ours", "mode": "graph"}),
    "ours, PyNative": ("step_mindspore.py", {"side": "ours", "mode": "pynative"}),
    "mindone": ("step_mindspore.py", {"side": "plain", "mode": "graph"}),
    "PyTorch": ("step_torch.py", {}),
    "PyTorch, compiled": ("step_torch.py", {"compile": True}),
}
# Kind, size, updates a process, and rounds of each way. mindone's modules at `deep` compile for minutes: the section
# `first` has them.
STEPS = [
    ("flux_lora", "mid", 8, {"ours": 3, "ours, PyNative": 1, "mindone": 3, "PyTorch": 3, "PyTorch, compiled": 1}),
    ("flux_lora", "wide", 3, {"ours": 2, "ours, PyNative": 1, "mindone": 2, "PyTorch": 2}),
    ("flux_lora", "deep", 8, {"ours": 2, "ours, PyNative": 1, "PyTorch": 2}),
    ("flux_controlnet", "mid", 6, {"ours": 3, "mindone": 2, "PyTorch": 3}),
    ("flux_controlnet", "wide", 2, {"ours": 2, "mindone": 1, "PyTorch": 2}),
    ("flux_controlnet", "deep", 8, {"ours": 2, "PyTorch": 2}),
    ("sd15", "sd", 3, {"ours": 2, "ours, PyNative": 1, "mindone": 2, "PyTorch": 2}),
]
COUNTED = ("mid", "sd")  # sizes whose operations PyTorch's counter counts too
# Of the matrix products of a block at `wide` and of a square; the best rate of them is the limit.
RATE_SHAPES = [[1536, 3072, 12288], [1536, 15360, 3072], [1536, 3072, 3072], [4096, 4096, 4096]]


class Bench:
    """Starts the processes. `short`: everything once, two updates, `mid` alone."""

    def __init__(self, work, torch, short):
        self.work, self.torch, self.short = work, torch, short
        self.cache = self.new("cache")  # where a process may keep what it compiled
        self.others = []  # (cores that others had, seconds) of every process

    def run(self, script, **job):
        """What the process prints, or {"failed": the line that names its error}."""
        file, began, busy = self.work / "job.json", time.time(), others_seconds()
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
        shown = (
            {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
            if error is None
            else found
        )
        print(f"  {script} {job['do']} {job.get('form', '')}: {shown} ({seconds:.0f} s)", flush=True)
        return found

    def watch(self, command):
        """Runs a process; None, or why it failed. It is stopped after 20 minutes, or when the machine runs out of memory."""
        env, why, began = {**os.environ, "XDG_CACHE_HOME": str(self.cache)}, None, time.time()
        with open(self.work / "printed", "w") as out, open(self.work / "errors", "w") as errors:
            process = subprocess.Popen(command, cwd=self.work, env=env, stdout=out, stderr=errors)
            try:
                while process.poll() is None and why is None:
                    why = "stopped after 20 minutes" if time.time() - began > 1200 else None
                    why = "stopped: the machine had less than 1 GB of memory left" if memory_left() < 1.0 else why
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
        if why or process.returncode == 0:
            return why
        return (
            f"killed by signal {-process.returncode}"
            if process.returncode < 0
            else (self.work / "errors").read_text().strip()
        )

    def in_turn(self, ways, key):
        """`ways`: name -> (function that measures once, rounds). name -> its runs, and of `key` (or key[name]) median, least and most."""
        runs = {name: [] for name in ways}
        for number in range(1 if self.short else max(rounds for _, rounds in ways.values())):
            for name, (measure, rounds) in ways.items():
                if number < rounds:
                    print(f" {name}, round {number + 1}", flush=True)
                    runs[name].append(measure())
        return {name: summary(found, key if isinstance(key, str) else key[name]) for name, found in runs.items()}

    def step_job(self, kind, name, size=None, batch=1, **more):
        """A job's common part; its pipeline is written when it is first asked for."""
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
        return {**job, "warmup": 1 if self.short else 2, **more}

    def pictures(self, count, side):
        """A folder of so many pictures with captions."""
        folder = self.work / f"pictures {count} {side}"
        if not folder.exists():
            self.run("train_script.py", do="draw", pictures=folder, count=count, side=side)
        return folder

    def new(self, what):
        """A folder that is not there yet."""
        return self.work / f"{what} {time.time_ns()}"

    def train(self, form, root=SHAPES, count=32, side=64, length=12, updates=60, batch=4, flags=()):
        """The training script once, as `form` of train_script.py says."""
        return self.run(
            "train_script.py",
            do="train",
            form=form,
            root=root,
            pictures=self.pictures(count, side),
            out=self.new("out"),
            side=side,
            length=length,
            batch=batch,
            updates=6 if self.short else updates,
            warmup=3,
            flags=list(flags),
        )

    def encode(self, job):
        """The encode stage once, into an empty cache."""
        return self.run("train_script.py", out=self.new("encoded"), **job)


def memory_left():
    """GB that the system can still give."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def others_seconds():
    """Seconds that the processors have worked, or were kept from us, for others than this process' finished children."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def last_line(error):
    """The last line that begins with an exception's name; MindSpore lets a trace of its C++ follow."""
    lines = error.splitlines() or ["ended without a message"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)), lines[-1])


def summary(runs, key):
    good = [run[key] for run in runs if key in run]
    failed = [run["failed"] for run in runs if "failed" in run]
    found = {key: median(good), "least": min(good), "most": max(good)} if good else {}
    return {**found, "runs": runs, **({"failed": failed[-1]} if failed and not good else {})}


# ---- sections ------------------------------------------------------------------------------------


def steps(bench):
    """Seconds of an update, operations in it, and what PyTorch's counter says of the same step."""
    found = {}
    for kind, name, updates, rounds in STEPS[:1] if bench.short else STEPS:
        print(f"{kind} {name}", flush=True)
        job = bench.step_job(kind, name)
        ways = {way: (partial(once, bench, way, job, updates), count) for way, count in rounds.items()}
        part = {"operations": operations.of_step(kind, workload.SIZES[name]), "ways": bench.in_turn(ways, "update")}
        if name in COUNTED:
            part["operations_by_torch"] = bench.run("step_torch.py", do="count", **job).get("operations")
        found[f"{kind} {name}"] = part
    return found


def once(bench, way, job, updates):
    script, more = WAYS[way]
    return bench.run(script, do="updates", updates=2 if bench.short else updates, **job, **more)


def first(bench):
    """From the start of a process to the end of its first and second update, deep: ours twice, the second time with
    what the first one may have left on disk; and the others."""
    bench.cache = bench.new("cache")
    job = bench.step_job("flux_lora", "mid" if bench.short else "deep")
    return {
        label: once(bench, way, job, 2)
        for label, way in (
            ("ours", "ours"),
            ("ours, the second time", "ours"),
            ("mindone", "mindone"),
            ("PyTorch", "PyTorch"),
        )
    }


def limit(bench):
    """The best rate of a matrix product, and in turn with it our widest step."""
    name = "mid" if bench.short else "wide"
    job, shapes = bench.step_job("flux_lora", name), RATE_SHAPES[-2:] if bench.short else RATE_SHAPES
    ways = {
        "rate": (partial(bench.run, "step_mindspore.py", do="rate", shapes=shapes, repeats=4), 3),
        "ours": (partial(once, bench, "ours", job, 4), 2),
    }
    found = bench.in_turn(ways, {"rate": "best", "ours": "update"})
    return {"size": name, "operations": operations.of_step("flux_lora", workload.SIZES[name]), **found}


def cached(bench):
    """The training script on the shapes pipeline, its caches against encoders inside the step."""
    forms = ("cached",) if bench.short else ("cached", "vae", "seeds", "seeds text")
    return bench.in_turn({form: (partial(bench.train, form), 2) for form in forms}, "images_per_second")


def host(bench):
    """The training script with caches: time outside the step, time waited for data."""
    root = bench.step_job("flux_lora", "mid")["root"]
    mid, alone = (
        {"root": root, "side": 256, "length": 128, "batch": 1, "updates": 25},
        {"flags": ["--dataloader_num_workers", "0"]},
    )
    runs = {
        "shapes, batch 4": (partial(bench.train, "cached"), 2),
        "shapes, batch 4, no worker": (partial(bench.train, "cached", **alone), 2),
        "mid, batch 1": (partial(bench.train, "cached", **mid), 1),
        "mid, batch 1, no worker": (partial(bench.train, "cached", **mid, **alone), 1),
    }
    return bench.in_turn(runs, "outside")


def encode(bench):
    """Pictures a second through the VAE: the encode stage, and PyTorch's encoder alone."""
    real, found = bench.work / "FLUX.1-dev's VAE", {}
    cases = {"the shapes pipeline's VAE, 64 pixels": (SHAPES, 66, 64), "FLUX.1-dev's VAE, 256 pixels": (real, 8, 256)}
    if bench.short:
        cases.popitem()
    elif not real.exists():
        bench.run("step_mindspore.py", do="write_vae", root=real)
    for name, (root, count, side) in cases.items():
        job = {"do": "encode", "root": root, "pictures": bench.pictures(count, side), "count": count, "side": side}
        ways = {
            "ours": (partial(bench.encode, job), 2),
            "PyTorch": (partial(bench.run, "step_torch.py", **job), 2),
        }
        found[name] = bench.in_turn(ways, "images_per_second")
    return found


def growth(bench):
    """Seconds of an update at `mid` with more tokens, a larger batch, more blocks; and of a run with more pictures."""
    tokens = [8, 16] if bench.short else [8, 16, 24, 32]
    batches, depths = ([], []) if bench.short else ([2, 4], [2, 8])
    base = workload.SIZES["mid"]
    points = [("tokens", n * n, {**base, "tokens": [n, n]}, 1) for n in tokens] + [
        ("batch", n, base, n) for n in batches
    ]
    for n in depths:
        deeper = {**base, "transformer": {**base["transformer"], "num_layers": n, "num_single_layers": 2 * n}}
        points.append(("blocks", 3 * n, deeper, 1))
    found = []
    for what, amount, size, batch in points:
        name = f"mid {amount} blocks" if what == "blocks" else "mid"
        job = bench.step_job("flux_lora", name, size, batch)
        row = {way: once(bench, way, job, 3).get("update") for way in ("ours", "PyTorch")}
        found.append(
            {"what": what, "amount": amount, "operations": operations.of_step("flux_lora", size, batch), **row}
        )
    same = next(row for row in found if row["amount"] == 256)
    found += [{**same, "what": "batch", "amount": 1}, {**same, "what": "blocks", "amount": 12}]
    for count in (16,) if bench.short else (16, 128, 512):
        run = bench.train("cached", count=count, updates=30)
        found.append(
            {"what": "pictures", "amount": count, **{key: run.get(key) for key in ("update", "first", "peak_mb")}}
        )
    return found


def loading(bench):
    """benchmarks/loading.py: memory and time of loading."""
    if bench.short:
        return []
    from loading import measure

    return measure()


# ---- the whole -----------------------------------------------------------------------------------

SECTIONS = {f.__name__: f for f in (steps, first, limit, cached, encode, host, growth, loading)}


def machine():
    """What the numbers hang on; neither names nor places of the computer."""
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
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all.")
    parser.add_argument(
        "--torch", default=str(ROOT / ".venv-parity/bin/python"), help="Python with PyTorch and diffusers."
    )
    parser.add_argument(
        "--work", type=Path, help="Folder for pipelines, kept and used again. Default: a temporary one."
    )
    parser.add_argument("--try", dest="short", action="store_true", help="Everything once, shortly; keeps nothing.")
    parser.add_argument(
        "--report", action="store_true", help="Only write tables and plot anew from the numbers that are there."
    )
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}. There are {', '.join(SECTIONS)}.")
    if not Path(args.torch).exists():
        parser.error(
            f"--torch {args.torch}: no such Python. `make .venv-parity/made` makes one with PyTorch and diffusers."
        )
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and not args.short else {}
    if args.report and not results:
        parser.error("--report: there are no numbers yet; run without it first.")
    with tempfile.TemporaryDirectory() as folder:
        work = (args.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(work, os.path.abspath(args.torch), args.short)
        for name in () if args.report else args.sections or SECTIONS:
            print(f"---- {name}", flush=True)
            bench.others, made, began = [], time.strftime("%Y-%m-%d"), time.time()
            found = SECTIONS[name](bench)
            others = max((cores for cores, seconds in bench.others if seconds >= 5), default=0.0)
            results[name] = {
                "made": made,
                "minutes": round((time.time() - began) / 60, 1),
                "others": others,
                "found": found,
            }
            results.update(machine=machine(), versions=versions(bench.torch))
            if not args.short:  # after every section: a run that is stopped has not been for nothing
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if args.short:
        return print(speed_report.tables(results))
    speed_report.write(results, PAGE, PLOT)


if __name__ == "__main__":
    main()
