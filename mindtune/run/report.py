"""One page of HTML that shows a run, in one file without a network: curves, pictures over time, flags, memory and time."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from mindtune.files import write_atomically

REPORT_FILE = "report.html"
POINTS = 600  # of a curve: more cannot be told apart on a screen
WIDTH = 1280  # of pictures, in pixels at most
INK = "#010203"  # matplotlib's lines and letters; in the page they take the reader's light or dark mode

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
tr + tr > * { border-top: 1px solid #8885; } footer { color: #888; margin: 2em 0 1em; }
"""
SCRIPT = """
const slider = document.getElementById("step"), pictures = document.querySelectorAll("#pictures img");
function show() {
  pictures.forEach((picture, number) => { picture.hidden = number !== Number(slider.value); });
  document.getElementById("shown").textContent = pictures[slider.value].alt;
}
if (slider) { slider.addEventListener("input", show); show(); }
"""


def write_report(output_dir: Path) -> Path:
    """report.html of what a run has left in `output_dir` so far: metrics.jsonl, run.json, loss_by_timestep.csv and samples/*.png."""
    record = json.loads((output_dir / "run.json").read_text())
    metrics = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    name, state = output_dir.resolve().name, "finished" if record["finished"] else "stopped"
    parts = [
        f"<h1>{html.escape(name)}</h1><p>{state} after {record.get('updates', 0):,} updates on {html.escape(str(record['device']))}</p>",
        f'<div class="plots">{"".join(_curves(output_dir, metrics))}</div>',
        _pictures(output_dir),
        _section("Time and memory", _table(_measured(record))),
        _section("Trained parameters", _table([(part, f"{count:,}") for part, count in record["trainable"].items()])),
        _section(
            "Flags",
            _table(
                [(f"--{flag}", value) for flag, value in record["flags"].items() if value not in (None, False, "", [])]
            ),
        ),
        _section(
            "Versions",
            _table([(package, version or "not installed") for package, version in record["versions"].items()]),
        ),
        f"<footer>Written by MindTune. Seed {record['seed']}, data {record['data']['fingerprint'][:12]}.</footer>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{''.join(parts)}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
    path = output_dir / REPORT_FILE
    write_atomically(path, lambda beside: beside.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return path


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}\n"


def _table(rows: list[tuple]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows
    )
    return f'<div class="table"><table>{cells}</table></div>'


def _measured(record: dict) -> list[tuple[str, str]]:
    rows = [
        (label, f"{record[key]:,.3g} s")
        for label, key in (
            ("a step", "seconds_per_step"), ("to the first update", "seconds_to_first_update"), ("the whole run", "seconds_total"),
        )
        if record.get(key) is not None
    ]  # fmt: skip
    memory = {key.removesuffix("_mb"): value for key, value in (record.get("memory") or {}).items()}
    rows += [(f"memory, {what}", f"{value:,.0f} MB") for what, value in memory.items() if value is not None]
    peaks = record.get("peak_memory_mb") or {}
    return rows + [(f"peak, {who.replace('_', ' ')}", f"{value:,} MB") for who, value in peaks.items()]


# ---- curves --------------------------------------------------------------------------------------


def _curves(output_dir: Path, metrics: list[dict]) -> list[str]:
    def values(key):
        return [(line["step"], line[key]) for line in metrics if key in line]

    loss = values("loss")
    shown = {"each update": loss}
    if len(loss) >= 50:
        shown["mean of 20"] = _means(loss, 20)
    rates = {"transformer" if values("lr_text_encoder") else "": values("lr"), "CLIP": values("lr_text_encoder")}
    plots = [_plot("Loss", "update", shown), _plot("Learning rate", "update", rates)]
    plots.append(_plot("Gradients' norm", "update", {"": values("grad_norm")}))
    if held_out := values("held_out__loss"):
        plots.append(_plot("Loss on held-out pictures", "update", {"": held_out}))
        plots.append(_by_timestep(output_dir / "loss_by_timestep.csv"))
    return plots


def _means(points: list[tuple], count: int) -> list[tuple]:
    """The mean of every `count` neighbours, at the last one's place."""
    sums = np.cumsum([0.0, *(value for _, value in points)])
    return [(points[i + count - 1][0], (sums[i + count] - sums[i]) / count) for i in range(len(points) - count + 1)]


def _by_timestep(path: Path) -> str:
    """Held-out loss at each timestep: the first, the middle and the last time that it was measured."""
    with open(path, newline="") as file:
        place, rows = next(iter(csv.reader(file)))[1], [(int(a), float(b), float(c)) for a, b, c in csv.reader(file)]
    steps = sorted({row[0] for row in rows})
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    lines = {f"after {step}": sorted((at, loss) for s, at, loss in rows if s == step) for step in chosen}
    return _plot("Held-out loss by timestep", f"{place} (0 image, 1 noise)", lines)


def _plot(title: str, label: str, lines: dict[str, list[tuple]]) -> str:
    """SVG of some lines (name -> points (x, y)), in the page's own colours and letters."""
    settings = {"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": title}
    settings.update(
        dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    )
    with rc_context(settings):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(line for line in lines.items() if line[1]):
            kept = points[:: -(-len(points) // POINTS)]
            pale = name == "each update" and len(lines) > 1
            axes.plot(*zip(*kept), label=name, color="#9aa7b8" if pale else f"C{number}", linewidth=0.8 if pale else 1.6, marker="" if
                      len(kept) > 8 else "o", markersize=3)  # fmt: skip
        axes.set(title=title, xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        if len([name for name, points in lines.items() if points]) > 1:
            axes.legend(fontsize=8, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


# ---- pictures ------------------------------------------------------------------------------------


def _pictures(output_dir: Path) -> str:
    """The validation grids, one shown at a time; the last one without a script."""
    paths = sorted((output_dir / "samples").glob("step-*.png"))
    final = output_dir / "samples" / "final.png"
    paths += [final] if final.is_file() else []
    if not paths:
        return ""
    names = ["at the end" if path == final else f"after {int(path.stem[5:]):,} updates" for path in paths]
    images = "".join(_image(path, name, path is paths[-1]) for path, name in zip(paths, names))
    slider = (
        f'<input type="range" id="step" min="0" max="{len(paths) - 1}" value="{len(paths) - 1}" aria-label="Picture">'
    )
    return _section(
        "Validation pictures", f'<p>{slider} <span id="shown">{names[-1]}</span></p><div id="pictures">{images}</div>'
    )


def _image(path: Path, name: str, shown: bool) -> str:
    image, file = Image.open(path).convert("RGB"), io.BytesIO()
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.save(file, format="WEBP", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{name}" src="data:image/webp;base64,{data}"{"" if shown else " hidden"}>'
