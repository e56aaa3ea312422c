"""The report of a run: one file, no network, its curves and pictures; looked at in a real browser."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from mindtune.run import report

# What the page says and does, read by a script of the test's after it has loaded; errors are noted from before its own script runs.
WATCH = "<script>const errors = []; window.onerror = text => errors.push(text);</script>"
PROBE = """<script>
const seen = [], input = document.getElementById("step");
const all = [...document.querySelectorAll("#pictures img")];
const shown = () => all.filter(i => i.offsetParent !== null).map(i => [i.alt, i.naturalWidth > 0]);
for (const place of [2, 0, 1]) { input.value = place; input.dispatchEvent(new Event("input")); seen.push(shown()); }
const words = document.getElementById("shown").textContent;
const outside = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
const wide = document.documentElement.scrollWidth > innerWidth;
const found = {errors, seen, words, wide, outside: outside.length, ink: getComputedStyle(document.body).color};
document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
</script>"""


@pytest.fixture
def run(tmp_path):
    """What a run leaves: 120 updates, two validations and a final one."""
    out = tmp_path / "a <cat> & co"
    (out / "samples").mkdir(parents=True)
    record = {
        "flags": {"validation_prompt": ["</script><b>cat</b>"], "seed": None, "cache_latents": True, "hub_token": None},
        "versions": {"mindspore": "2.7.1", "datasets": None}, "device": "CPU", "seed": 7, "finished": True, "updates": 120,
        "trainable": {"transformer": 1234567}, "data": {"fingerprint": "0123456789abcdef"}, "seconds_per_step": 0.25,
        "seconds_to_first_update": 12.5, "seconds_total": None, "memory": {"predicted_mb": 1000.0, "measured_mb": 1100.0},
        "peak_memory_mb": {"training_process": 1100, "encode_process": 500},
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(record))
    rows = [{"step": step, "loss": 1.0 / step, "lr": 1e-4, "grad_norm": 1.0} for step in range(1, 121)]
    rows += [{"step": step, "held_out__loss": 2.0} for step in (0, 60, 120)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "loss_by_timestep.csv").write_text(
        "step,sigma,loss\n" + "".join(f"{s},{t},{t + s}\n" for s in (0, 60, 120) for t in (0.9, 0.1))
    )
    for number, name in enumerate(("step-000040", "step-000080", "final")):
        Image.new("RGB", (2000, 300), (80 * number, 0, 0)).save(out / "samples" / f"{name}.png")
    return out


def browse(page, size="1200,900", *flags):
    """What PROBE finds in headless Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "this test looks at the page in Chromium: install it (Debian: apt-get install chromium)"
    text = page.read_text().replace("<body>", f"<body>{WATCH}").replace("</body>", f"{PROBE}</body>")
    copy = page.with_name("probe.html")
    copy.write_text(text)
    words = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={size}",
        "--dump-dom",
        *flags,
        copy.as_uri(),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search("FOUND(.*)END", done.stdout)[1]))


def test_in_a_browser_the_slider_changes_the_picture_and_nothing_comes_from_elsewhere(run):
    found = browse(report.write_report(run))
    assert found["errors"] == [] and found["outside"] == 0 and not found["wide"]
    assert found["seen"] == [[["at the end", True]], [["after 40 updates", True]], [["after 80 updates", True]]]
    assert found["words"] == "after 80 updates"


def test_narrow_and_dark(run):
    """Nothing sticks out of a telephone's width; letters are light on dark."""
    found = browse(report.write_report(run), "500,800", "--blink-settings=preferredColorScheme=0")
    assert found["errors"] == [] and not found["wide"]
    assert min(map(int, re.findall(r"\d+", found["ink"])[:3])) > 200


def test_the_page_needs_no_network_and_escapes_what_users_wrote(run):
    page = report.write_report(run).read_text()
    assert (
        not re.search(r'(src|href)="(?!data:)[a-z]', page)
        and "@import" not in page
        and "url(" not in page.replace("url(#", "")
    )
    assert "a &lt;cat&gt; &amp; co" in page and "<b>cat</b>" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    for said in (
        "finished after 120 updates",
        "1,234,567",
        "0.25 s",
        "memory, predicted",
        "1,100 MB",
        "--cache_latents",
        "not installed",
    ):
        assert said in page, said
    assert "--seed<" not in page and "the whole run" not in page and "hub_token" not in page


def test_a_mean_of_neighbours_is_their_mean():
    points = [(step, float(step**2)) for step in range(1, 11)]
    expected = [(step, np.mean([(step - k) ** 2 for k in range(4)])) for step in range(4, 11)]
    np.testing.assert_allclose(report._means(points, 4), expected)


def test_a_long_run_is_thinned(run):
    rows = [{"step": step, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0} for step in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.write_report(run).stat().st_size < 400_000


def test_a_run_stopped_before_it_looked(run):
    shutil.rmtree(run / "samples")
    (run / "loss_by_timestep.csv").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0}\n')
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": False, "updates": 1}))
    page = report.write_report(run).read_text()
    assert "stopped after 1 updates" in page and "Validation pictures" not in page and "held-out" not in page.lower()
