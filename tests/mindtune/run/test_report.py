"""The report of a run: one file that needs no network, tested in a real browser."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from mindtune.run import report

# Scripts that the tests add to the page. WATCH records errors from the start, PROBE uses the slider and reports.
WATCH = "<script>const errors = []; window.onerror = text => errors.push(text);</script>"
PROBE = """<script>
const seen = [], input = document.getElementById("step");
const all = [...document.querySelectorAll("#images img")];
const visible = () => all.filter(i => i.offsetParent !== null).map(i => [i.alt, i.naturalWidth > 0]);
for (const place of [2, 0, 1]) { input.value = place; input.dispatchEvent(new Event("input")); seen.push(visible()); }
const caption = document.getElementById("caption").textContent;
const outside = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
const wide = document.documentElement.scrollWidth > innerWidth;
const found = {errors, seen, caption, wide, outside: outside.length, ink: getComputedStyle(document.body).color};
document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
</script>"""


@pytest.fixture
def run(tmp_path):
    """The files of a run with 120 updates, two validations and a final one."""
    out = tmp_path / "a <cat> & co"
    (out / "samples").mkdir(parents=True)
    record = {
        "flags": {"validation_prompt": ["</script><b>cat</b>"], "seed": None, "cache_latents": True, "hub_token": None},
        "versions": {"mindspore": "2.7.1", "datasets": None},
        "device": "CPU",
        "seed": 7,
        "finished": True,
        "updates": 120,
        "trainable": {"transformer": 1234567},
        "data": {"fingerprint": "0123456789abcdef"},
        "seconds_per_step": 0.25,
        "seconds_to_first_update": 12.5,
        "seconds_total": None,
        "memory": {"predicted_mb": 1000.0, "measured_mb": 1100.0},
        "peak_memory_mb": {"training_process": 1100, "encode_process": 500},
    }
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
    """What PROBE reports in headless Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "this test needs Chromium: install it (Debian: apt-get install chromium)"
    text = page.read_text().replace("<body>", f"<body>{WATCH}").replace("</body>", f"{PROBE}</body>")
    copy = page.with_name("probe.html")
    copy.write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom", *flags]
    done = subprocess.run([browser, *options, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search("FOUND(.*)END", done.stdout)[1]))


def test_the_slider_selects_an_image_and_the_page_loads_nothing(run):
    found = browse(report.write_report(run))
    assert found["errors"] == [] and found["outside"] == 0 and not found["wide"]
    assert found["seen"] == [[["at the end", True]], [["after 40 updates", True]], [["after 80 updates", True]]]
    assert found["caption"] == "after 80 updates"


def test_a_narrow_screen_in_dark_mode(run):
    """The page fits a telephone's width, and its text is light."""
    found = browse(report.write_report(run), "500,800", "--blink-settings=preferredColorScheme=0")
    assert found["errors"] == [] and not found["wide"]
    assert min(map(int, re.findall(r"\d+", found["ink"])[:3])) > 200


def test_the_page_has_no_links_and_escapes_users_texts(run):
    page = report.write_report(run).read_text()
    assert not re.search(r'(src|href)="(?!data:)[a-z]', page)
    assert "@import" not in page and "url(" not in page.replace("url(#", "")
    assert "a &lt;cat&gt; &amp; co" in page and "<b>cat</b>" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    texts = ["finished after 120 updates", "1,234,567", "0.25 s", "memory, predicted", "1,100 MB"]
    for text in (*texts, "--cache_latents", "not installed"):
        assert text in page, text
    assert "--seed<" not in page and "whole run" not in page and "hub_token" not in page


def test_the_moving_average():
    points = [(step, float(step**2)) for step in range(1, 11)]
    expected = [(step, np.mean([(step - k) ** 2 for k in range(4)])) for step in range(4, 11)]
    np.testing.assert_allclose(report._moving_average(points, 4), expected)


def test_the_curves_of_a_long_run_are_thinned(run):
    rows = [{"step": step, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0} for step in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.write_report(run).stat().st_size < 400_000


def test_a_run_stopped_before_its_first_validation(run):
    shutil.rmtree(run / "samples")
    (run / "loss_by_timestep.csv").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 2.0}\n')
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": False, "updates": 1}))
    page = report.write_report(run).read_text()
    assert "stopped after 1 updates" in page and "Validation images" not in page and "held-out" not in page.lower()
