"""The report of a run: one file that needs no network, tested in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from mindtune.run import report, report_images

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
const rows = [...document.querySelectorAll(".rows tr")].map(row => [...row.children].map(cell => {
  const image = cell.querySelector("img");
  return image ? [image.naturalWidth, image.naturalHeight] : cell.textContent;
}));
const found = {errors, seen, caption, wide, rows, outside: outside.length, ink: getComputedStyle(document.body).color};
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
    write_rows(run, "final", [{"prompt": "<i>cat</i>"}])
    page = report.write_report(run).read_text()
    assert "<i>cat" not in page and "&lt;i&gt;cat&lt;/i&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)[a-z]', page)
    assert "@import" not in page and "url(" not in page.replace("url(#", "")
    assert "a &lt;cat&gt; &amp; co" in page and "<b>cat</b>" not in page and "&lt;b&gt;cat&lt;/b&gt;" in page
    texts = ["finished after 120 updates", "1,234,567", "0.25 s", "memory, predicted", "1,100 MB"]
    for text in (*texts, "--cache_latents", "not installed"):
        assert text in page, text
    assert "--seed<" not in page and "whole run" not in page and "hub_token" not in page


# ---- rows of --validation_file -------------------------------------------------------------------


def write_rows(run, name, rows, *kinds, size=(64, 64)):
    """The folder of a validation: what the rows are, and an image of `size` for each and for each of `kinds`."""
    folder = run / "samples" / name
    folder.mkdir(parents=True)
    settings = {"seed": 1, "width": size[0], "height": size[1], "steps": 20, "guidance": 3.5}
    lines = "".join(json.dumps({**settings, **row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    for place in range(1, len(rows) + 1):
        for kind in ("", *kinds):
            Image.new("RGB", size, "red").save(folder / f"row-{place:02d}{kind}.png")


def image_size(cell):
    """The (width, height) of the image in a part of the page, None without one."""
    data = re.search(r"data:image/webp;base64,([^\"]+)", cell)
    return data and Image.open(io.BytesIO(base64.b64decode(data[1]))).size


def table(run):
    """The table of a new report: the titles of its columns, and (prompt, sizes of images) of each row."""
    page = report.write_report(run).read_text()
    header, *rows = re.findall("<tr>(.*?)</tr>", page.split('<div class="table rows">')[1].split("</table>")[0])
    cells = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    sizes = [(label.split("<br>")[0], [image_size(cell) for cell in others]) for label, *others in cells]
    return re.findall("<th>(.*?)</th>", header), sizes


def test_rows_of_a_file_are_side_by_side_over_the_updates(run):
    rows = [{"prompt": "a cat", "seed": 9}, {"prompt": "a dog", "image": "x/y.png", "scale": 0.5}]
    for name in ("step-000040", "step-001080"):
        write_rows(run, name, rows, "-condition")
    write_rows(run, "final", rows, "-condition", "-base")
    (run / "samples" / "final" / "row-02-base.png").unlink()
    (run / "samples" / "step-mine").mkdir()
    found = browse(report.write_report(run))
    assert found["errors"] == [] and found["outside"] == 0 and not found["wide"]
    header, cat, dog = found["rows"]
    assert header == ["", "condition", "base", "after 40 updates", "after 1,080 updates", "at the end"]
    assert cat == ["a cat64 x 64, seed 9, steps 20, guidance 3.5", *[[64, 64]] * 5]
    assert dog == [
        "a dog64 x 64, seed 1, steps 20, guidance 3.5, image y.png, scale 0.5",
        [64, 64],
        "",
        *[[64, 64]] * 3,
    ]


def test_rows_of_a_file_that_was_changed_before_resuming_are_apart(run):
    """Those of the last validation come first. Equal rows of a file stay two rows."""
    write_rows(run, "step-000040", [{"prompt": "old"}, {"prompt": "kept"}, {"prompt": "twice"}, {"prompt": "twice"}])
    write_rows(run, "step-000080", [{"prompt": "twice"}, {"prompt": "twice"}, {"prompt": "new"}, {"prompt": "kept"}])
    header, rows = table(run)
    assert header == ["", "after 40 updates", "after 80 updates"]
    there, none = (64, 64), None
    assert rows == [
        ("twice", [there, there]),
        ("twice", [there, there]),
        ("new", [none, there]),
        ("kept", [there, there]),
        ("old", [there, none]),
    ]


def test_the_images_in_a_report_are_small_and_few(run):
    """Thumbnails of noise, which compresses worst, in a page below 12 MB."""
    rows = [{"prompt": f"prompt {number}"} for number in range(120)]
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    for step in range(1, 9):
        write_rows(run, f"step-{step:06d}", rows, size=(1, 1))
        for place in (1, 100):
            Image.fromarray(noise).save(run / "samples" / f"step-{step:06d}" / f"row-{place:02d}.png")
    header, found = table(run)
    assert header == ["", "after 1 updates", "after 3 updates", "after 6 updates", "after 8 updates"]
    assert len(found) == 100 and found[0] == ("prompt 0", [(256, 256)] * 4) and found[99][1] == [(256, 256)] * 4
    page = (run / "report.html").read_text()
    assert "4 of 8 validations are shown. 100 of 120 rows are shown." in page


def test_a_grid_that_is_higher_than_webp_can_be(run):
    Image.new("RGB", (32, 20_000)).save(run / "samples" / "final.png")
    page = report.write_report(run).read_text()
    assert image_size(page[page.index('<img alt="at the end"') :]) == (26, 16_000)


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


def test_the_rows_of_the_last_validation(tmp_path):
    """For the form: of the end, or else of the newest step."""
    assert report_images.newest_rows(tmp_path) == []
    for name, prompts in (("step-000002", ["a", "b"]), ("step-000010", ["a"]), ("final", ["b", "c"])):
        folder = tmp_path / "samples" / name
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        found = report_images.newest_rows(tmp_path)
        assert found == [(folder / f"row-{place:02d}.png", prompt) for place, prompt in enumerate(prompts, 1)]
