"""The memory plan's numbers against the parameters that loading and training really allocate."""

import json

import pytest
from conftest import load_script

from mindtune.models import control_lora, loading, lora, lora_settings, precision
from mindtune.optim import optimizers
from mindtune.run import memory
from mindtune.run.memory import Settings


def bytes_of(parameters):
    return sum(p.size * p.itemsize for p in parameters)


@pytest.mark.parametrize("flags", [{}, {"mixed_precision": "bf16"}, {"base_precision": "int8"}], ids=str)
def test_bytes_of_frozen_weights_and_lora_layers_are_exact(tiny_flux, flags):
    plan = memory.make_plan(Settings("flux_lora", tiny_flux, lora_rank=3, **flags))
    dtypes = precision.resolve_precision(flags.get("mixed_precision", "no"))
    model = loading.load_model(tiny_flux, "transformer", dtypes, int8="base_precision" in flags)
    precision.freeze_params(model)
    assert plan.parts[0].size == bytes_of(model.get_parameters())
    lora.add_lora(model, lora.target_ranks(model, lora_settings.TRANSFORMER_TARGETS, 3), 1.0, 0.0, dtypes.compute)
    precision.cast_training_params([model])
    trained = list(lora.lora_parameters(model).values())
    assert plan.parts[1].size == plan.gradients == bytes_of(trained)
    assert plan.parts[1].parameters == sum(p.size for p in trained)
    assert plan.parts[2].size == bytes_of(loading.load_model(tiny_flux, "vae", dtypes).get_parameters())
    for eight_bit in (False, True):
        groups = [{"params": trained, "lr": 1.0, "weight_decay": 0.0}]
        optimizer = optimizers.create_optimizer(optimizers.Settings(use_8bit_adam=eight_bit), groups)
        state = [p for key, p in optimizers.optimizer_state(optimizer).items() if "exp_avg" in key]
        assert optimizers.state_bytes([p.shape for p in trained], "adamw", eight_bit) == bytes_of(state)


@pytest.mark.parametrize("adapter", ["dora", "lokr"])
def test_what_dora_and_lokr_add_is_exact_and_their_activations_are_counted(tiny_flux, adapter):
    """The frozen norms of a DoRA too. By hand: the outputs of the target layers, and their inputs of w1, 4 x 8 = 32."""
    chosen = {"adapter": adapter, "lora_rank": 3, "train_text_encoder": True, "max_sequence_length": 16}
    settings = Settings("flux_lora", tiny_flux, resolution=64, train_batch_size=2, **chosen)
    names = ("transformer", "text_encoder")
    dtypes = precision.resolve_precision("no")
    models = {name: loading.load_model(tiny_flux, name, dtypes) for name in names}
    before = sum(bytes_of(model.get_parameters()) for model in models.values())
    targets = dict(zip(names, (lora_settings.TRANSFORMER_TARGETS, lora_settings.TEXT_ENCODER_TARGETS)))
    lora.add_adapters(models, lora_settings.Settings(adapter=adapter, lora_rank=3), targets, {}, dtypes.compute, seed=0)
    trained = [p for model in models.values() for p in lora.lora_parameters(model).values()]
    plan = memory.make_plan(settings)
    assert plan.gradients == bytes_of(trained) and plan.parts[2].parameters == sum(p.size for p in trained)
    assert plan.parts[2].size == sum(bytes_of(model.get_parameters()) for model in models.values()) - before
    image, text = 2 * 16, 2 * 16
    double, single, clip = 4 * 32 * image, 3 * 32 * (image + text), 4 * 32 * 2 * 77
    assert [block.adapter for block in memory._blocks(settings)] == [double] * 2 + [single] * 2 + [clip] * 2
    assert all(block.adapter == 0 for block in memory._blocks(settings._replace(adapter="lora")))
    assert plan.activations > memory.make_plan(settings._replace(adapter="lora")).activations


def plan_and_model(root, system, adapter="lora", fill=False, norms=False, **flags):
    """The plan of a run, and its transformer as the script makes it, with what trains, by name."""
    given = {"adapter": adapter, "lora_rank": 3, "fill": fill, "train_norm_layers": norms, **flags}
    plan = memory.make_plan(Settings(system, root, **given))
    dtypes, int8 = precision.resolve_precision(flags.get("mixed_precision", "no")), "base_precision" in flags
    if system == "flux_control":
        model = control_lora.load_transformer(root, fill, dtypes, int8=int8)
    else:
        model = loading.load_model(root, "transformer", dtypes, int8=int8)
    precision.freeze_params(model)
    targets = {"transformer": lora_settings.target_names(None, system)}
    settings = lora_settings.Settings(adapter=adapter, lora_rank=3)
    lora.add_adapters({"transformer": model}, settings, targets, {}, dtypes.compute, seed=0)
    if norms:
        lora.train_norms(model, {})
    return plan, model, list(lora.lora_parameters(model).values())


@pytest.mark.parametrize(
    "system, flags",
    [
        ("flux_kontext", {"mixed_precision": "bf16"}),
        ("flux_kontext", {"adapter": "lokr"}),
        ("flux_control", {"norms": True}),
        ("flux_control", {"norms": True, "mixed_precision": "bf16", "adapter": "dora"}),
        ("flux_control", {"fill": True, "base_precision": "int8"}),
    ],
    ids=str,
)
def test_bytes_of_kontext_and_of_a_control_lora_are_exact(small_flux, system, flags):
    """Of everything in memory: the widened input layer, trained norms in float32, and a DoRA's frozen norms."""
    plan, model, trained = plan_and_model(small_flux, system, **flags)
    assert plan.parts[1].parameters == sum(p.size for p in trained) and plan.gradients == bytes_of(trained)
    assert plan.parts[0].size + plan.parts[1].size == bytes_of(model.get_parameters())
    groups = [{"params": trained, "lr": 1.0, "weight_decay": 0.0}]
    optimizer = optimizers.create_optimizer(optimizers.Settings(), groups)
    assert plan.optimizer == bytes_of(p for key, p in optimizers.optimizer_state(optimizer).items() if "exp_avg" in key)


def test_what_the_two_systems_keep_beside_the_transformer(small_flux):
    """Masked images are encoded in the step: the VAE stays. A source has as many tokens as its image."""

    def names(system, **flags):
        return [part.name for part in memory.make_plan(Settings(system, small_flux, cache_latents=True, **flags)).parts]

    assert names("flux_kontext") == names("flux_control") == ["transformer", "LoRA"]
    assert names("flux_control", fill=True) == ["transformer", "LoRA", "vae"]
    same = {"train_batch_size": 2, "max_sequence_length": 16}
    edit, plain = (memory.make_plan(Settings(system, small_flux, **same)) for system in ("flux_kontext", "flux_lora"))
    assert plain.activations < edit.activations
    blocks = memory._blocks(Settings("flux_kontext", small_flux, resolution=64, **same))
    twice = memory._blocks(Settings("flux_lora", small_flux, aspect_ratio_buckets="64,128", **same))
    assert blocks == twice


@pytest.mark.parametrize("blocks, parameters", [((4, 0), 1_442_333_696), ((4, 10), 2_952_654_336)])
def test_parameters_of_published_models(flux_dev, blocks, parameters):
    settings = Settings("flux_controlnet", flux_dev, num_double_layers=blocks[0], num_single_layers=blocks[1])
    plan = memory.make_plan(settings)
    assert [part.parameters for part in plan.parts[:2]] == [11_901_408_320, parameters]
    assert plan.optimizer == 8 * parameters and plan.gradients == 4 * parameters


def test_an_existing_controlnet_counts_with_its_own_blocks(flux_dev, tmp_path):
    """Not with those of --num_double_layers and --num_single_layers."""
    config = json.loads((flux_dev / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "_class_name": "FluxControlNetModel", "num_layers": 2, "num_single_layers": 0})
    )
    new = Settings("flux_controlnet", flux_dev, num_double_layers=2, num_single_layers=0)
    existing = Settings("flux_controlnet", flux_dev, controlnet=tmp_path, num_double_layers=9, num_single_layers=9)
    assert memory.make_plan(existing) == memory.make_plan(new)


@pytest.mark.parametrize("flags", [
    {"cache_latents": True}, {"gradient_checkpointing": True}, {"use_8bit_adam": True}, {"base_precision": "int8"},
    {"offload_optimizer": True}, {"train_batch_size": 1}, {"resolution": 256}, {"max_sequence_length": 128},
], ids=str)  # fmt: skip
def test_each_flag_that_saves_memory_lowers_the_plan(flux_dev, flags):
    base = Settings("flux_controlnet", flux_dev, mixed_precision="bf16", train_batch_size=2)
    assert memory.make_plan(base._replace(**flags)).device() < memory.make_plan(base).device()


def test_zero_stage_1_shards_the_optimizer_state(flux_dev):
    plan = memory.make_plan(Settings("flux_controlnet", flux_dev, mixed_precision="bf16", train_batch_size=2))
    assert plan.device(8, zero_stage=1) == plan.device() - plan.optimizer + plan.optimizer // 8
    assert plan.device(8) == plan.device()


def test_moving_average_accumulation_and_offloaded_state(flux_dev):
    settings = Settings(
        "flux_controlnet", flux_dev, use_ema=True, gradient_accumulation_steps=2, offload_optimizer=True
    )
    plan = memory.make_plan(settings)
    trained = plan.parts[1].size
    assert (plan.average, plan.gradients) == (trained, 2 * trained)
    assert (plan.optimizer, plan.host_optimizer) == (0, 2 * trained)


# ---- recomputing some of the blocks --------------------------------------------------------------


GB = 1 << 30


@pytest.fixture(scope="module")
def pipelines(flux_dev, tmp_path_factory):
    """The pipeline of each system."""
    sdxl = tmp_path_factory.mktemp("pipeline") / "sdxl"
    load_script("examples/tiny/make_tiny_pipeline.py").make_sdxl(sdxl)
    return {"flux_lora": flux_dev, "flux_controlnet": flux_dev, "controlnet_sdxl": sdxl}


def device_with(settings, count):
    """The plan of a run that recomputes `count` blocks."""
    return memory.make_plan(
        settings._replace(gradient_checkpointing=count > 0, gradient_checkpointing_blocks=count or None)
    ).device()


@pytest.mark.parametrize("mode", [0, 1], ids=["graph", "pynative"])
@pytest.mark.parametrize("system", ["flux_lora", "flux_controlnet", "controlnet_sdxl"])
def test_every_recomputed_block_lowers_the_plan_or_leaves_it(pipelines, system, mode):
    settings = Settings(system, pipelines[system], mixed_precision="bf16", train_batch_size=1, mindspore_mode=mode)
    count = memory.make_plan(settings).blocks
    plans = [device_with(settings, n) for n in range(count + 1)]
    assert plans == sorted(plans, reverse=True) and plans[-1] < plans[0]
    assert device_with(settings, count + 1) == plans[-1]  # no more than all


@pytest.mark.parametrize("system", ["flux_lora", "flux_controlnet", "controlnet_sdxl"])
def test_fit_recomputes_the_fewest_blocks_that_fit(pipelines, system):
    settings = Settings(system, pipelines[system], mixed_precision="bf16", train_batch_size=1)
    count = memory.make_plan(settings).blocks
    for wanted in (0, 1, count // 2, count):
        room = device_with(settings, wanted) / GB
        fitting = settings._replace(fit=True, device_memory_gb=room)
        chosen = memory.recomputed_blocks(fitting)
        assert device_with(settings, chosen) <= room * GB
        assert chosen == 0 or device_with(settings, chosen - 1) > room * GB
        assert memory.make_plan(fitting).recomputed_blocks == chosen


def test_all_blocks_are_recomputed_if_nothing_fits(flux_dev):
    settings = Settings("flux_lora", flux_dev, fit=True, device_memory_gb=1)
    assert memory.recomputed_blocks(settings) == 57
