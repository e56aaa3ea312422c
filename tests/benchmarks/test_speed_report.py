"""docs/performance.md says what benchmarks/results/speed.json has, and whether the targets are reached."""

import json

import pytest
from conftest import ROOT, load_script

report = load_script("benchmarks/speed_report.py")


def way(seconds, key="update", **more):
    """An implementation with one run per number of seconds, as benchmarks/speed.py saves it."""
    runs = [{key: value, **more} for value in seconds]
    return {key: sorted(seconds)[len(seconds) // 2], "least": min(seconds), "most": max(seconds), "runs": runs}


def measured(section, found, others=0.0):
    return {section: {"made": "2026-01-01", "minutes": 1.0, "others": others, "found": found}}


def rows(text):
    """Name -> further cells of the rows of a Markdown table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {name: rest for name, *rest in cells}


def test_the_tables_of_the_page_are_those_of_the_saved_results():
    results = json.loads((ROOT / "benchmarks/results/speed.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    assert page.split(report.BEGIN)[1].split(report.END)[0] == "\n\n" + report.tables(results) + "\n"


def test_a_step_is_compared_with_the_faster_one_of_pytorchs_two():
    ways = {"ours": way([2.0, 2.2, 1.9]), "PyTorch": way([3.0]), "PyTorch, compiled": way([2.5]), "mindone": way([8.0])}
    ways["ours"]["runs"][0].update(first=14.9, graph_mb=1024.0)
    steps = {"sdxl sdxl": {"ways": ways, "operations": {}}, "sd15 sd": {"ways": ways, "operations": {}}}
    results = measured("steps", steps)
    table = rows(report.targets(results))
    assert table["SDXL ControlNet, `sdxl`: PyTorch's time over ours"] == ["at least 1.30", "-", "1.25", "**no**"]
    assert table["first update at `sd`, a fresh process"] == ["at most 15.0 s", "35.2 s", "14.9 s", "yes"]
    assert table["host memory of the compiled graph at `sd`"] == ["at most 1.50 GB", "4.34 GB", "1.00 GB", "yes"]
    assert table["FLUX LoRA, `mid`: PyTorch's time over ours"][2:] == ["not measured", "-"]

    cells = rows(report.step_table(results))["SDXL ControlNet, `sdxl`"]
    assert cells == ["2.000 (1.900-2.200)", "-", "8.000", "3.000", "2.500", "1.25", "4.00"]


def test_a_disturbed_section_reaches_no_target():
    found = {"mid, batch 1": way([0.001], key="outside", late=0)}
    for others, outcome in ((0.2, "yes"), (0.3, "host was disturbed")):
        table = rows(report.targets(measured("host", found, others)))
        assert table["time outside the step, `mid`"] == ["at most 2.00 %", "0.42 %", "0.10 %", outcome]


def test_the_share_of_the_limit_is_of_the_best_rate_and_of_the_step_in_turn_with_it():
    found = {
        "rate": {"best": 90.0, "runs": [{"best": 90.0, "rates": {"a": 90.0}}, {"best": 100.0, "rates": {"b": 100.0}}]},
        "operations": {
            "flux_lora wide": {"forward": 300, "backward": 500},
            "flux_controlnet wide": {"forward": 0, "backward": 70},
        },
        "flux_lora wide": way([10.0]),
        "flux_controlnet wide": way([1.0]),
    }
    results = measured("limit", found)
    assert report.share_of_limit(results, "flux_lora wide") == pytest.approx(0.8)
    assert rows(report.targets(results))["FLUX ControlNet, `wide`: share of the limit"][2:] == ["0.70", "**no**"]
    assert rows(report.limit_table(results))["FLUX LoRA, `wide`, in turn with the rate"][2:] == [
        "8.000",
        "10.000",
        "0.80",
    ]


def test_sampling_compares_the_second_images_and_the_latents():
    found = {
        "flux_lora mid": {
            "steps": 28,
            "ours": way([4.0, 5.0, 6.0], key="image", first=9.0, latents=[1.0, -2.0]),
            "PyTorch": way([6.0], key="image", first=7.0, latents=[1.0, -2.002]),
        }
    }
    results = measured("sampling", found)
    text = report.sampling_table(results)
    assert rows(text)["an image by FLUX, `mid`"] == ["28", "5.00 (4.00-6.00)", "6.00", "1.20", "9.00", "7.00"]
    assert "differ by at most 1.0e-03 of the largest value" in text
    assert rows(report.targets(results))["an image by FLUX, `mid`: PyTorch's time over ours"][2:] == ["1.20", "yes"]


def test_the_encoder_stage_is_compared_in_images_per_second():
    found = {
        "FLUX.1-dev's VAE, 256 pixels": {
            "ours": way([0.5], key="images_per_second"),
            "PyTorch": way([0.4], key="images_per_second"),
        }
    }
    table = rows(report.targets(measured("encode", found)))
    assert table["encoder stage, FLUX.1-dev's VAE, 256 pixels: over PyTorch's"][2:] == ["1.25", "yes"]


def test_a_failed_process_shows_its_error():
    ways = {"ours": {"runs": [{"failed": "killed by signal 9"}], "failed": "killed by signal 9"}, "PyTorch": way([1.0])}
    table = rows(report.step_table(measured("steps", {"sdxl sdxl": {"ways": ways, "operations": {}}})))
    assert table["SDXL ControlNet, `sdxl`"][0] == "failed: killed by signal 9"
    assert table["SDXL ControlNet, `sdxl`"][5] == "not measured"
