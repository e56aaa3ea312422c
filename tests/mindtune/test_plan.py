"""The memory plan: counted from configs alone, against what loading and training really make."""

import json
import shutil
import subprocess
import sys

import mindspore as ms
import pytest
from conftest import ROOT, command, load_script

from mindtune import plan
from mindtune.models import loading, lora, precision
from mindtune.optim import optimizers

GB = 1 << 30
# black-forest-labs/FLUX.1-dev.
FLUX_DEV = {
    "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
                    "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38,
                    "pooled_projection_dim": 768},
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "use_quant_conv": False,
            "use_post_quant_conv": False},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
                     "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408},
    "text_encoder_2": {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64,
                       "feed_forward_proj": "gated-gelu", "num_layers": 24, "vocab_size": 32128},
}  # fmt: skip
SCRIPTS = {
    "flux_lora": "flux_lora/train_dreambooth_lora_flux.py", "flux_controlnet": "flux_controlnet/train_controlnet_flux.py",
    "controlnet": "examples/controlnet/train_controlnet.py", "controlnet_sdxl": "examples/controlnet/train_controlnet_sdxl.py",
}  # fmt: skip


@pytest.fixture(scope="session")
def flux_dev(tmp_path_factory):
    """FLUX.1-dev's configs without its weights."""
    root = tmp_path_factory.mktemp("configs") / "flux-dev"
    for name, config in FLUX_DEV.items():
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def flags_of(kind, *words):
    """All flags of a script."""
    source = (
        ["--instance_data_dir", "x", "--instance_prompt", "y"] if kind == "flux_lora" else ["--train_data_dir", "x"]
    )
    return vars(
        load_script(SCRIPTS[kind]).parse_args(["--pretrained_model_name_or_path", "x", *source, *map(str, words)])
    )


def size_of(parameters):
    return sum(p.size * p.itemsize for p in parameters)


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--mixed_precision", "bf16"], ["--base_precision", "int8"]])
def test_bytes_are_those_of_the_models_that_a_run_loads(tiny_flux, words):
    """Frozen weights, LoRA layers and optimizer state, to the byte."""
    given = flags_of("flux_lora", *words, "--lora_rank", 3)
    found = plan.make_plan("flux_lora", tiny_flux, given)
    kind = precision.resolve_precision(given["mixed_precision"])
    model = loading.load_model(tiny_flux, "transformer", kind, int8=given["base_precision"] == "int8")
    precision.freeze_params(model)
    assert found.parts[0].size == size_of(model.get_parameters())
    lora.add_lora(model, 3, 3.0, 0.0, lora.TRANSFORMER_TARGETS, kind.compute)
    precision.cast_training_params([model])
    trained = list(lora.lora_parameters(model).values())
    assert found.parts[1].size == found.gradients == size_of(trained)
    assert found.parts[1].parameters == sum(p.size for p in trained)
    vae = loading.load_model(tiny_flux, "vae", kind)
    assert found.parts[2].size == size_of(vae.get_parameters())
    for more in ({}, {"eight_bit": True}):
        optimizer = optimizers.create_optimizer(
            "adamw", [{"params": trained, "lr": 1.0, "weight_decay": 0.0}], betas=(0.9, 0.9), eps=1.0, **more
        )
        state = [p for key, p in optimizers.optimizer_state(optimizer).items() if "exp_avg" in key]
        assert plan._state([p.shape for p in trained], "adamw", bool(more)) == size_of(state)


@pytest.mark.parametrize("blocks, parameters", [((4, 0), 1_442_333_696), ((4, 10), 2_952_654_336)])
def test_published_counts(flux_dev, blocks, parameters):
    found = plan.make_plan(
        "flux_controlnet",
        flux_dev,
        flags_of("flux_controlnet", "--num_double_layers", blocks[0], "--num_single_layers", blocks[1]),
    )
    assert [part.parameters for part in found.parts[:2]] == [11_901_408_320, parameters]
    assert found.optimizer == 8 * parameters and found.gradients == 4 * parameters


def test_what_saves_memory_saves_it(flux_dev):
    """Every one of these flags, alone, and nothing else changes."""
    base = plan.make_plan(
        "flux_controlnet", flux_dev, flags_of("flux_controlnet", "--mixed_precision", "bf16", "--train_batch_size", 2)
    )
    for words in (["--cache_latents"], ["--gradient_checkpointing"], ["--use_8bit_adam"], ["--base_precision", "int8"],
                  ["--offload_optimizer"], ["--train_batch_size", 1], ["--resolution", 256], ["--max_sequence_length", 128]):  # fmt: skip
        found = plan.make_plan(
            "flux_controlnet",
            flux_dev,
            flags_of("flux_controlnet", "--mixed_precision", "bf16", "--train_batch_size", 2, *words),
        )
        assert found.device() < base.device(), words
    assert base.device(8, zero_stage=1) == base.device() - base.optimizer + base.optimizer // 8
    assert base.device(8) == base.device()


def test_moving_average_accumulation_and_state_on_the_host(flux_dev):
    words = ["--use_ema", "--gradient_accumulation_steps", 2, "--offload_optimizer"]
    found = plan.make_plan("flux_controlnet", flux_dev, flags_of("flux_controlnet", *words))
    trained = found.parts[1].size
    assert (found.average, found.gradients, found.optimizer, found.host_optimizer) == (
        trained,
        2 * trained,
        0,
        2 * trained,
    )


def test_flux_dev_does_not_fit_32_gb_and_the_flags_that_are_named_make_it_fit(flux_dev):
    given = flags_of("flux_lora", "--mixed_precision", "bf16", "--train_batch_size", 1)
    assert plan.make_plan("flux_lora", flux_dev, given).device() > 32 * GB
    lines, needed = plan.suggestions("flux_lora", flux_dev, given, 32 * GB)
    assert lines[-1].startswith("--gradient_checkpointing") and needed < 32 * GB
    told = plan.describe("flux_lora", flux_dev, given, 32)
    assert "does not fit a device of 32 GB. Add, in this order:" in told and "11,901,408,320" in told
    assert "fits a device of 400 GB" in plan.describe("flux_lora", flux_dev, given, 400)
    assert "which is still too much" in plan.describe("flux_lora", flux_dev, given, 5)


# ---- the flag ------------------------------------------------------------------------------------


def without_weights(root, copy):
    """A pipeline's configs alone."""
    return shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "*.model", "tokenizer*"))


@pytest.mark.parametrize("kind", SCRIPTS)
def test_dry_run_reads_configs_alone_and_writes_nothing(kind, tmp_path, capsys):
    maker = load_script("examples/tiny/make_tiny_pipeline.py")
    make = {"controlnet": maker.make_sd15, "controlnet_sdxl": maker.make_sdxl}.get(kind, maker.make_flux)
    make(tmp_path / "whole")
    root = without_weights(tmp_path / "whole", tmp_path / "configs")
    source = (
        ["--instance_data_dir", "nowhere", "--instance_prompt", "y"]
        if kind == "flux_lora"
        else ["--train_data_dir", "nowhere"]
    )
    before = sorted(tmp_path.rglob("*"))
    words = ["--pretrained_model_name_or_path", root, *source, "--output_dir", tmp_path / "out", "--dry_run"]
    assert load_script(SCRIPTS[kind]).main([str(word) for word in words]) == 0
    told = capsys.readouterr().out
    for row in (
        "gradients",
        "optimizer",
        "activations, kept (this run)",
        "encode stage",
        "on this CPU",
        "fits a device of 64 GB",
    ):
        assert row in told, told
    assert sorted(tmp_path.rglob("*")) == before


def test_python_m_mindtune_plan(flux_dev):
    words = [
        "-m",
        "mindtune.plan",
        "--script",
        ROOT / SCRIPTS["flux_lora"],
        "--pretrained_model_name_or_path",
        flux_dev,
    ]
    words += ["--instance_data_dir", "x", "--instance_prompt", "y", "--resolution", 1024]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and "11,901,408,320" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "mindtune.plan", "--script", "nowhere.py"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--script PATH" in done.stderr


def test_a_config_that_is_not_there(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    words = [
        "--pretrained_model_name_or_path",
        tmp_path,
        "--instance_data_dir",
        "x",
        "--instance_prompt",
        "y",
        "--dry_run",
    ]
    done = subprocess.run(command(SCRIPTS["flux_lora"], words), capture_output=True, text=True)
    assert done.returncode == 2 and "vae/ is missing" in done.stderr and "scheduler" not in done.stderr


def test_a_run_notes_what_was_planned_and_measured(lora_script, flags, tmp_path, monkeypatch):
    """How near the two are: benchmarks/memory_plan.py; here it is the test process that is measured."""
    monkeypatch.setattr(lora_script, "StopRequest", lambda: type("Never", (), {"exit_code": None})())
    assert lora_script.main(flags(tmp_path / "run", "--cache_latents", "--max_train_steps", 1)) == 0
    memory = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]
    assert memory["predicted_mb"] > 500 and memory["measured_mb"] > 100
    ms.set_context(mode=ms.PYNATIVE_MODE)
