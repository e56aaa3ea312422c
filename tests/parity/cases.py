"""Our side of the parity check: the cases, the inputs of both sides, and the training steps of the scripts.

certificate.py compares them with the results of reference.py, test_golden.py with a few of these results in
golden.json, without PyTorch.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
# The root comes first: tests has a folder mindtune, too.
FOLDERS = ("", "tests", "examples/tiny", "examples/controlnet", "examples/flux_kontext", "examples/flux_control")
FOLDERS += ("flux_lora", "flux_controlnet")
sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]

import make_tiny_pipeline
import real_pipelines
import train_control_lora_flux
import train_controlnet
import train_controlnet_flux
import train_controlnet_sdxl
import train_dreambooth_lora_flux
import train_lora_flux_kontext
from shapes import render, render_outline, sample_scene

from mindtune import flow, rng
from mindtune.data import conditions, crops
from mindtune.encode import encoder_stage, text_encoders
from mindtune.models import (
    configs,
    control_lora,
    controlnets,
    execution,
    loading,
    lora,
    lora_layouts,
    lora_settings,
    named_parameters,
    precision,
    sampling,
    shared_blocks,
    tokenization,
)
from mindtune.optim import adamw

UPDATES = 50
FULL = precision.Precision(ms.float32, ms.float32)
CAPTION = "a photo of a red circle on a white background"
# For published pipelines: a short caption, an empty one, and one that fills the text encoders, to check the padding.
LENGTHS = {"length": 512, "texts": [CAPTION, "", " ".join([CAPTION] * 60)]}
# Modules whose outputs are compared, by the names that both sides share; "" is the whole model.
BLOCK = r"^$|(^|\.)((single_)?transformer_blocks|down_blocks|up_blocks|encoder\.layers)\.\d+$|(^|\.)mid_block$"


class Case(NamedTuple):
    """A column of the table of a script; `label` is its key in golden.json if it is `golden`, a case of `make test`."""

    kind: str
    name: str
    settings: dict
    golden: bool = True

    @property
    def label(self):
        return f"{self.kind}: {self.name}"


LORA = {
    "rank": 4,
    "alpha": 4.0,
    "targets": {"transformer": lora_settings.TRANSFORMER_TARGETS},
    "rates": {"transformer": [1e-3, 1e-4]},
}
CLIP = {
    "targets": {"transformer": lora_settings.TRANSFORMER_TARGETS, "text_encoder": lora_settings.TEXT_ENCODER_TARGETS},
    "alpha": 8.0,
    "rates": {"transformer": [1e-3, 1e-4], "text_encoder": [5e-4, 1e-3]},
}
# `source`: the size of the source's latents, beside targets of 4 x 6 (8 x 8 with the trained pipeline).
KONTEXT = {**LORA, "targets": {"transformer": lora_settings.DEFAULT_TARGETS["flux_kontext"]}, "scheme": "none"}
CONTROL_LORA = {**LORA, "targets": {"transformer": lora_settings.DEFAULT_TARGETS["flux_control"]}, "scheme": "none"}
CONTROL = {"rates": {"controlnet": [1e-3, 1e-2]}}
CASES = [
    *(Case("flux_lora", scheme, {**LORA, "scheme": scheme}) for scheme in flow.WEIGHTING_SCHEMES),
    Case("flux_lora", "prior preservation, sigma_sqrt", {**LORA, "scheme": "sigma_sqrt", "prior_weight": 0.7}),
    Case("flux_lora", "CLIP trained, alpha 8", {**LORA, **CLIP, "scheme": "none"}),
    Case("flux_lora", "trained shapes pipeline", {**LORA, "scheme": "none", "trained": True}),
    Case("flux_controlnet", "2 + 2 blocks", {**CONTROL, "scheme": "logit_normal", "blocks": [2, 2]}),
    Case("flux_controlnet", "2 + 0 blocks", {**CONTROL, "scheme": "none", "blocks": [2, 0]}),
    Case("flux_controlnet", "existing, 1 + 1", {**CONTROL, "scheme": "sigma_sqrt", "blocks": [1, 1], "existing": True}),
    Case(
        "flux_controlnet",
        "trained shapes pipeline, 2 + 2",
        {**CONTROL, "scheme": "mode", "blocks": [2, 2], "trained": True},
    ),
    Case("flux_kontext", "source of the target's size", {**KONTEXT, "source": [4, 6]}, golden=False),
    Case("flux_kontext", "source of another size", {**KONTEXT, "scheme": "logit_normal", "source": [6, 2]}),
    Case("flux_kontext", "no source, alpha 8", {**KONTEXT, "scheme": "sigma_sqrt", "alpha": 8.0}, golden=False),
    Case("flux_kontext", "trained shapes pipeline", {**KONTEXT, "source": [8, 8], "trained": True}, golden=False),
    Case("flux_control", "widened, norms", {**CONTROL_LORA, "norms": True}),
    Case("flux_control", "alpha 8, cosmap", {**CONTROL_LORA, "scheme": "cosmap", "alpha": 8.0}, golden=False),
    Case("flux_control", "trained shapes pipeline", {**CONTROL_LORA, "trained": True}, golden=False),
    Case("flux_control", "--fill, norms", {**CONTROL_LORA, "fill": True, "norms": True}),
    Case("sd15", "epsilon", {**CONTROL, "prediction_type": "epsilon", "snr_gamma": None}),
    Case("sd15", "v_prediction", {**CONTROL, "prediction_type": "v_prediction", "snr_gamma": None}),
    Case("sd15", "epsilon, Min-SNR", {**CONTROL, "prediction_type": "epsilon", "snr_gamma": 5.0}),
    Case("sd15", "v_prediction, Min-SNR", {**CONTROL, "prediction_type": "v_prediction", "snr_gamma": 5.0}),
    Case("sdxl", "epsilon", {**CONTROL, "prediction_type": "epsilon", "snr_gamma": None}),
    # Published pipelines at small sizes, with their files, keys and tensor names (tests/real_pipelines.py).
    *(
        Case("flux_lora", name, {**LORA, **LENGTHS, "scheme": "none", "real": name})
        for name in ("FLUX.1-dev", "FLUX.1-schnell")
    ),
    *(
        Case(kind, name, {**settings, **LENGTHS, "real": name}, golden=False)
        for kind, name, settings in (
            ("flux_kontext", "FLUX.1-Kontext-dev", {**KONTEXT, "source": [4, 6]}),
            ("flux_control", "FLUX.1-Depth-dev", {**CONTROL_LORA, "norms": True}),
            ("flux_control", "FLUX.1-Fill-dev", {**CONTROL_LORA, "fill": True}),
        )
    ),
    *(
        Case(kind, name, {**CONTROL, **LENGTHS, "prediction_type": predicted, "snr_gamma": None, "real": name})
        for kind, name, predicted in (
            ("sd15", "stable-diffusion-v1-5", "epsilon"),
            ("sd15", "stable-diffusion-2-1", "v_prediction"),
            ("sdxl", "stable-diffusion-xl-base-1.0", "epsilon"),
        )
    ),
]


# ---- inputs --------------------------------------------------------------------------------------


class Drawn:
    """A stand-in for a random generator that returns the draws of the other side."""

    def __init__(self, uniform, normal):
        self.random = lambda: float(uniform)
        self.standard_normal = lambda: float(normal)


def make_pipeline(case, folder):
    """The pipeline of a case, written to `folder` once; the trained one is in the repository."""
    if case.settings.get("trained"):
        return ROOT / "examples/tiny/flux-shapes"
    if name := case.settings.get("real"):
        return folder / name if (folder / name).exists() else real_pipelines.make(name, folder / name)
    base = case.kind.split("_")[0]
    predicted = case.settings.get("prediction_type")
    root = folder / f"{base}-{predicted}"
    if not root.exists():
        make_tiny_pipeline.KINDS[base](root, **({"scheduler": {"prediction_type": predicted}} if predicted else {}))
    return root


def all_settings(case, root):
    """The settings that both sides read: those of the case, of its pipeline, and of all cases."""
    config = configs.read_config(root, "vae")
    common = {
        "kind": case.kind,
        "root": str(root),
        "updates": UPDATES,
        "block": BLOCK,
        "caption": CAPTION,
        "guidance_scale": 3.5,
    }
    common.update(logit_mean=0.2, logit_std=1.3, mode_scale=1.1, length=16, eps=1e-5, texts=[CAPTION])
    # Stable Diffusion 1.5's file has no scaling_factor: this is diffusers' default.
    common["scaling_factor"] = config.get("scaling_factor", 0.18215)
    return {**common, **case.settings}


def make_stage(settings, root, folder):
    """The encoder stage of a case, with its cache in `folder`."""
    kind = settings["kind"].split("_")[0].replace("sd15", "sd")
    return encoder_stage.EncoderStage(root, None, "no", folder, settings["length"], system=kind)


def scene(number, position):
    """The scene at `position` of batch `number`."""
    return sample_scene(rng.generator(0, "parity scene", number, position), "all")


def make_batch(settings, root, number, stage, vae):
    """The inputs of both sides for one update: batch 2 (4 with class images), not square.

    With a `vae`, for the trained pipeline, latents and text are those of scenes; otherwise they are random.
    """
    kind = settings["kind"]
    size = 4 if settings.get("prior_weight") else 2
    channels = configs.read_config(root, "vae")["latent_channels"]
    height, width = (8, 8) if vae else (4, 6) if kind.startswith("flux") else (8, 12)

    def normal(what, *shape):
        return rng.normal(0, f"parity {what}", number, shape=(size, *shape))

    batch = {what: normal(what, channels, height, width) for what in ("posterior", "noise")}
    batch["moments"] = normal("moments", 2 * channels, height, width)
    if kind.startswith("flux"):
        config = configs.read_config(root, "transformer")
        batch.update(text=normal("text", settings["length"], config["joint_attention_dim"]), normal=normal("density"))
        batch.update(
            pooled=normal("pooled", config["pooled_projection_dim"]),
            uniform=rng.generator(0, "parity u", number).random(size),
        )
    if kind in ("flux_controlnet", "flux_control") or settings.get("source"):
        batch["condition"] = normal("condition", 2 * channels, *settings.get("source", (height, width)))
    if settings.get("fill"):
        batch["pixels"] = np.tanh(normal("pixels", 3, 8 * height, 8 * width))
        batch["mask"] = (normal("mask", 1, 8 * height, 8 * width) > 0).astype(np.float32)
    if kind == "flux_controlnet":
        batch["condition_posterior"] = normal("condition posterior", channels, height, width)
    if "text_encoder" in settings.get("targets", ()):
        tokenizer = tokenization.load_tokenizer(root / "tokenizer")
        captions = ["a red circle", "a blue star on a white background"]
        ids = [text_encoders.token_ids(tokenizer, caption, 77) for caption in captions]
        batch["ids"] = np.stack(ids).astype(np.int32)
    if kind.startswith("sd"):
        batch["condition"] = 1 / (1 + np.exp(-normal("condition", 3, 8 * height, 8 * width)))
        batch["timesteps"] = rng.generator(0, "parity timesteps", number).integers(0, 1000, size).astype(np.int32)
        batch["text"] = normal("text", 77, configs.read_config(root, "unet")["cross_attention_dim"])
    if kind == "sdxl":
        batch["pooled"] = normal("pooled", configs.read_config(root, "text_encoder_2")["projection_dim"])
        batch["time_ids"] = np.array([[64, 96, 0, 3, 64, 96]] * size, np.float32)
    if vae:
        scenes = [scene(number, position) for position in range(size)]
        texts = [stage.text(each.caption) for each in scenes]
        batch.update(
            text=np.stack([t["prompt_embeds"] for t in texts]),
            pooled=np.stack([t["pooled_prompt_embeds"] for t in texts]),
        )
        for what, render_scene in (("moments", render), ("condition", render_outline)):
            pixels = np.stack(
                [crops.pixel_values(render_scene(each, 64), 64, "lanczos", None, False) for each in scenes]
            )
            batch[what] = vae.encode(ms.Tensor(pixels))[0].asnumpy()
    return batch


def make_batches(settings, root, count, stage):
    """The batches of the first `count` updates."""
    vae = None
    if settings.get("trained"):
        stage.prepare([scene(number, position).caption for number in range(count) for position in range(2)], [])
        vae = stage.load_vae()
    return [make_batch(settings, root, number, stage, vae) for number in range(count)]


# The arguments of the training steps, in order. With a trained CLIP, token ids replace the pooled text.
ORDER = {
    "flux_lora": "moments posterior noise indices text ids pooled image_ids",
    "flux_controlnet": "moments condition posterior condition_posterior noise indices text pooled image_ids",
    "flux_kontext": "moments posterior noise indices text pooled image_ids condition",
    "flux_control": "moments condition posterior noise indices text pooled image_ids masks",
    "sd15": "moments condition posterior noise timesteps text",
    "sdxl": "moments condition posterior noise timesteps text pooled time_ids",
}


def arguments(settings, batch):
    """The arguments of our step for a batch."""
    kind = settings["kind"]
    given = dict(batch)
    if kind.startswith("flux"):
        density = [settings[name] for name in ("scheme", "logit_mean", "logit_std", "mode_scale")]
        draws = [Drawn(*pair) for pair in zip(batch["uniform"], batch["normal"])]
        indices = [flow.density_to_index(flow.sample_density(each, *density), 1000) for each in draws]
        given["indices"] = np.array(indices, np.int32)
        given["image_ids"] = flow.latent_image_ids(*batch["noise"].shape[2:])
    if kind == "flux_kontext" and "condition" in batch:
        given["image_ids"] = np.concatenate([given["image_ids"], flow.source_image_ids(*batch["condition"].shape[2:])])
    if "mask" in batch:
        given["condition"] = batch["pixels"] * (1.0 - batch["mask"])
        given["masks"] = np.stack([flow.mask_channels(mask, 8) for mask in batch["mask"]])
    if "ids" in given:
        del given["pooled"]
    return [ms.Tensor(given[name]) for name in ORDER[kind].split() if name in given]


# ---- our side ------------------------------------------------------------------------------------


class Ours:
    """The models of a script as its `main` builds them, with initial weights that give every parameter a gradient.

    `cells`: prefix -> model; `trained`: prefix.name -> parameter, with the names in the files.
    """

    def __init__(self, settings, root):
        self.settings = settings
        self.root = root
        base = "transformer" if settings["kind"].startswith("flux") else "unet"
        if settings["kind"] == "flux_control":
            self.base = control_lora.load_transformer(root, settings.get("fill", False), FULL)
        else:
            self.base = loading.load_model(root, base, FULL)
        precision.freeze_params(self.base)
        self.cells = {base: self.base}
        if "targets" in settings:
            self._add_lora()
        else:
            self._add_controlnet(base)

    def _add_lora(self):
        settings = self.settings
        if "text_encoder" in settings["targets"]:
            self.cells["text_encoder"] = loading.load_model(self.root, "text_encoder", FULL)
            precision.freeze_params(self.cells["text_encoder"])
        for prefix, cell in self.cells.items():
            lora.add_lora(
                cell,
                lora.target_ranks(cell, settings["targets"][prefix], settings["rank"]),
                settings["alpha"] / settings["rank"],
                0.0,
                ms.float32,
            )
        if settings.get("norms"):
            lora.train_norms(self.base, {})
        self.trained = {
            f"{prefix}.{name}": p
            for prefix, cell in self.cells.items()
            for name, p in lora.lora_parameters(cell).items()
        }
        for name, parameter in self.trained.items():
            value = rng.normal(0, name, shape=parameter.shape)
            value = value / settings["rank"] if ".lora_A." in name else 0.1 * value
            parameter.set_data(ms.Tensor(1.0 + value if lora_layouts.NORM.search(name) else value))

    def _add_controlnet(self, base):
        flux = base == "transformer"
        if flux:
            zero = ("controlnet_x_embedder", "controlnet_blocks", "controlnet_single_blocks")
            controlnet = controlnets.flux_controlnet(self.root, *self.settings["blocks"])
        else:
            zero = ("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")
            controlnet = controlnets.unet_controlnet(self.base, 0)
        for name, parameter in named_parameters.model_parameters(controlnet).items():
            parameter.requires_grad = True
            if name.startswith(zero):
                parameter.set_data(ms.Tensor(0.05 * rng.normal(0, name, shape=parameter.shape)))
            elif self.settings.get("existing"):  # differs from the base
                parameter.set_data(ms.Tensor(parameter.asnumpy() + 0.02 * rng.normal(0, name, shape=parameter.shape)))
        for model in (controlnet, self.base):
            shared_blocks.use_shared_blocks(model)
        self.cells = {"controlnet": controlnet, **self.cells}
        self.trained = {f"controlnet.{name}": p for name, p in named_parameters.model_parameters(controlnet).items()}

    def save(self, folder):
        """Writes the initial trained weights for reference.py."""
        if "controlnet" in self.cells:
            loading.save_model(self.cells["controlnet"], folder / "controlnet", ms.float32)
        else:
            save_file({name: p.asnumpy() for name, p in self.trained.items()}, folder / "start.safetensors")

    def step(self, train=True):
        """The script's training step. Without `train` no weight changes and AdamW's first moment is the gradient."""
        settings = self.settings
        kind = settings["kind"]
        groups = []
        for prefix, (rate, decay) in settings["rates"].items():
            own = [p for name, p in self.trained.items() if name.startswith(f"{prefix}.")]
            groups.append({"params": own, "lr": rate if train else 0.0, "weight_decay": decay})
        optimizer = adamw.AdamW(groups, beta1=0.9 if train else 0.0, eps=settings["eps"])
        scaler = precision.loss_scaler("no")
        flags = ["--pretrained_model_name_or_path=x", f"--max_grad_norm={1.0 if train else 0.0}"]
        if kind.startswith("flux"):
            flags += [f"--weighting_scheme={settings['scheme']}", f"--max_sequence_length={settings['length']}"]
            more = {
                "vae": None,
                "vae_config": configs.read_config(self.root, "vae"),
                "sigmas": loading.load_scheduler(self.root).sigmas.asnumpy(),
            }
        if kind == "flux_lora":
            flags.append("--instance_data_dir=x")
            if weight := settings.get("prior_weight"):
                flags += ["--with_prior_preservation", "--class_data_dir=x", "--class_prompt=x"]
                flags.append(f"--prior_loss_weight={weight}")
            args = train_dreambooth_lora_flux.parse_args(flags)
            return train_dreambooth_lora_flux.TrainStepForFluxDevDB(
                self.base, optimizer, scaler, args, text_encoder=self.cells.get("text_encoder"), **more
            )
        flags.append("--train_data_dir=x")
        if kind == "flux_kontext":
            args = train_lora_flux_kontext.parse_args(flags)
            return train_lora_flux_kontext.TrainStepForFluxKontext(self.base, optimizer, scaler, args, **more)
        if kind == "flux_control":
            flags.append("--cache_latents")
            if settings.get("fill"):
                flags.append("--fill")
                more["vae"] = loading.load_model(self.root, "vae", FULL)
                precision.freeze_params(more["vae"])
            args = train_control_lora_flux.parse_args(flags)
            return train_control_lora_flux.TrainStepForFluxControl(self.base, optimizer, scaler, args, **more)
        if kind == "flux_controlnet":
            args = train_controlnet_flux.parse_args(flags)
            return train_controlnet_flux.TrainStepForFluxControlNet(
                self.cells["controlnet"], optimizer, scaler, args, transformer=self.base, **more
            )
        script = train_controlnet_sdxl if kind == "sdxl" else train_controlnet
        make = script.TrainStepForControlNetSDXL if kind == "sdxl" else script.TrainStepForControlNet
        if settings["snr_gamma"]:
            flags.append(f"--snr_gamma={settings['snr_gamma']}")
        more = {"vae_dtype": ms.float32} if kind == "sdxl" else {}
        return make(
            self.cells["controlnet"],
            optimizer,
            scaler,
            script.parse_args(flags),
            unet=self.base,
            vae=None,
            vae_config={"scaling_factor": settings["scaling_factor"]},
            scheduler_config=configs.read_config(self.root, "scheduler"),
            **more,
        )

    def gradients(self, step):
        """Name -> gradient, after a call of a step without `train`."""
        moments = {id(p): moment for p, moment in zip(step.optimizer.parameters, step.optimizer.exp_avg)}
        return {name: moments[id(p)].asnumpy() for name, p in self.trained.items()}

    def block_outputs(self, call):
        """(the outputs of all blocks while `call()` runs, its result)."""
        caught = {}
        handles = []

        def note(name):
            def hook(cell, inputs, output):
                for number, value in enumerate(tensors_of(output)):
                    # A copy, because the transformer adds a ControlNet's residuals in place.
                    caught[f"block {name}/{number}"] = value.asnumpy().copy()

            return hook

        for prefix, model in self.cells.items():
            for name, cell in model.cells_and_names():
                if re.search(BLOCK, name):
                    handles.append(cell.register_forward_hook(note(f"{prefix}.{name}")))
        result = call()
        for handle in handles:
            handle.remove()
        return caught, result

    def image(self, stage, noise, condition, mask):
        """uint8 [H, W, 3] after eight steps from the noise [1, C, h, w], by the sampling loop of the scripts."""
        settings = self.settings
        text = stage.text(CAPTION)
        vae = stage.load_vae()
        scheduler = configs.read_config(self.root, "scheduler")
        controlnet = self.cells.get("controlnet")
        with execution.pynative():
            if settings["kind"].startswith("sd"):
                control = (controlnet, conditions.condition_pixels(condition), 1.0)
                latents = sampling.sample_unet_latents(
                    self.base,
                    scheduler,
                    text=text,
                    empty=stage.unconditional(),
                    noise=noise,
                    steps=8,
                    guidance_scale=5.0,
                    compute=ms.float32,
                    control=control,
                )
            else:
                pooled = text["pooled_prompt_embeds"]
                if clip := self.cells.get("text_encoder"):
                    pooled = text_encoders.clip_pooled(
                        clip, tokenization.load_tokenizer(self.root / "tokenizer"), CAPTION
                    )
                further = {}
                if controlnet:
                    further["control"] = (controlnet, sampling.encode_image(vae, condition, ms.float32), 1.0)
                elif settings["kind"] == "flux_control":
                    mask = mask if settings.get("fill") else None
                    further["condition"] = sampling.encode_condition(vae, condition, mask, ms.float32)
                elif settings.get("source"):
                    further["source"] = sampling.encode_image(vae, condition, ms.float32)
                latents = sampling.sample_latents(
                    self.base,
                    scheduler,
                    prompt_embeds=text["prompt_embeds"][None],
                    pooled_prompt_embeds=pooled[None],
                    noise=noise,
                    steps=8,
                    guidance_scale=3.5,
                    compute=ms.float32,
                    **further,
                )
            return np.asarray(sampling.decode_latents(vae, latents, ms.float32)[0])


def tensors_of(output):
    """The tensors in a cell's output, in order."""
    if isinstance(output, ms.Tensor):
        yield output
    elif output is not None:
        for part in output:
            yield from tensors_of(part)
