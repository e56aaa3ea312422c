"""One training step of each script on tiny models: loss, gradients and norm, to compare between versions of mindone."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np

from mindtune import flow, rng
from mindtune.models import configs, control_lora, controlnets, loading, lora, named_parameters, precision
from mindtune.models.gradient_checkpointing import recompute_blocks
from mindtune.models.lora_settings import ALL_LINEAR, DEFAULT_TARGETS, TRANSFORMER_TARGETS
from mindtune.optim import adamw

ROOT = Path(__file__).resolve().parents[2]
ALL = 1000  # blocks to recompute
SIGMAS = ms.Tensor((np.arange(1000, 0, -1) / 1000).astype(np.float32))
LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def load_script(relative):
    """A script of the repository as a module, by its path."""
    spec = importlib.util.spec_from_file_location(Path(relative).stem, ROOT / relative)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def normal(what, *shape):
    """A random tensor that depends on the name `what` only."""
    return ms.Tensor(rng.normal(0, f"contract {what}", shape=shape))


def adam(parameters):
    """AdamW with beta1 0: without clipping its first moment is the gradient."""
    return adamw.AdamW([{"params": parameters, "lr": 1e-2, "weight_decay": 0.0}], beta1=0.0)


def give_values(parameters):
    """Random values for parameters that start at zero, so that all parameters get a gradient."""
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(0.1 * rng.normal(0, name, shape=parameter.shape)))


def one_step(step, batch, names):
    """{"loss", "norm", "gradient <name>" ...} of one call of a step."""
    loss = float(step(*batch)[1])
    gradients = {f"gradient {name}": moment.asnumpy() for name, moment in zip(names, step.optimizer.exp_avg)}
    return {"loss": np.array(loss), "norm": np.array(float(step.grad_clipper.norm)), **gradients}


def add_lora(transformer, targets, compute, recompute=False):
    """Freezes a transformer and adds a LoRA of rank 4, none of whose matrices are zero; its parameters."""
    precision.freeze_params(transformer)
    lora.add_lora(transformer, lora.target_ranks(transformer, targets, 4), 1.0, 0.0, compute)
    precision.cast_training_params([transformer])
    lora.init_lora(transformer, seed=0)
    trained = lora.lora_parameters(transformer)
    give_values({name: parameter for name, parameter in trained.items() if ".lora_B." in name})
    if recompute:
        recompute_blocks(ALL, transformer)
    return trained


def flux_lora(work, mixed_precision="no", recompute=False):
    """DreamBooth LoRA, batch 2, not square."""
    dtypes = precision.resolve_precision(mixed_precision)
    script = load_script("flux_lora/train_dreambooth_lora_flux.py")
    flags = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x"]
    flags += ["--max_grad_norm=0", "--max_sequence_length=5", f"--mixed_precision={mixed_precision}"]
    args = script.parse_args(flags)
    transformer = loading.load_model(work / "flux", "transformer", dtypes)
    trained = add_lora(transformer, TRANSFORMER_TARGETS, dtypes.compute, recompute)
    step = script.TrainStepForFluxDevDB(
        transformer.set_train(True),
        adam(list(trained.values())),
        precision.loss_scaler("no"),
        args,
        vae=None,
        text_encoder=None,
        vae_config=LATENTS,
        sigmas=SIGMAS,
    )
    batch = normal("moments", 2, 32, 4, 6), normal("posterior", 2, 16, 4, 6), normal("noise", 2, 16, 4, 6)
    batch += (
        ms.Tensor([100, 900]),
        normal("text", 2, 5, 32),
        normal("pooled", 2, 32),
        ms.Tensor(flow.latent_image_ids(4, 6)),
    )
    return one_step(step, batch, trained)


def flux_kontext(work, mixed_precision="no"):
    """Kontext LoRA, batch 2, with sources of another size."""
    dtypes = precision.resolve_precision(mixed_precision)
    script = load_script("examples/flux_kontext/train_lora_flux_kontext.py")
    flags = ["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--max_grad_norm=0", "--max_sequence_length=5"]
    args = script.parse_args([*flags, f"--mixed_precision={mixed_precision}"])
    transformer = loading.load_model(work / "flux", "transformer", dtypes)
    trained = add_lora(transformer, DEFAULT_TARGETS["flux_kontext"], dtypes.compute)
    step = script.TrainStepForFluxKontext(
        transformer.set_train(True),
        adam(list(trained.values())),
        precision.loss_scaler("no"),
        args,
        vae=None,
        vae_config=LATENTS,
        sigmas=SIGMAS.asnumpy()[None],
    )
    ids = np.concatenate([flow.latent_image_ids(4, 6), flow.source_image_ids(6, 2)])
    batch = normal("moments", 2, 32, 4, 6), normal("posterior", 2, 16, 4, 6), normal("noise", 2, 16, 4, 6)
    batch += ms.Tensor([100, 900]), normal("text", 2, 5, 32), normal("pooled", 2, 32), ms.Tensor(ids)
    return one_step(step, (*batch, normal("source", 2, 32, 6, 2)), trained)


def flux_control(work, mixed_precision="no"):
    """Control-LoRA with all norms, which fills masks, batch 2."""
    dtypes = precision.resolve_precision(mixed_precision)
    script = load_script("examples/flux_control/train_control_lora_flux.py")
    flags = ["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--max_grad_norm=0", "--max_sequence_length=5"]
    args = script.parse_args([*flags, "--fill", "--cache_latents", f"--mixed_precision={mixed_precision}"])
    transformer = control_lora.load_transformer(work / "flux", True, dtypes)
    add_lora(transformer, [ALL_LINEAR], dtypes.compute)
    lora.train_norms(transformer, {})
    trained = lora.lora_parameters(transformer)
    step = script.TrainStepForFluxControl(
        transformer.set_train(True),
        adam(list(trained.values())),
        precision.loss_scaler("no"),
        args,
        vae=None,
        vae_config=LATENTS,
        sigmas=SIGMAS.asnumpy()[None],
    )
    batch = [normal(name, 2, 32, 4, 6) for name in ("moments", "condition")]
    batch += [normal(name, 2, 16, 4, 6) for name in ("posterior", "noise")]
    batch += [ms.Tensor([100, 900]), normal("text", 2, 5, 32), normal("pooled", 2, 32)]
    masks = (normal("masks", 2, 64, 4, 6) > 0).astype(ms.float32)
    return one_step(step, [*batch, ms.Tensor(flow.latent_image_ids(4, 6)), masks], trained)


def flux_controlnet(work, mixed_precision="no", recompute=False):
    """FLUX ControlNet of one double and one single block."""
    dtypes = precision.resolve_precision(mixed_precision)
    script = load_script("flux_controlnet/train_controlnet_flux.py")
    flags = ["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--max_sequence_length=5"]
    args = script.parse_args([*flags, "--max_grad_norm=0", f"--mixed_precision={mixed_precision}"])
    transformer = loading.load_model(work / "flux", "transformer", dtypes)
    precision.freeze_params(transformer)
    controlnet = precision.set_compute_dtype(controlnets.flux_controlnet(work / "flux", 1, 1), dtypes.compute)
    trained = named_parameters.model_parameters(controlnet)
    give_values({name: parameter for name, parameter in trained.items() if name.startswith("controlnet_")})
    if recompute:
        recompute_blocks(ALL, controlnet, transformer)
    step = script.TrainStepForFluxControlNet(
        controlnet.set_train(True),
        adam(list(trained.values())),
        precision.loss_scaler("no"),
        args,
        transformer=transformer,
        vae=None,
        vae_config=LATENTS,
        sigmas=SIGMAS,
    )
    batch = [normal(name, 2, 32, 4, 6) for name in ("moments", "condition")]
    batch += [normal(name, 2, 16, 4, 6) for name in ("posterior", "condition posterior", "noise")]
    batch += [
        ms.Tensor([100, 900]),
        normal("text", 2, 5, 32),
        normal("pooled", 2, 32),
        ms.Tensor(flow.latent_image_ids(4, 6)),
    ]
    return one_step(step, batch, trained)


def sd_controlnet(work, mixed_precision="no", base="sd15", recompute=False):
    """ControlNet on the UNet of `base`, sd15 or sdxl."""
    dtypes = precision.resolve_precision(mixed_precision)
    sdxl = base == "sdxl"
    script = load_script("examples/controlnet/train_controlnet" + ("_sdxl.py" if sdxl else ".py"))
    flags = ["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--max_grad_norm=0"]
    args = script.parse_args([*flags, f"--mixed_precision={mixed_precision}"])
    unet = loading.load_model(work / base, "unet", dtypes)
    precision.freeze_params(unet)
    controlnet = precision.set_compute_dtype(controlnets.unet_controlnet(unet, 0), dtypes.compute)
    trained = named_parameters.model_parameters(controlnet)
    added = ("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")
    give_values({name: parameter for name, parameter in trained.items() if name.startswith(added)})
    if recompute:
        recompute_blocks(ALL, controlnet, unet)
    make = script.TrainStepForControlNetSDXL if sdxl else script.TrainStepForControlNet
    step = make(
        controlnet.set_train(True),
        adam(list(trained.values())),
        precision.loss_scaler("no"),
        args,
        unet=unet,
        vae=None,
        vae_config={"scaling_factor": 0.18215},
        scheduler_config=configs.read_config(work / base, "scheduler"),
        **({"vae_dtype": ms.float32} if sdxl else {}),
    )
    width = unet.config["cross_attention_dim"]
    more = []
    batch = (
        normal("moments", 2, 8, 8, 8),
        normal("condition", 2, 3, 64, 64),
        normal("posterior", 2, 4, 8, 8),
        normal("noise", 2, 4, 8, 8),
    )
    if sdxl:
        more = [normal("pooled", 2, 16), ms.Tensor([[64.0, 64, 0, 0, 64, 64]] * 2, ms.float32)]
    return one_step(step, (*batch, ms.Tensor([20, 900]), normal("text", 2, 77, width), *more), trained)


def encoders(work):
    """The outputs of text encoders and VAE for fixed inputs."""
    full = precision.resolve_precision("no")
    ids = ms.Tensor(np.arange(77)[None] % 50, ms.int32)
    found = {}
    for kind, name in (("flux", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "text_encoder_2")):
        encoder = loading.load_model(work / kind, name, full)
        if name == "text_encoder_2" and kind == "flux":
            found["T5 states"] = encoder(ids)[0].asnumpy()
        else:
            pooled = encoder(ids)[1 if kind == "flux" else 0]
            states = encoder(ids, output_hidden_states=True)[2][-2]
            found.update({f"{kind} CLIP pooled": pooled.asnumpy(), f"{kind} CLIP states": states.asnumpy()})
    vae = loading.load_model(work / "flux", "vae", full)
    found["VAE moments"] = vae.encode(normal("pixels", 1, 3, 32, 32))[0].asnumpy()
    found["VAE image"] = vae.decode(normal("latents", 1, 16, 4, 4), return_dict=False)[0].asnumpy()
    return found


STEPS = {
    "FLUX LoRA step": flux_lora,
    "FLUX Kontext step": flux_kontext,
    "FLUX Control-LoRA step": flux_control,
    "FLUX ControlNet step": flux_controlnet,
    "SD 1.5 ControlNet step": sd_controlnet,
    "SDXL ControlNet step": partial(sd_controlnet, base="sdxl"),
    "FLUX LoRA step, fp16": partial(flux_lora, mixed_precision="fp16"),
    "FLUX Kontext step, fp16": partial(flux_kontext, mixed_precision="fp16"),
    "FLUX Control-LoRA step, fp16": partial(flux_control, mixed_precision="fp16"),
    "FLUX ControlNet step, fp16": partial(flux_controlnet, mixed_precision="fp16"),
    "SD 1.5 ControlNet step, fp16": partial(sd_controlnet, mixed_precision="fp16"),
    "SDXL ControlNet step, fp16": partial(sd_controlnet, mixed_precision="fp16", base="sdxl"),
    "FLUX LoRA step, recomputed": partial(flux_lora, recompute=True),
    "FLUX ControlNet step, recomputed": partial(flux_controlnet, recompute=True),
    "SDXL ControlNet step, recomputed": partial(sd_controlnet, base="sdxl", recompute=True),
    "text encoders and VAE": encoders,
}
