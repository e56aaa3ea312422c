"""The PyTorch side of the parity check: the training steps from their formulas, on diffusers' models and peft's LoRA.

    python reference.py WORK [WORK ...]

Reads settings.json, inputs.npz and the initial trained weights of each WORK, and writes theirs.npz there. Models, noise
schedules and sampling pipelines are those of diffusers; step, loss and loop are our own. float32 on the CPU.
"""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from PIL import Image
from safetensors.torch import load_file


def sample_posterior(moments, noise):
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise


def token_ids(tokenizer, caption, length=77):
    return tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load(cls, folder):
    """The model in float32, whatever the dtype of the files."""
    return cls.from_pretrained(folder, torch_dtype=torch.float32).eval()


def freeze(model):
    return model.eval().requires_grad_(False)


# ---- Stable Diffusion ----------------------------------------------------------------------------


class UNetControlNet:
    """Denoising diffusion with a ControlNet on a frozen UNet."""

    def __init__(self, root, work, settings):
        self.root = root
        self.settings = settings
        unet = freeze(load(diffusers.UNet2DConditionModel, root / "unet"))
        self.models = {"controlnet": diffusers.ControlNetModel.from_pretrained(work / "controlnet"), "unet": unet}
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(root / "scheduler")
        self.trained = {f"controlnet.{name}": p for name, p in self.models["controlnet"].named_parameters()}

    def text(self, caption):
        found = []
        encoders = [("", "CLIPTextModel")]
        if self.settings["kind"] == "sdxl":
            encoders.append(("_2", "CLIPTextModelWithProjection"))
        for tail, cls in encoders:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(self.root / f"tokenizer{tail}")
            encoder = load(getattr(transformers, cls), self.root / f"text_encoder{tail}")
            out = encoder(token_ids(tokenizer, caption), output_hidden_states=True)
            found.append(out.hidden_states[-2] if self.settings["kind"] == "sdxl" else out.last_hidden_state)
        pooled = {"pooled_prompt_embeds": out.text_embeds[0]} if self.settings["kind"] == "sdxl" else {}
        return {"prompt_embeds": torch.cat(found, dim=-1)[0], **pooled}

    def outputs(self, batch):
        """Prediction, target and weights of a batch."""
        latents = sample_posterior(batch["moments"], batch["posterior"]) * self.settings["scaling_factor"]
        timesteps = batch["timesteps"].long()
        noise = batch["noise"]
        more = {}
        if "pooled" in batch:
            more["added_cond_kwargs"] = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
        given = (self.scheduler.add_noise(latents, noise, timesteps), timesteps)
        text = {"encoder_hidden_states": batch["text"], "return_dict": False, **more}
        down, middle = self.models["controlnet"](*given, controlnet_cond=batch["condition"], **text)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction = self.models["unet"](*given, **text, **residuals)[0]
        velocity = self.settings["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        alphas = self.scheduler.alphas_cumprod[timesteps]
        gamma = self.settings["snr_gamma"]
        snr = alphas / (1 - alphas)
        weights = torch.ones_like(snr)
        if gamma is not None:
            weights = snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
        return prediction, target, weights

    def image(self, noise, condition, mask):
        """The image of diffusers' pipeline, uint8 [H, W, 3]."""
        return generate_unet(self.root, self.settings, self.models["controlnet"], noise, condition)


def generate_unet(root, settings, controlnet, noise, condition):
    """The image of diffusers' pipeline with UniPC, uint8 [H, W, 3]."""
    cls = (
        diffusers.StableDiffusionXLControlNetPipeline
        if settings["kind"] == "sdxl"
        else diffusers.StableDiffusionControlNetPipeline
    )
    without = {} if settings["kind"] == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    pipeline = cls.from_pretrained(root, controlnet=controlnet, torch_dtype=torch.float32, **without)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        settings["caption"],
        image=condition,
        num_inference_steps=8,
        guidance_scale=5.0,
        latents=noise,
        height=condition.height,
        width=condition.width,
    ).images[0]
    return np.asarray(image)


# ---- FLUX ----------------------------------------------------------------------------------------


def pack(latents):
    """[B, C, H, W] to tokens [B, HW/4, 4C]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens, height, width):
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


class Flux:
    """What both FLUX scripts do: rectified flow on packed latents."""

    def __init__(self, root, settings):
        self.root = root
        self.settings = settings
        self.models = {"transformer": freeze(load(diffusers.FluxTransformer2DModel, root / "transformer"))}
        self.vae_config = json.loads((root / "vae" / "config.json").read_text())
        self.sigmas = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler").sigmas

    def text(self, caption):
        clip = load(transformers.CLIPTextModel, self.root / "text_encoder")
        ids = token_ids(transformers.CLIPTokenizer.from_pretrained(self.root / "tokenizer"), caption)
        t5 = load(transformers.T5EncoderModel, self.root / "text_encoder_2")
        tokenizer = transformers.T5TokenizerFast.from_pretrained(self.root / "tokenizer_2")
        states = t5(token_ids(tokenizer, caption, self.settings["length"]))[0]
        return {"pooled_prompt_embeds": clip(ids).pooler_output[0], "prompt_embeds": states[0]}

    def latents(self, moments, noise):
        return (sample_posterior(moments, noise) - self.vae_config["shift_factor"]) * self.vae_config["scaling_factor"]

    def sigma(self, batch):
        """[B, 1, 1, 1], by the density of the scheme (arXiv 2403.03206, section 3.1) from the draws of the batch."""
        settings = self.settings
        u = batch["uniform"].double()
        if settings["scheme"] == "logit_normal":
            u = torch.sigmoid(settings["logit_mean"] + settings["logit_std"] * batch["normal"].double())
        if settings["scheme"] == "mode":
            u = 1 - u - settings["mode_scale"] * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return self.sigmas[(1000 * u).long().clamp(0, 999)].view(-1, 1, 1, 1)

    def weights(self, sigma):
        sigma = sigma.flatten()
        if self.settings["scheme"] == "sigma_sqrt":
            return sigma**-2
        if self.settings["scheme"] == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones_like(sigma)

    def common(self, batch, sigma, latents, pooled):
        """The arguments that transformer and ControlNet share."""
        _, _, height, width = latents.shape
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
        guidance = torch.full((len(latents),), self.settings["guidance_scale"])
        return {
            "hidden_states": pack(sigma * batch["noise"] + (1 - sigma) * latents),
            "timestep": sigma.flatten(),
            "guidance": guidance if self.models["transformer"].config.guidance_embeds else None,
            "pooled_projections": pooled,
            "encoder_hidden_states": batch["text"],
            "txt_ids": torch.zeros(batch["text"].shape[1], 3),
            "img_ids": ids,
            "return_dict": False,
        }


class FluxLora(Flux):
    """peft's LoRA on the transformer, and on CLIP if the settings have targets for it."""

    def __init__(self, root, work, settings):
        super().__init__(root, settings)
        if settings["kind"] == "flux_control":
            channels = self.vae_config["latent_channels"]
            widen(self.models["transformer"], 8 * channels + (4 * 64 if settings.get("fill") else 0))
        if "text_encoder" in settings["targets"]:
            self.models["text_encoder"] = freeze(load(transformers.CLIPTextModel, root / "text_encoder"))
        self.trained = {}
        start = load_file(work / "start.safetensors")
        for prefix, model in self.models.items():
            rank = settings["rank"]
            alpha = settings["alpha"]
            targets = settings["targets"][prefix]
            if targets == ["all-linear"]:
                targets = linear_layers(model)
            model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
            if settings.get("norms"):
                train_norms(model)
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.trained.update({f"{prefix}.{name.replace('.default.', '.')}": p for name, p in own.items()})
        for name, parameter in self.trained.items():
            parameter.data.copy_(start[name])

    def outputs(self, batch):
        sigma = self.sigma(batch)
        latents = self.latents(batch["moments"], batch["posterior"])
        pooled = self.models["text_encoder"](batch["ids"].long()).pooler_output if "ids" in batch else batch["pooled"]
        prediction = self.models["transformer"](**self.common(batch, sigma, latents, pooled))[0]
        return unpack(prediction, *latents.shape[2:]), batch["noise"] - latents, self.weights(sigma)

    def image(self, noise, condition, mask):
        return generate_flux(self.root, self.settings, noise, **self.models)


def linear_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def train_norms(transformer):
    """Trains the norms of queries and keys, too."""
    for name, parameter in transformer.named_parameters():
        if re.search(r"\.norm_(added_)?[qk]\.", name):
            parameter.requires_grad = True


@torch.no_grad()
def widen(transformer, inputs):
    """Gives the input layer `inputs` inputs. What it reads beyond the noisy latents has weights of zero."""
    old = transformer.x_embedder
    if inputs == old.in_features:
        return
    new = torch.nn.Linear(inputs, old.out_features).requires_grad_(False)
    new.weight.zero_()
    new.weight[:, : old.in_features] = old.weight
    new.bias.copy_(old.bias)
    transformer.x_embedder = new
    transformer.register_to_config(in_channels=inputs, out_channels=old.in_features)


class FluxKontext(FluxLora):
    """LoRA of a transformer that reads the tokens of a source image after those of the noisy latents."""

    def outputs(self, batch):
        sigma = self.sigma(batch)
        latents = self.latents(batch["moments"], batch["posterior"])
        given = self.common(batch, sigma, latents, batch["pooled"])
        count = given["hidden_states"].shape[1]
        if "condition" in batch:
            source = self.latents(batch["condition"], 0.0)  # the mean
            height, width = source.shape[2:]
            ids = diffusers.FluxKontextPipeline._prepare_latent_image_ids(None, height // 2, width // 2, "cpu", None)
            ids[:, 0] = 1
            given["hidden_states"] = torch.cat([given["hidden_states"], pack(source)], dim=1)
            given["img_ids"] = torch.cat([given["img_ids"], ids])
        prediction = self.models["transformer"](**given)[0][:, :count]
        return unpack(prediction, *latents.shape[2:]), batch["noise"] - latents, self.weights(sigma)

    def image(self, noise, condition, mask):
        source = condition if self.settings.get("source") else None
        return generate_flux_kontext(self.root, self.settings, self.models["transformer"], noise, source)


def generate_flux_kontext(root, settings, transformer, noise, source):
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(root, transformer=transformer, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    height = 8 * noise.shape[2]
    width = 8 * noise.shape[3]
    image = pipeline(
        image=source,
        prompt=settings["caption"],
        latents=pack(noise),
        height=height,
        width=width,
        max_area=height * width,  # otherwise the image gets about a million pixels,
        _auto_resize=False,  # and the source too
        num_inference_steps=8,
        guidance_scale=3.5,
        max_sequence_length=settings["length"],
    ).images[0]
    return np.asarray(image)


class FluxControlLora(FluxLora):
    """LoRA of a transformer that reads the latents of a condition beside the noisy ones, or a masked image and mask."""

    def outputs(self, batch):
        sigma = self.sigma(batch)
        latents = self.latents(batch["moments"], batch["posterior"])
        given = self.common(batch, sigma, latents, batch["pooled"])
        if self.settings.get("fill"):
            beside = self.fill_inputs(batch)
        else:
            beside = [pack(self.latents(batch["condition"], 0.0))]  # the mean
        given["hidden_states"] = torch.cat([given["hidden_states"], *beside], dim=2)
        prediction = self.models["transformer"](**given)[0]
        return unpack(prediction, *latents.shape[2:]), batch["noise"] - latents, self.weights(sigma)

    @torch.no_grad()
    def fill_inputs(self, batch):
        """The masked images' latents and the masks, packed by the pipeline."""
        vae = with_mean(load(diffusers.AutoencoderKL, self.root / "vae"))
        part = SimpleNamespace(vae=vae, vae_scale_factor=8, _pack_latents=diffusers.FluxFillPipeline._pack_latents)
        mask, image = diffusers.FluxFillPipeline.prepare_mask_latents(
            part,
            mask=batch["mask"],
            masked_image=batch["pixels"] * (1 - batch["mask"]),
            batch_size=len(batch["mask"]),
            num_channels_latents=self.vae_config["latent_channels"],
            num_images_per_prompt=1,
            height=batch["mask"].shape[2],
            width=batch["mask"].shape[3],
            dtype=torch.float32,
            device="cpu",
            generator=None,
        )
        return image, mask

    def image(self, noise, condition, mask):
        mask = mask if self.settings.get("fill") else None
        return generate_flux_control(self.root, self.settings, self.models["transformer"], noise, condition, mask)


def with_mean(vae):
    """The VAE, encoding to the mean of the posterior, as in our validation and inference, where pipelines sample."""
    encode = vae.encode

    def encode_to_mean(pixels):
        mean = encode(pixels).latent_dist.mode()
        return SimpleNamespace(latents=mean, latent_dist=SimpleNamespace(sample=lambda generator: mean))

    vae.encode = encode_to_mean
    return vae


def generate_flux_control(root, settings, transformer, noise, condition, mask=None):
    """The image for a condition, or, with a mask, of filling an image."""
    cls = diffusers.FluxFillPipeline if mask else diffusers.FluxControlPipeline
    pipeline = cls.from_pretrained(root, transformer=transformer, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with_mean(pipeline.vae)
    given = {"image": condition, "mask_image": mask} if mask else {"control_image": condition}
    image = pipeline(
        settings["caption"],
        latents=pack(noise),
        height=condition.height,
        width=condition.width,
        num_inference_steps=8,
        guidance_scale=3.5,
        max_sequence_length=settings["length"],
        **given,
    ).images[0]
    return np.asarray(image)


def generate_flux(root, settings, noise, **models):
    """The image of diffusers' pipeline from noise [1, C, h, w], uint8 [H, W, 3]."""
    pipeline = diffusers.FluxPipeline.from_pretrained(root, torch_dtype=torch.float32, **models)
    pipeline.set_progress_bar_config(disable=True)
    height = 8 * noise.shape[2]
    width = 8 * noise.shape[3]
    image = pipeline(
        settings["caption"],
        latents=pack(noise),
        height=height,
        width=width,
        num_inference_steps=8,
        guidance_scale=3.5,
        max_sequence_length=settings["length"],
    ).images[0]
    return np.asarray(image)


class FluxControlNet(Flux):
    """A ControlNet on the frozen transformer."""

    def __init__(self, root, work, settings):
        super().__init__(root, settings)
        self.models = {"controlnet": diffusers.FluxControlNetModel.from_pretrained(work / "controlnet"), **self.models}
        self.trained = {f"controlnet.{name}": p for name, p in self.models["controlnet"].named_parameters()}

    def outputs(self, batch):
        sigma = self.sigma(batch)
        latents = self.latents(batch["moments"], batch["posterior"])
        condition = pack(self.latents(batch["condition"], batch["condition_posterior"]))
        given = self.common(batch, sigma, latents, batch["pooled"])
        blocks, single = self.models["controlnet"](controlnet_cond=condition, **given)
        residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}
        prediction = self.models["transformer"](**given, **residuals)[0]
        return unpack(prediction, *latents.shape[2:]), batch["noise"] - latents, self.weights(sigma)

    def image(self, noise, condition, mask):
        return generate_flux_controlnet(self.root, self.settings, self.models["controlnet"], noise, condition)


def generate_flux_controlnet(root, settings, controlnet, noise, condition):
    pipeline = diffusers.FluxControlNetPipeline.from_pretrained(root, controlnet=controlnet, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with_mean(pipeline.vae)
    image = pipeline(
        settings["caption"],
        control_image=condition,
        latents=pack(noise),
        height=condition.height,
        width=condition.width,
        num_inference_steps=8,
        guidance_scale=3.5,
        controlnet_conditioning_scale=1.0,
        max_sequence_length=settings["length"],
    ).images[0]
    return np.asarray(image)


# ---- one case ------------------------------------------------------------------------------------

KINDS = {
    "sd15": UNetControlNet,
    "sdxl": UNetControlNet,
    "flux_lora": FluxLora,
    "flux_controlnet": FluxControlNet,
    "flux_kontext": FluxKontext,
    "flux_control": FluxControlLora,
}


def tensors_of(output):
    """The tensors in a module's output, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif output is not None:
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_of(part)


def block_outputs(models, block, call):
    """(the outputs of all modules whose names match the pattern `block` while `call()` runs, its result)."""
    caught = {}
    handles = []

    def note(name):
        def hook(module, inputs, output):
            if isinstance(
                module, FluxSingleTransformerBlock
            ):  # its text and image are separate here, joined on our side
                output = torch.cat(output, dim=1)
            caught.update({f"block {name}/{number}": value for number, value in enumerate(tensors_of(output))})

        return hook

    for prefix, model in models.items():
        for name, module in model.named_modules():
            if re.search(block, name):
                handles.append(module.register_forward_hook(note(f"{prefix}.{name}")))
    result = call()
    for handle in handles:
        handle.remove()
    return caught, result


def loss_of(step, batch):
    prediction, target, weights = step.outputs(batch)
    errors = ((prediction - target) ** 2).mean(dim=(1, 2, 3)) * weights
    if step.settings.get("prior_weight") is None:
        return errors.mean()
    instance, prior = errors.chunk(2)
    return instance.mean() + step.settings["prior_weight"] * prior.mean()


def main(work):
    settings = json.loads((work / "settings.json").read_text())
    inputs = np.load(work / "inputs.npz")
    root = Path(settings["root"])
    batches = [{} for _ in range(settings["updates"])]
    for name in inputs.files:
        place, _, key = name.partition("/")
        if key:
            batches[int(place)][key] = torch.from_numpy(inputs[name])
    step = KINDS[settings["kind"]](root, work, settings)
    vae = load(diffusers.AutoencoderKL, root / "vae")
    with torch.no_grad():
        texts = [step.text(caption) for caption in settings["texts"]]
        found = {f"text {number} {name}": value for number, text in enumerate(texts) for name, value in text.items()}
        found["VAE moments"] = vae.encode(torch.from_numpy(inputs["pixels"])).latent_dist.parameters
        blocks, (found["prediction"], found["target"], _) = block_outputs(
            step.models, settings["block"], lambda: step.outputs(batches[0])
        )
        shown = [Image.open(work / f"{name}.png") for name in ("condition", "mask")]
        found["image"] = torch.from_numpy(step.image(torch.from_numpy(inputs["start"]), *shown).copy())
    for parameter in step.trained.values():
        # Without single blocks, the last double block's text stream does not affect the loss: torch has no gradient for
        # it and AdamW would skip it. Our gradient is zero there, and the weights decay.
        parameter.grad = torch.zeros_like(parameter)
    loss_of(step, batches[0]).backward()
    found.update(blocks, **{f"gradient {name}": p.grad.clone() for name, p in step.trained.items()})

    groups = []
    for prefix, (rate, decay) in settings["rates"].items():
        own = [p for name, p in step.trained.items() if name.startswith(f"{prefix}.")]
        groups.append({"params": own, "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=settings["eps"])
    losses = []
    for number, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(step, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if number == 19:
            found.update({f"weight {name}": p.detach().clone() for name, p in step.trained.items()})
    np.savez(
        work / "theirs.npz", losses=np.array(losses), **{name: value.detach().numpy() for name, value in found.items()}
    )


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(Path(path))
