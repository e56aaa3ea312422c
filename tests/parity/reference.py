"""The PyTorch side of the parity check: Stable Diffusion ControlNet training written from the formulas, on diffusers' models.

    python reference.py WORK        WORK holds inputs.npz, settings.json, pipeline/ and controlnet/; leaves theirs.npz there

diffusers gives the models, the noise schedule and the sampling pipeline; step, loss and loop are ours. Runs in float32 on the CPU.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image


def encode(root, kind, caption):
    """Text states, and for SDXL the pooled text, of one caption."""
    found = {}
    for tail, cls in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection"))[: 2 if kind == "sdxl" else 1]:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(root / f"tokenizer{tail}")
        encoder = getattr(transformers, cls).from_pretrained(root / f"text_encoder{tail}").eval()
        ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        found[f"text states{tail}"] = out.hidden_states[-2] if kind == "sdxl" else out.last_hidden_state
        if tail:
            found["pooled text"] = out.text_embeds
    return found


class Step:
    def __init__(self, root, controlnet, settings):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(root / "unet").eval().requires_grad_(False)
        self.controlnet = diffusers.ControlNetModel.from_pretrained(controlnet).train()
        self.scheduler = diffusers.DDPMScheduler.from_pretrained(root / "scheduler")
        self.settings = settings

    def outputs(self, batch):
        """Residuals, prediction, target and weights of a batch."""
        mean, logvar = batch["moments"].chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * batch["posterior"]) * self.settings["scaling_factor"]
        timesteps, noise = batch["timesteps"].long(), batch["noise"]
        more = {"added_cond_kwargs": {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}} if "pooled" in batch else {}
        given = (self.scheduler.add_noise(latents, noise, timesteps), timesteps)
        text = {"encoder_hidden_states": batch["text"], "return_dict": False, **more}
        down, middle = self.controlnet(*given, controlnet_cond=batch["condition"], **text)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction = self.unet(*given, **text, **residuals)[0]
        velocity = self.settings["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        alphas, gamma = self.scheduler.alphas_cumprod[timesteps], self.settings["snr_gamma"]
        snr = alphas / (1 - alphas)
        weights = torch.ones_like(snr) if gamma is None else snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
        return [*down, middle], prediction, target, weights

    def loss(self, batch):
        _, prediction, target, weights = self.outputs(batch)
        return (((prediction - target) ** 2).mean(dim=(1, 2, 3)) * weights).mean()


def sample(root, kind, step, settings, noise):
    """A picture by diffusers' own pipeline with UniPC, uint8 [H, W, 3]."""
    cls = diffusers.StableDiffusionXLControlNetPipeline if kind == "sdxl" else diffusers.StableDiffusionControlNetPipeline
    more = {} if kind == "sdxl" else {"safety_checker": None}
    pipeline = cls.from_pretrained(root, controlnet=step.controlnet.eval(), **more)
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        settings["caption"], image=Image.open(settings["condition"]).convert("RGB"), num_inference_steps=8, guidance_scale=5.0,
        latents=noise, height=64, width=64,
    ).images[0]  # fmt: skip
    return np.asarray(image)


def main(work):
    work = Path(work)
    settings, root = json.loads((work / "settings.json").read_text()), work / "pipeline"
    kind, inputs = settings["kind"], np.load(work / "inputs.npz")
    batches = [{} for _ in range(settings["updates"])]
    for name in inputs.files:
        place, _, key = name.partition("/")
        if key:
            batches[int(place)][key] = torch.from_numpy(inputs[name])
    found = {name: value.detach() for name, value in encode(root, kind, settings["caption"]).items()}
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae").eval()
    with torch.no_grad():
        found["VAE moments"] = vae.encode(torch.from_numpy(inputs["pixels"])).latent_dist.parameters

    step = Step(root, work / "controlnet", settings)
    with torch.no_grad():
        residuals, found["prediction"], *_ = step.outputs(batches[0])
        found.update({f"residual {number}": value for number, value in enumerate(residuals)})
    step.loss(batches[0]).backward()
    found.update({f"gradient {name}": p.grad.clone() for name, p in step.controlnet.named_parameters()})

    optimizer = torch.optim.AdamW(step.controlnet.parameters(), lr=settings["learning_rate"], weight_decay=1e-2, eps=1e-8)
    losses = []
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = step.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.controlnet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if number == 19:
            found.update({f"weight {name}": p.detach().clone() for name, p in step.controlnet.named_parameters()})
    arrays = {name: value.numpy() for name, value in found.items()}
    with torch.no_grad():
        arrays["picture"] = sample(root, kind, Step(root, work / "controlnet", settings), settings, torch.from_numpy(inputs["start"]))
    np.savez(work / "theirs.npz", losses=np.array(losses), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
