"""The form in a real browser: fills it, reads the plan and the data check, trains, stops, and resumes to the end.

    python tests/app/browser.py [--screenshot build/app.png]

`make test-app` runs it, with Playwright and the Chromium of the system (Debian: apt-get install chromium). The base
model is examples/tiny/flux-shapes, the data are the images of examples/demo_flux_lora.py.
"""

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

from shapes import make_subject

FIELDS = {
    "output": "subject",
    "validation_prompt": "a sks circle on a blue background",
    "resolution": "64",
    "train_batch_size": "6",
    "max_train_steps": "4000",
    "learning_rate": "2e-3",
    "lora_rank": "16",
    "checkpointing_steps": "100000",
    "validation_epochs": "20",
    "seed": "0",
    "more": "--max_sequence_length 12 --num_inference_steps 12 --lr_warmup_steps 20 --timestep_shift 2.5",
}


# ---- the form as a process -----------------------------------------------------------------------


@contextlib.contextmanager
def running_form(work):
    """A form on the folders data, models and out of `work`: (address, process). Ends it with Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for name in ("data", "models") for word in (f"--{name}", str(work / name))]
    line = [sys.executable, "-m", "mindtune.app", *words, "--outputs", str(work / "out"), "--port", str(port)]
    with open(work / "form.log", "w") as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}/"
            wait(lambda: address in (work / "form.log").read_text(), 120, "the form's address")
            yield address, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def wait(ready, seconds, what):
    """Waits until `ready()`, at most `seconds`, and returns its result."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"{what}: not seen in {seconds} seconds"
        time.sleep(0.2)
    return found


def answer(address, **settings):
    """The HTTP status of a request."""
    try:
        return urllib.request.urlopen(urllib.request.Request(address, **settings)).status
    except urllib.error.HTTPError as error:
        return error.code


# ---- the page ------------------------------------------------------------------------------------


def text(page, name):
    return page.locator(f"#{name} textarea").input_value()


def problem(page):
    return page.locator("#problem").inner_text().strip()


def fill(page, name, value):
    page.locator(f"#{name}").locator("textarea, input").first.fill(value)


def choose(page, name, value):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def images(page, name):
    """The images of a gallery that are drawn."""
    script = "all => all.filter(image => image.naturalWidth > 0).length"
    return page.locator(f"#{name} img").evaluate_all(script)


def curves(page):
    return page.locator("#curves svg").count()


def is_enabled(page, name):
    return page.get_by_role("button", name=name, exact=True).is_enabled()


# ---- what is tried -------------------------------------------------------------------------------


def try_protection(address):
    """Files outside of the form, uploads, and pages of other sites are refused."""
    assert answer(address) == 200
    assert answer(address, headers={"Host": "example.com"}) == 400
    for path in ("/etc/hostname", ROOT / "setup.py"):
        assert answer(f"{address}gradio_api/file={path}") == 403
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "a"}).encode()
    foreign = {"Origin": "http://example.com", "Content-Type": "text/plain"}  # what a browser sends without asking
    assert answer(f"{address}gradio_api/queue/join", data=body, headers=foreign) == 422


def try_form(page):
    """The command line, its errors, the data check and the memory plan."""
    choose(page, "data", "subject")
    for name, value in FIELDS.items():
        fill(page, name, value)
    page.locator("#cache_latents input").check()
    shown = ("python ", "--lr_warmup_steps 20", "--cache_latents", "--instance_data_dir")
    wait(lambda: all(words in text(page, "command") for words in shown), 20, "the command line")

    fill(page, "more", f"{FIELDS['more']} --class_data_dir /etc --class_prompt x")
    press(page, "Start")
    wait(lambda: "--class_data_dir /etc: is outside of --outputs" in problem(page), 20, "the error")
    fill(page, "more", FIELDS["more"])

    press(page, "Check data")
    wait(lambda: "a run can start with this data" in text(page, "table"), 60, "the data check")
    wait(lambda: images(page, "thumbnails") == 6 and not problem(page), 20, "six thumbnails")
    fill(page, "more", "--resolution 100")
    press(page, "Check data")
    wait(lambda: "--resolution 100: must be divisible by 16" in problem(page), 20, "the error")
    assert images(page, "thumbnails") == 6
    fill(page, "more", FIELDS["more"])

    press(page, "Plan memory")
    wait(lambda: "fits a device of" in text(page, "plan"), 120, "the memory plan")


def try_training(page, out, screenshot):
    """Curves and images appear, Stop leaves a checkpoint, Resume continues from it."""
    wait(lambda: not is_enabled(page, "Stop"), 20, "Stop disabled")
    press(page, "Start")
    wait(lambda: is_enabled(page, "Stop") and not is_enabled(page, "Start"), 20, "Stop enabled")
    wait(lambda: curves(page) >= 3, 240, "curves")
    wait(lambda: images(page, "images") >= 2, 240, "validation images")
    if screenshot:
        Path(screenshot).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=screenshot, full_page=True)
    press(page, "Stop")
    wait(lambda: "To continue, add --resume_from_checkpoint latest" in text(page, "status"), 120, "the end of the run")
    (saved,) = out.glob("checkpoint-*")
    updates = int(saved.name.split("-")[1])
    assert 0 < updates < 4000 and len((out / "metrics.jsonl").read_text().splitlines()) >= updates

    fill(page, "max_train_steps", str(updates + 3))
    press(page, "Start")  # without resuming, the script refuses to write over the run
    wait(lambda: "failed with exit code 2\nerror: --output_dir" in text(page, "status"), 120, "the script's error")
    wait(lambda: is_enabled(page, "Resume"), 20, "Resume enabled")
    press(page, "Resume")
    wait(lambda: "finished" in text(page, "status"), 240, "the end of the resumed run")
    assert "--resume_from_checkpoint latest" in (out.parent / "subject.log").read_text()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()][-1] == updates + 3
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    return updates


def try_closed_browser(browser, address, page, out):
    """The run goes on without the page, and a new page shows it. The end of the form stops it with a checkpoint."""
    fill(page, "output", "second")
    fill(page, "max_train_steps", "4000")
    wait(lambda: "out/second" in text(page, "command"), 20, "the command line")
    press(page, "Start")
    wait(lambda: (out / "second" / "metrics.jsonl").is_file(), 240, "metrics of the second run")
    page.close()
    page = browser.new_page()
    page.goto(address)
    page.get_by_role("tab", name="Training").click()
    wait(lambda: "running" in text(page, "status") and curves(page) >= 3, 60, "the run on a new page")
    fields = {name: value for name, value in FIELDS.items() if name not in ("output", "max_train_steps")}
    for name, value in {"output": "second", "max_train_steps": "4000", **fields}.items():
        assert page.locator(f"#{name}").locator("textarea, input").first.input_value() == value
    assert "out/second" in text(page, "command") and page.locator("#cache_latents input").is_checked()
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--screenshot", help="PNG file for a picture of the page during training. Default: none.")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert chromium, "this test needs Chromium: install it (Debian: apt-get install chromium)"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "out").mkdir()
        shutil.copytree(ROOT / "examples/tiny/flux-shapes", work / "models/flux-shapes")
        make_subject(work / "data/subject", 64)
        with sync_playwright() as playwright, running_form(work) as (address, _):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            requests, errors = [], []
            page.on("request", lambda request: requests.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.locator("#command textarea").wait_for()
            try_protection(address)
            try_form(page)
            updates = try_training(page, work / "out/subject", args.screenshot)
            try_closed_browser(browser, address, page, work / "out")
            assert errors == []
            assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        assert "saved" in (work / "form.log").read_text() and list((work / "out/second").glob("checkpoint-*"))
    print(f"the form: data check, memory plan, curves, images, stop after {updates} updates, resume: all as expected")


if __name__ == "__main__":
    main()
