"""Writes the tables and the plot of docs/performance.md from benchmarks/results/speed.json, for speed.py."""

import textwrap
from functools import partial

BEGIN = "<!-- made by benchmarks/speed.py: begin -->"
END = "<!-- made by benchmarks/speed.py: end -->"
DISTURBED = 0.25  # cores used by other processes
KINDS = {
    "flux_lora": "FLUX LoRA",
    "flux_controlnet": "FLUX ControlNet",
    "sd15": "SD 1.5 ControlNet",
    "sdxl": "SDXL ControlNet",
}
SAMPLED = {"flux_lora mid": "an image by FLUX, `mid`", "sd15 sd": "an image by SD 1.5 and ControlNet, `sd`"}
# Case, target, first measured value.
STEP_TARGETS = [
    ("flux_lora mid", 1.5, "0.47"),
    ("flux_lora wide", 2.1, "1.3"),
    ("flux_lora deep", 1.0, "0.78"),
    ("flux_controlnet mid", 1.4, "1.21"),
    ("flux_controlnet wide", 2.1, "1.82"),
    ("flux_controlnet deep", 1.0, "0.64"),
    ("sd15 sd", 1.3, "0.93"),
    ("sdxl sdxl", 1.3, "-"),
]
SHARE_TARGETS = [("flux_lora wide", 0.85, "0.59"), ("flux_controlnet wide", 0.75, "0.56")]
SAMPLING_TARGETS = [("flux_lora mid", 1.0, "-"), ("sd15 sd", 1.0, "-")]
ENCODE_TARGETS = [
    ("FLUX.1-dev's VAE, 256 pixels", 1.0, "0.65"),
    ("the shapes pipeline's VAE, 64 pixels", 0.8, "0.48"),
]
# Case, name, target of the time outside the step, its first value.
HOST_TARGETS = [("shapes, batch 4", "shapes pipeline", 0.01, "2.54 %"), ("mid, batch 1", "`mid`", 0.02, "0.42 %")]


def write(results, page, plot_path):
    """Writes the tables between the two comments of the page and draws the plot."""
    head, rest = page.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    page.write_text(head + BEGIN + "\n\n" + tables(results) + "\n" + END + tail)
    if found(results, "growth"):
        plot(found(results, "growth"), plot_path)


# ---- reading the results -------------------------------------------------------------------------


def found(results, section, *keys):
    """An entry of a section, or None if it was not measured."""
    value = (results.get(section) or {}).get("found")
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def disturbed(results, section):
    """Whether other processes disturbed the measurement of a section."""
    return results.get(section, {}).get("others", 0.0) > DISTURBED


def torch_best(ways):
    """Seconds per update of the faster one of PyTorch's two, or None."""
    seconds = [way["update"] for name, way in ways.items() if name.startswith("PyTorch") and "update" in way]
    return min(seconds, default=None)


def ratio(a, b):
    """a / b, or None if either is missing."""
    return a / b if a is not None and b else None


def step_ratio(results, case, way="PyTorch"):
    """Seconds per update of an implementation (PyTorch: the faster one) over ours, or None."""
    ways = found(results, "steps", case, "ways") or {}
    other = torch_best(ways) if way == "PyTorch" else ways.get(way, {}).get("update")
    return ratio(other, ways.get("ours", {}).get("update"))


def share_of_limit(results, case):
    """Shortest possible time of a step, at the best rate of a matrix product, over its time in turn; or None."""
    part = found(results, "limit") or {}
    seconds = part.get(case, {}).get("update")
    rates = [run["best"] for run in part.get("rate", {}).get("runs", ()) if "best" in run]
    return ratio(sum(part["operations"][case].values()), seconds * max(rates)) if seconds and rates else None


def loading_peak(results):
    """Peak memory of loading float32 weights from one file, over their size; or None."""
    rows = [
        row
        for row in found(results, "loading") or ()
        if (row["file"], row["shards"], row["memory"]) == ("float32", 1, "fp32")
    ]
    return ratio(rows[0]["ours peak"], rows[0]["weights"]) if rows else None


def first_run(results, section, key):
    """The first process of our step: in section `first`, that of way `key`; in section `steps`, that of case `key`."""
    if section == "first":
        return found(results, "first", key) or {}
    return (found(results, "steps", key, "ways", "ours", "runs") or [{}])[0]


def over_seeds(results):
    """Images per second with caches over the step of the original scripts, or None."""
    cached, seeds = (found(results, "cached", form, "images_per_second") for form in ("cached", "seeds"))
    return ratio(cached, seeds)


def worst(results, name, key):
    """The largest value of `key` in the runs of a case of section `host`, or None."""
    runs = found(results, "host", name, "runs") or ()
    return max((run[key] for run in runs if key in run), default=None)


# ---- tables --------------------------------------------------------------------------------------


def number(value, digits=2, unit=""):
    """A number as the tables show it."""
    return "not measured" if value is None else f"{value:.{digits}f}{unit}"


def percent(value):
    return number(None if value is None else 100 * value, 2, " %")


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    if not rows:
        return "Not measured.\n"
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def targets(results):
    """Every target with its first and its current value, and whether it is reached."""
    lines = []
    for section, name, wanted, start, value, more, show in target_rows(results):
        reached = "-" if value is None else "yes" if (value >= wanted if more else value <= wanted) else "**no**"
        reached = f"{section} was disturbed" if value is not None and disturbed(results, section) else reached
        lines.append([name, f"at {'least' if more else 'most'} {show(wanted)}", start, show(value), reached])
    return table(["what", "target", "first measured", "now", "reached"], lines)


def target_rows(results):
    """(section, name, target, first value, current value, whether higher is better, format) of every target."""
    seconds = partial(number, digits=1, unit=" s")
    gigabytes = partial(number, digits=2, unit=" GB")
    whole = partial(number, digits=0)
    rows = []
    for case, wanted, start in STEP_TARGETS:
        value = step_ratio(results, case)
        rows.append(("steps", f"{case_name(case)}: PyTorch's time over ours", wanted, start, value, True, number))
    for case, wanted, start in SHARE_TARGETS:
        value = share_of_limit(results, case)
        rows.append(("limit", f"{case_name(case)}: share of the limit", wanted, start, value, True, number))
    for section, what, key, wanted, start, show in (
        ("first", "first update at `deep`, a fresh process", "ours", 12.0, "115 s", seconds),
        ("first", "first update at `deep`, the second time", "ours, the second time", 10.0, "115 s", seconds),
        ("steps", "first update at `sd`, a fresh process", "sd15 sd", 15.0, "35.2 s", seconds),
    ):
        rows.append((section, what, wanted, start, first_run(results, section, key).get("first"), False, show))
    for section, what, key, wanted, start in (
        ("first", "host memory of the compiled graph at `deep`", "ours", 2.0, "6.8 GB"),
        ("steps", "host memory of the compiled graph at `sd`", "sd15 sd", 1.5, "4.34 GB"),
    ):
        value = ratio(first_run(results, section, key).get("graph_mb"), 1024)
        rows.append((section, what, wanted, start, value, False, gigabytes))
    for case, wanted, start in SAMPLING_TARGETS:
        value = ratio(*(found(results, "sampling", case, way, "image") for way in ("PyTorch", "ours")))
        rows.append(("sampling", f"{SAMPLED[case]}: PyTorch's time over ours", wanted, start, value, True, number))
    for case, wanted, start in ENCODE_TARGETS:
        value = ratio(*(found(results, "encode", case, way, "images_per_second") for way in ("ours", "PyTorch")))
        rows.append(("encode", f"encoder stage, {case}: over PyTorch's", wanted, start, value, True, number))
    rows.append(("loading", "loading: peak over the weights' size", 1.2, "3.2", loading_peak(results), False, number))
    for case, name, wanted, start in HOST_TARGETS:
        outside = found(results, "host", case, "outside")
        late = worst(results, case, "late")
        rows.append(("host", f"time outside the step, {name}", wanted, start, outside, False, percent))
        rows.append(("host", f"batches waited for after the first, {name}", 0, "all", late, False, whole))
    caches = "caches over the original step with the VAE inside, shapes pipeline"
    rows.append(("cached", caches, 2.0, "-", over_seeds(results), True, number))
    return rows


def case_name(case):
    kind, name = case.split()
    return f"{KINDS[kind]}, `{name}`"


def spread(way, key="update", digits=3):
    """Median, least and most of the seconds `key` of an implementation, or its error."""
    if way is None:
        return "-"
    if key not in way:
        return f"failed: {way.get('failed', '')[:80]}"
    rounds = len([run for run in way["runs"] if key in run])
    if rounds == 1:
        return f"{way[key]:.{digits}f}"
    return f"{way[key]:.{digits}f} ({way['least']:.{digits}f}-{way['most']:.{digits}f})"


def step_table(results):
    header = [
        "seconds per update",
        "ours",
        "ours, PyNative",
        "mindone",
        "PyTorch",
        "PyTorch, compiled",
        "PyTorch / ours",
        "mindone / ours",
    ]
    rows = []
    for case, part in (found(results, "steps") or {}).items():
        cells = [spread(part["ways"].get(way)) for way in header[1:6]]
        both = [number(step_ratio(results, case, way)) for way in ("PyTorch", "mindone")]
        rows.append([case_name(case), *cells, *both])
    if not rows:
        return table(header, rows)
    return (
        table(header, rows)
        + f"\nThe losses of every update differ from ours by at most {losses_apart(results):.1e} of the loss.\n"
    )


def losses_apart(results):
    """The largest relative difference of a loss from that of our first process, over section `steps`."""
    apart = [0.0]
    for part in (found(results, "steps") or {}).values():
        runs = [run["losses"] for way in part["ways"].values() for run in way["runs"] if "losses" in run]
        apart += [abs(loss / own - 1) for run in runs for loss, own in zip(run, runs[0])]
    return max(apart)


def start_table(results):
    header = [
        "LoRA at `deep`, one process each",
        "first update after",
        "second",
        "compiled graph",
        "peak of the process",
        "later updates, s",
    ]
    rows = []
    for name, run in (found(results, "first") or {}).items():
        memory = [number(run[key] / 1024, 2, " GB") if key in run else "-" for key in ("graph_mb", "peak_mb")]
        times = [
            number(run.get(key), 1, " s") if "failed" not in run else f"failed: {run['failed'][:80]}"
            for key in ("first", "second")
        ]
        rows.append([name, *times, *memory, number(run.get("update"), 3)])
    return table(header, rows)


def start_of_steps_table(results):
    """The first update in the first round of section `steps`."""
    ways = ("ours", "ours, PyNative", "mindone", "PyTorch")
    rows = []
    for case, part in (found(results, "steps") or {}).items():
        runs = [part["ways"].get(way, {"runs": [{}]})["runs"][0] for way in ways]
        graphs = [number(run["graph_mb"] / 1024, 2) if "graph_mb" in run else "-" for run in (runs[0], runs[2])]
        rows.append([case_name(case), *(number(run.get("first"), 1) for run in runs), *graphs])
    return table(["first update after, s", *ways, "graph of ours, GB", "graph of mindone, GB"], rows)


def limit_table(results):
    part = found(results, "limit")
    all_steps = found(results, "steps") or {}
    if not part or "best" not in part["rate"]:
        return "Not measured.\n"
    runs = [run for run in part["rate"]["runs"] if "rates" in run]
    best, shape = max((rate, shape) for run in runs for shape, rate in run["rates"].items())
    cases = {
        f"{case_name(case)}, in turn with the rate": (counted, part[case])
        for case, counted in part["operations"].items()
    }
    cases.update({case_name(case): (step["operations"], step["ways"]["ours"]) for case, step in all_steps.items()})
    rows = []
    for name, (counted, ours) in cases.items():
        limit = sum(counted.values()) / best
        seconds = ours.get("update")
        cells = [f"{counted[way] / 1e9:,.1f}" for way in ("forward", "backward")]
        rows.append([name, *cells, number(limit, 3), number(seconds, 3), number(ratio(limit, seconds))])
    text = f"Best rate of a matrix product: {best / 1e9:.0f} GFLOP/s ({shape}).\n\n"
    text += table(["step", "forward, GFLOP", "backward, GFLOP", "limit, s", "ours, s", "share of the limit"], rows)
    checks = [
        (sum(s["operations"].values()), s["operations_by_torch"])
        for s in all_steps.values()
        if s.get("operations_by_torch")
    ]
    if checks:
        apart = max(abs(ours / theirs - 1) for ours, theirs in checks)
        text += f"\nPyTorch's own counter on {len(checks)} of these steps: the same number within {apart:.1e}.\n"
    return text


def sampling_table(results):
    header = ["seconds per image", "steps", "ours", "PyTorch", "PyTorch / ours", "first image of ours", "of PyTorch"]
    rows = []
    apart = []
    for case, part in (found(results, "sampling") or {}).items():
        ways = [part["ours"], part["PyTorch"]]
        firsts = [number(way["runs"][0].get("first")) for way in ways]
        times = [spread(way, "image", 2) for way in ways]
        faster = number(ratio(*(way.get("image") for way in reversed(ways))))
        rows.append([SAMPLED[case], part["steps"], *times, faster, *firsts])
        apart += [latents_apart(ways)]
    text = table(header, rows)
    if rows:
        text += f"\nThe latents of ours and PyTorch's images differ by at most {max(apart):.1e} of the largest value.\n"
    return text


def latents_apart(ways):
    """The largest difference of a latent from that of the first run, over the largest latent."""
    latents = [run["latents"] for way in ways for run in way["runs"] if "latents" in run] or [[1.0]]
    largest = max(map(abs, latents[0]))
    return max(abs(value - own) for other in latents for value, own in zip(other, latents[0])) / largest


def script_table(results):
    header = [
        "training script, shapes pipeline, batch 4",
        "images per second",
        "s per update",
        "first update after",
        "peak, GB",
    ]
    names = {
        "cached": "`--cache_latents`, text cached",
        "vae": "VAE inside the step, text cached",
        "seeds": "the original step: mindone's modules, VAE inside the step, text cached",
        "seeds text": "the same with CLIP and T5 inside the step too",
    }
    rows = []
    for form, part in (found(results, "cached") or {}).items():
        run = next((run for run in part["runs"] if "update" in run), {})
        cells = [
            number(part.get("images_per_second"), 1),
            number(run.get("update"), 3),
            number(run.get("first"), 1, " s"),
        ]
        rows.append([names[form], *cells, number(run["peak_mb"] / 1024, 2) if run else part.get("failed", "")[:80]])
    return table(header, rows)


def host_table(results):
    rows = []
    for name, part in (found(results, "host") or {}).items():
        run = next((run for run in part["runs"] if "update" in run), {})
        cells = [number(run.get(key), 4) for key in ("update", "in_step")]
        late = f"{worst(results, name, 'late')} of {run['batches'] - 1}" if run else "-"
        waits = [number(run.get("first_wait"), 3), late, percent(worst(results, name, "waited"))]
        rows.append([name, *cells, percent(part.get("outside")), *waits])
    header = [
        "training script, caches",
        "s per update",
        "in the step, s",
        "outside",
        "first batch, s",
        "later batches waited for",
        "total wait",
    ]
    return table(header, rows)


def encode_table(results):
    rows = []
    for name, ways in (found(results, "encode") or {}).items():
        rates = [ways[way].get("images_per_second") for way in ("ours", "PyTorch")]
        rows.append([name, *(number(rate) for rate in rates), number(ratio(*rates))])
    return table(["images per second", "the encoder stage", "PyTorch's encoder", "ours / PyTorch's"], rows)


def loading_table(results):
    rows = []
    for row in found(results, "loading") or ():
        cells = [number(row["weights"] / 1024, 2)]
        for way in ("ours", "mindone"):
            cells += [number(row[f"{way} peak"] / row["weights"]), number(row[f"{way} seconds"], 1)]
        rows.append([f"{row['file']}, {row['shards']} file(s), into {row['memory']}", *cells])
    return table(["loading", "weights, GB", "ours: peak / weights", "s", "mindone: peak / weights", "s"], rows)


def growth_table(results):
    names = {"tokens": "{} image tokens", "batch": "batch of {}", "blocks": "{} blocks", "images": "{} images"}
    rows = []
    for row in found(results, "growth") or ():
        if row["what"] == "images":
            more = f"first update after {number(row['first'], 1)} s, peak {number((row['peak_mb'] or 0) / 1024, 2)} GB"
        else:
            more = f"PyTorch {number(row['PyTorch'], 3)} s; {sum(row['operations'].values()) / 1e9:,.0f} GFLOP"
        rows.append([names[row["what"]].format(row["amount"]), number(row.get("ours", row.get("update")), 3), more])
    return table(["LoRA at `mid` (images: the script, shapes)", "ours, s per update", ""], rows)


def disturbances(results):
    """When each section was measured, how long it took, and which sections other processes disturbed."""
    made = {name: part for name, part in results.items() if isinstance(part, dict) and "made" in part}
    dates = [f"{name} {part['made']} ({part['minutes']:.0f} minutes)" for name, part in made.items()]
    text = f"Measured: {', '.join(dates)}.\n"
    bad = [f"{name} ({part['others']:.2f} cores)" for name, part in made.items() if disturbed(results, name)]
    if bad:
        text += f"\n**Unreliable**: other processes used the CPU during {', '.join(bad)}. "
        text += "PyTorch suffers most from that, because its threads wait for each other by spinning.\n"
    return text


def tables(results):
    """The page between its two comments."""
    computer = results["machine"]
    packages = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    parts = [
        ("Targets", targets),
        ("Steps", step_table),
        ("From the start of a process", start_table),
        (None, start_of_steps_table),
        ("The limit", limit_table),
        ("Sampling an image", sampling_table),
        ("Caches", script_table),
        ("Time outside the step", host_table),
        ("Encoder stage", encode_table),
        ("Loading", loading_table),
        ("Growth", growth_table),
    ]
    hardware = [computer["processor"], f"{computer['cores']} cores", f"{computer['memory_gb']} GB"]
    hardware.append(computer["architecture"])
    machine = f"Machine: {', '.join(hardware)}. Versions: {packages}. {disturbances(results)}"
    text = ["\n".join(textwrap.fill(line, 100) for line in machine.split("\n"))]
    for title, make in parts:
        text.append((f"### {title}\n\n" if title else "") + make(results))
    return "\n".join(text)


# ---- plot ----------------------------------------------------------------------------------------


def plot(rows, path):
    """Draws seconds per update over tokens, batch and blocks, ours and PyTorch's, and over the images of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, 4)
    titles = {"tokens": "image tokens", "batch": "batch", "blocks": "blocks", "images": "images"}
    for axis, (what, label) in zip(axes, titles.items()):
        own = sorted((row for row in rows if row["what"] == what), key=lambda row: row["amount"])
        lines = {"ours": "ours", "PyTorch": "PyTorch"}
        if what == "images":
            lines = {"first": "to first update", "update": "per update"}
        for key, name in lines.items():
            points = [(row["amount"], row[key]) for row in own if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, label=name)
        axis.set(xlabel=label, ylabel="seconds" if what in ("tokens", "images") else None)
        if what == "images":
            axis.set(xscale="log", yscale="log")
        else:
            axis.set(ylim=(0, None), xlim=(0, None))
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=90)
