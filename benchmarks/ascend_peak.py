"""Prints the plan of a training step beside the peak of a simulated Ascend device, as JSON.

    python benchmarks/ascend_peak.py SYSTEM PIPELINE flags ...

`memory_plan.py --ascend` runs this in the environment of tests/ascend/build_stand_ins.py with MS_SIMULATION_LEVEL=1:
MindSpore's documented dry run, in which its Ascend backend compiles the step, selects kernels and plans memory, and
launches nothing. SYSTEM is flux_lora, flux_controlnet, controlnet or controlnet_sdxl. PIPELINE is a folder with the
configs of a pipeline, and of a ControlNet in controlnet/. The models and the step are those of the training script with
cached latents; their weights are zeros that are never read, so that they take no memory.
"""

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import mint

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "contract")]

from steps import load_script

from mindtune import flow
from mindtune.models import adapted_layers, configs, controlnets, execution, loading, lora, lora_settings, precision
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.shared_blocks import use_shared_blocks
from mindtune.models.train_step import train_all_weights
from mindtune.optim import optimizers
from mindtune.run import memory

SCRIPTS = {
    "flux_lora": "flux_lora/train_dreambooth_lora_flux.py",
    "flux_controlnet": "flux_controlnet/train_controlnet_flux.py",
    "controlnet": "examples/controlnet/train_controlnet.py",
    "controlnet_sdxl": "examples/controlnet/train_controlnet_sdxl.py",
}
SIGMAS = (np.arange(1000, 0, -1) / 1000).astype(np.float32)


def use_zeros():
    """Makes `loading` give models zeros, whose memory the system provides only when it is read."""
    loading._match_tensors = lambda root, name, variant, shapes, names: (dict.fromkeys(shapes), [])
    loading.fill_parameter = fill_with_zeros


def fill_with_zeros(parameter, tensor=None, scale=None):
    for target in (parameter,) if scale is None else (parameter, scale):
        target.set_data(mint.empty(target.shape, dtype=target.dtype, device="Ascend"))
        target.init_mode = None


# ---- as in main() of the scripts -----------------------------------------------------------------


def lora_models(args, root, dtypes, count):
    """(models by the names of the step's arguments, trained parameters)"""
    transformer = loading.load_model(root, "transformer", dtypes, None, args.base_precision == "int8")
    precision.freeze_params(transformer)
    adapted_layers.squared_norms = lambda layer: np.zeros(layer.weight.shape[0], np.float32)  # reads no weight
    targets = {"transformer": lora_settings.TRANSFORMER_TARGETS}
    lora.add_adapters({"transformer": transformer}, args.select(lora_settings.Settings), targets, {}, dtypes.compute, 0)
    for parameter in lora.lora_parameters(transformer).values():
        fill_with_zeros(parameter)
    recompute_blocks(count, transformer)
    models = {"vae": None, "text_encoder": None, "sigmas": SIGMAS}
    return transformer, models, transformer.trainable_params()


def controlnet_models(base, args, root, dtypes, count):
    int8 = base == "transformer" and args.base_precision == "int8"
    frozen = loading.load_model(root, base, dtypes, None, int8)
    precision.freeze_params(frozen)
    controlnet = controlnets.load_controlnet(root / "controlnet")
    trained = list(train_all_weights(controlnet, dtypes.compute).values())
    if base == "transformer":
        for model in (frozen, controlnet):
            use_shared_blocks(model)
    recompute_blocks(count, controlnet, frozen)
    models = {base: frozen, "vae": None}
    if base == "transformer":
        return controlnet, {**models, "sigmas": SIGMAS}, trained
    return controlnet, {**models, "scheduler_config": configs.read_config(root, "scheduler")}, trained


def make_step(system, root, flags):
    """The training step and the settings of its plan."""
    script = load_script(SCRIPTS[system])
    data = (
        ["--instance_data_dir", "x", "--instance_prompt", "x"] if system == "flux_lora" else ["--train_data_dir", "x"]
    )
    args = script.parse_args(["--pretrained_model_name_or_path", str(root), *data, "--cache_latents", *flags])
    existing = None if system == "flux_lora" else root / "controlnet"
    settings = args.select(memory.Settings, system=system, root=root, controlnet=existing)
    execution.set_up_device(graph_mode=args.mindspore_mode == 0)
    dtypes = precision.resolve_precision(args.mixed_precision)
    count = memory.recomputed_blocks(settings)
    if system == "flux_lora":
        make, (model, models, trained) = script.TrainStepForFluxDevDB, lora_models(args, root, dtypes, count)
    else:
        base = "transformer" if system == "flux_controlnet" else "unet"
        name = {"flux_controlnet": "FluxControlNet", "controlnet": "ControlNet", "controlnet_sdxl": "ControlNetSDXL"}
        make = getattr(script, f"TrainStepFor{name[system]}")
        model, models, trained = controlnet_models(base, args, root, dtypes, count)
    if system == "controlnet_sdxl":
        models["vae_dtype"] = dtypes.compute
    groups = [{"params": trained, "lr": args.learning_rate, "weight_decay": args.adam_weight_decay}]
    optimizer = optimizers.create_optimizer(args.select(optimizers.Settings), groups)
    scaler = precision.loss_scaler(args.mixed_precision)
    return make(model, optimizer, scaler, args, vae_config=configs.read_config(root, "vae"), **models), settings


def make_batch(settings):
    """Zeros in the shapes of the step's inputs."""
    rows = settings.train_batch_size
    side = settings.resolution // 8
    base = configs.read_config(settings.root, settings.base)
    channels = configs.read_config(settings.root, "vae")["latent_channels"]
    latents, noise = (rows, 2 * channels, side, side), (rows, channels, side, side)
    index = ms.Tensor(np.zeros(rows, np.int32))
    if settings.flux:
        shapes = [latents, noise, noise] if settings.system == "flux_lora" else [latents, latents, noise, noise, noise]
        text = [
            (rows, settings.max_sequence_length, base["joint_attention_dim"]),
            (rows, base["pooled_projection_dim"]),
        ]
        return [*zeros(shapes), index, *zeros(text), ms.Tensor(flow.latent_image_ids(side, side))]
    shapes = [latents, (rows, 3, settings.resolution, settings.resolution), noise, noise]
    text = [(rows, 77, base["cross_attention_dim"])]
    if settings.system == "controlnet_sdxl":
        text += [(rows, 1280), (rows, 6)]
    return [*zeros(shapes), index, *zeros(text)]


def zeros(shapes):
    return [ms.Tensor(np.zeros(shape, np.float32)) for shape in shapes]


def main():
    system, root, *flags = sys.argv[1:]
    use_zeros()
    step, settings = make_step(system, Path(root), flags)
    batch = make_batch(settings)
    for _ in range(2):  # the optimizer's state is on the device from the first update on
        step(*batch)[1].asnumpy()
    predicted, peak = memory.make_plan(settings).device(), ms.runtime.max_memory_allocated()
    print(json.dumps({"predicted_mb": predicted / memory.MB, "peak_mb": peak / memory.MB}))


if __name__ == "__main__":
    main()
