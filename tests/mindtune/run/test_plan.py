"""The memory plan as text: which flags it suggests, and what --dry_run prints and run.json records."""

import json
import shutil

import pytest
from conftest import load_script

from mindtune.cli import UserError
from mindtune.run import memory, plan
from mindtune.run.memory import Settings

GB = 1 << 30
SCRIPTS = {
    "flux_lora": "flux_lora/train_dreambooth_lora_flux.py",
    "flux_controlnet": "flux_controlnet/train_controlnet_flux.py",
    "controlnet": "examples/controlnet/train_controlnet.py",
    "controlnet_sdxl": "examples/controlnet/train_controlnet_sdxl.py",
    "flux_kontext": "examples/flux_kontext/train_lora_flux_kontext.py",
    "flux_control": "examples/flux_control/train_control_lora_flux.py",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """For each script the configs of a tiny pipeline, without weights."""
    work = tmp_path_factory.mktemp("pipelines")
    maker = load_script("examples/tiny/make_tiny_pipeline.py")
    folders = {}
    for name, make in (
        ("flux", maker.make_flux),
        ("controlnet", maker.make_sd15),
        ("controlnet_sdxl", maker.make_sdxl),
    ):
        make(work / "whole" / name)
        weights = shutil.ignore_patterns("*.safetensors", "*.txt", "*.model", "tokenizer*")
        folders[name] = shutil.copytree(work / "whole" / name, work / "configs" / name, ignore=weights)
    return {**folders, **{name: folders["flux"] for name in SCRIPTS if name.startswith("flux")}}


# ---- suggestions ---------------------------------------------------------------------------------


def test_flux_dev_fits_32_gb_with_the_suggested_flags(flux_dev):
    settings = Settings("flux_lora", flux_dev, mixed_precision="bf16", train_batch_size=1, resolution=1024)
    assert memory.make_plan(settings).device() > 32 * GB
    lines, needed = plan.suggestions(settings, 32 * GB)
    assert lines[-1].startswith("--gradient_checkpointing") and needed < 32 * GB
    text = plan.describe(settings._replace(device_memory_gb=32))
    assert "does not fit a device of 32 GB. Add these flags, in this order:" in text and "11,901,408,320" in text
    assert "fits a device of 400 GB" in plan.describe(settings._replace(device_memory_gb=400))
    assert "which is still too much" in plan.describe(settings._replace(device_memory_gb=5))


def suggested(settings):
    """The names of all flags that are suggested when nothing is enough."""
    return [line.split()[0].lstrip("-") for line in plan.suggestions(settings, 0)[0]]


@pytest.mark.parametrize("system", SCRIPTS)
def test_only_flags_that_the_script_has_are_suggested(pipelines, system):
    script = load_script(SCRIPTS[system])
    data = ["--instance_data_dir", "x", "--instance_prompt", "y"]
    data = data if system == "flux_lora" else ["--train_data_dir", "x"]
    flags = script.parse_args(["--pretrained_model_name_or_path", "x", *data]).recorded()
    found = suggested(Settings(system, pipelines[system]))
    assert found and set(found) <= set(flags)


def test_fit_is_suggested_with_the_number_of_blocks_that_it_chooses(flux_dev):
    settings = Settings(
        "flux_lora", flux_dev, mixed_precision="bf16", train_batch_size=1, resolution=1024, cache_latents=True
    )
    count = memory.recomputed_blocks(settings._replace(fit=True, device_memory_gb=32))
    assert 0 < count < 57
    advised = plan.describe(settings._replace(device_memory_gb=32)).splitlines()[-1]
    assert advised.startswith(f"--fit alone is enough: it recomputes {count} of 57 blocks")
    fitting = plan.describe(settings._replace(fit=True, device_memory_gb=32))
    assert f"activations, {count} of 57 blocks recomputed (this run)" in fitting and "fits a device of 32 GB" in fitting


def test_fit_refuses_a_run_that_cannot_fit(flux_dev):
    settings = Settings("flux_lora", flux_dev, mixed_precision="bf16", train_batch_size=1, fit=True)
    plan.check_fit(settings._replace(device_memory_gb=64))
    plan.check_fit(settings._replace(device_memory_gb=8, fit=False))
    with pytest.raises(UserError, match=r"--fit: the run needs 2\d\.\d\d GB .* --device_memory_gb is 8\."):
        plan.check_fit(settings._replace(device_memory_gb=8))


def test_flags_that_clash_with_the_run_are_not_suggested(flux_dev):
    settings = Settings("flux_controlnet", flux_dev)
    assert {"use_8bit_adam", "train_batch_size"} <= set(suggested(settings))
    assert "offload_optimizer" not in suggested(settings)  # it does not work with 8-bit AdamW
    assert not {"use_8bit_adam", "offload_optimizer"} & set(suggested(settings._replace(optimizer="adafactor")))
    assert "offload_optimizer" not in suggested(settings._replace(mindspore_mode=1))
    assert "train_batch_size" not in suggested(settings._replace(train_batch_size=1))


# ---- --dry_run and run.json ----------------------------------------------------------------------


@pytest.mark.parametrize("system", SCRIPTS)
def test_dry_run_reads_only_configs_and_writes_nothing(pipelines, system, tmp_path, capsys):
    data = ["--instance_data_dir", "nowhere", "--instance_prompt", "y"]
    data = data if system == "flux_lora" else ["--train_data_dir", "nowhere"]
    root = pipelines[system]
    before = sorted(root.rglob("*"))
    flags = ["--pretrained_model_name_or_path", str(root), *data, "--output_dir", str(tmp_path / "out"), "--dry_run"]
    if system.startswith("controlnet"):
        flags += ["--tokenizer_name", "nowhere"]
    assert load_script(SCRIPTS[system]).main(flags) == 0
    printed = capsys.readouterr().out
    rows = ("gradients", "optimizer", "activations, kept (this run)", "encoder stage", "on this CPU")
    for row in (*rows, "fits a device of 64 GB"):
        assert row in printed, printed
    assert sorted(root.rglob("*")) == before and list(tmp_path.iterdir()) == []


def test_dry_run_names_a_missing_component(lora_script, tmp_path):
    """Not the scheduler, which the plan does not need."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    flags = ["--pretrained_model_name_or_path", str(tmp_path), "--instance_data_dir", "x", "--instance_prompt", "y"]
    with pytest.raises(UserError, match="vae/ is missing") as caught:
        lora_script.main([*flags, "--dry_run"])
    assert "scheduler" not in str(caught.value)


def test_run_json_has_the_planned_and_the_measured_memory(finished_lora):
    """How close they are is measured by benchmarks/memory_plan.py; this measures the test process."""
    out = finished_lora("--cache_latents", "--max_train_steps", 1)
    recorded = json.loads((out / "run.json").read_text())["memory"]
    assert recorded["predicted_mb"] > 500 and recorded["measured_mb"] > 100 and recorded["recomputed_blocks"] == 0
