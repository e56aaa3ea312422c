"""The report of a run: one HTML file that needs no network, with curves, validation images, flags, memory and time."""

from __future__ import annotations

import csv
import html
import io
import json
from pathlib import Path

import numpy as np

from mindtune.files import write_atomically
from mindtune.run import report_images

REPORT_FILE = "report.html"
MAX_POINTS = 600  # per curve: a screen cannot show more
INK = (
    "#010203"  # the colour of matplotlib's axes and text; the page replaces it by the colour of its light or dark mode
)

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 12px; }
h1 { font-size: 1.4em; margin: .3em 0; } h2 { font-size: 1.1em; margin: 1.2em 0 .4em; }
.plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.plots svg, img { display: block; height: auto; max-width: 100%; width: 100%; }
img { width: auto; } img[hidden] { display: none; }
input[type=range] { max-width: 420px; width: 100%; }
.table { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; }
th, td { overflow-wrap: anywhere; } td { min-width: 9em; }
tr + tr > * { border-top: 1px solid #8885; }
.rows th, .rows td { min-width: 0; padding: 4px 8px 4px 0; }
.rows th { font-weight: normal; }
.rows th:first-child { background: Canvas; left: 0; min-width: min(200px, 26vw); position: sticky; }
.rows img { max-width: none; width: 160px; } small { color: #888; }
footer { color: #888; margin: 2em 0 1em; }
"""
SCRIPT = """
const slider = document.getElementById("step"), images = document.querySelectorAll("#images img");
function show() {
  images.forEach((image, index) => { image.hidden = index !== Number(slider.value); });
  document.getElementById("caption").textContent = images[slider.value].alt;
}
if (slider) { slider.addEventListener("input", show); show(); }
"""


def write_report(output_dir: Path) -> Path:
    """Writes report.html from the files of a run: metrics.jsonl, run.json, loss_by_timestep.csv and samples/*.png."""
    record = json.loads((output_dir / "run.json").read_text())
    metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    name = html.escape(output_dir.resolve().name)
    state = "finished" if record["finished"] else "stopped"
    device = html.escape(str(record["device"]))
    parameters = [(part, f"{count:,}") for part, count in record["trainable"].items()]
    flags = [(f"--{flag}", value) for flag, value in record["flags"].items() if value not in (None, False, "", [])]
    versions = [(package, version or "not installed") for package, version in record["versions"].items()]
    body = [
        f"<h1>{name}</h1><p>{state} after {record.get('updates', 0):,} updates on {device}</p>",
        f'<div class="plots">{"".join(curves(output_dir, metrics))}</div>',
        _section("Validation images", report_images.grids(output_dir)),
        _section("Images of the validation file", report_images.table(output_dir)),
        _section("Time and memory", _table(_time_and_memory(record))),
        _section("Trained parameters", _table(parameters)),
        _section("Flags", _table(flags)),
        _section("Versions", _table(versions)),
        f"<footer>Written by MindTune. Seed {record['seed']}, data {record['data']['fingerprint'][:12]}.</footer>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{''.join(body)}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
    path = output_dir / REPORT_FILE
    write_atomically(path, lambda beside: beside.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return path


def _section(title: str, content: str) -> str:
    """A heading and its content; nothing without content."""
    return f"<h2>{title}</h2>{content}\n" if content else ""


def _table(rows: list[tuple]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows
    )
    return f'<div class="table"><table>{cells}</table></div>'


def _time_and_memory(record: dict) -> list[tuple[str, str]]:
    times = [
        ("per step", "seconds_per_step"),
        ("to the first update", "seconds_to_first_update"),
        ("whole run", "seconds_total"),
    ]
    rows = [(label, f"{record[key]:,.3g} s") for label, key in times if record.get(key) is not None]
    memory = dict(record.get("memory") or {})
    if blocks := memory.pop("recomputed_blocks", 0):
        rows.append(("recomputed blocks", str(blocks)))
    memory = {key.removesuffix("_mb"): value for key, value in memory.items() if value is not None}
    rows += [(f"memory, {name}", f"{value:,.0f} MB") for name, value in memory.items()]
    peaks = record.get("peak_memory_mb") or {}
    return rows + [(f"peak, {process.replace('_', ' ')}", f"{value:,} MB") for process, value in peaks.items()]


# ---- curves --------------------------------------------------------------------------------------


def curves(output_dir: Path, metrics: list[dict]) -> list[str]:
    """An SVG plot each of loss, learning rate, gradient norm and, if there are any, held-out losses.

    `metrics` are the lines of metrics.jsonl.
    """

    def points(key: str) -> list[tuple]:
        return [(line["step"], line[key]) for line in metrics if key in line]

    loss = points("loss")
    losses = {"each update": loss}
    if len(loss) >= 50:
        losses["mean of 20"] = _moving_average(loss, 20)
    clip_rates = points("lr_text_encoder")
    rates = {"transformer" if clip_rates else "": points("lr"), "CLIP": clip_rates}
    plots = [
        _plot("Loss", "update", losses),
        _plot("Learning rate", "update", rates),
        _plot("Gradient norm", "update", {"": points("grad_norm")}),
    ]
    if held_out := points("held_out__loss"):
        plots.append(_plot("Held-out loss", "update", {"": held_out}))
        plots.append(_by_timestep(output_dir / "loss_by_timestep.csv"))
    return plots


def _moving_average(points: list[tuple], count: int) -> list[tuple]:
    """The mean of each point and the `count` - 1 before it, from the first point that has that many."""
    sums = np.cumsum([0.0, *(value for _, value in points)])
    return [(points[i + count - 1][0], (sums[i + count] - sums[i]) / count) for i in range(len(points) - count + 1)]


def _by_timestep(path: Path) -> str:
    """Held-out loss by timestep: the first, the middle and the last evaluation."""
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    rows = [(int(step), float(place), float(loss)) for step, place, loss in lines]
    steps = sorted({row[0] for row in rows})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    curves = {f"after {step}": sorted((place, loss) for s, place, loss in rows if s == step) for step in chosen}
    return _plot("Held-out loss by timestep", f"{header[1]} (0 image, 1 noise)", curves)


def _plot(title: str, label: str, curves: dict[str, list[tuple]]) -> str:
    """SVG of curves (name -> points (x, y)), in the page's own text colour and font.

    Curves without points are left out.
    """
    # matplotlib takes a third of a second to import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": title}
    settings.update(
        dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    )
    curves = {name: points for name, points in curves.items() if points}
    with rc_context(settings):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            thinned = points[:: -(-len(points) // MAX_POINTS)]
            pale = name == "each update" and len(curves) > 1
            axes.plot(
                *zip(*thinned),
                label=name,
                color="#9aa7b8" if pale else f"C{index}",
                linewidth=0.8 if pale else 1.6,
                marker="" if len(thinned) > 8 else "o",
                markersize=3,
            )
        axes.set(title=title, xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
