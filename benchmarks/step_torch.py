"""One process of the speed benchmark on PyTorch and diffusers: does the job in a JSON file and prints a line of JSON.

    python benchmarks/step_torch.py JOB.json

speed.py starts it. Models, loss and step are those of the parity check's PyTorch side (tests/parity/reference.py):
diffusers' models and peft's LoRA in float32, with precomputed text and latents, PyTorch's fused attention and its
default number of threads. Images are sampled by diffusers' pipelines.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "benchmarks", "tests/parity")]

import diffusers
import numpy as np
import reference
import torch
import workload
from PIL import Image

from mindtune import rng


def make_step(job):
    """A function that does one update and returns its loss."""
    settings = workload.settings(job["kind"], job["size"])
    arrays = workload.batch(job["kind"], job["size"], job["batch"])
    step = reference.KINDS[job["kind"]](Path(job["root"]), Path(job["work"]), settings)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    parameters = list(step.trained.values())
    (rate, decay), *_ = settings["rates"].values()
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=settings["eps"], weight_decay=decay)
    if job.get("compile"):
        step.models = {name: torch.compile(model) for name, model in step.models.items()}

    def update():
        optimizer.zero_grad()
        loss = reference.loss_of(step, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return update


def updates(job):
    """Seconds per update, from the start of the process to the first and second update, and peak memory."""
    update = make_step(job)
    losses = []
    seconds = []
    ends = []
    for _ in range(job["warmup"] + job["updates"]):
        began = time.perf_counter()
        losses.append(update())
        seconds.append(time.perf_counter() - began)
        ends.append(time.time() - job["started"])
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "update": float(np.median(seconds[job["warmup"] :])),
        "all": seconds,
        "first": ends[0],
        "second": ends[1],
        "losses": losses,
        "peak_mb": int(peak.split()[1]) / 1024,
    }


def count(job):
    """Operations of one update by PyTorch's counter, with attention as plain products; checks operations.py."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    update = make_step(job)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        update()
    return {"operations": counter.get_total_flops()}


def sample(job):
    """Seconds of two equal images by diffusers' pipelines, without decoding their latents."""
    return workload.time_images({"flux_lora": flux_sampler, "sd15": unet_sampler}[job["kind"]](job))


def flux_sampler(job):
    pipeline = diffusers.FluxPipeline.from_pretrained(job["root"], **nothing("text_encoder", "text_encoder_2"))
    pipeline.set_progress_bar_config(disable=True)
    given = given_text(job)
    rows, columns = job["size"]["tokens"]
    noise = reference.pack(first_noise(pipeline.vae, 2 * rows, 2 * columns))

    def draw():
        tokens = pipeline(
            **given,
            latents=noise,
            height=16 * rows,
            width=16 * columns,
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            output_type="latent",
        ).images
        return reference.unpack(tokens, 2 * rows, 2 * columns)

    return draw


def unet_sampler(job):
    controlnet = diffusers.ControlNetModel.from_pretrained(Path(job["work"]) / "controlnet")
    without = nothing("text_encoder", "safety_checker", "feature_extractor")
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        job["root"], controlnet=controlnet, **without
    )
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    given = given_text(job)
    empty = torch.zeros_like(given["prompt_embeds"])
    noise = first_noise(pipeline.vae, *job["size"]["latent"])
    condition = Image.fromarray(workload.condition(job["size"]))

    def draw():
        return pipeline(
            **given,
            negative_prompt_embeds=empty,
            image=condition,
            latents=noise,
            height=condition.height,
            width=condition.width,
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance"],
            output_type="latent",
        ).images

    return draw


def nothing(*components):
    """The arguments that load a pipeline without these components."""
    return dict.fromkeys(components)


def given_text(job):
    """The prompt's embeddings as arguments of a pipeline."""
    return {name: torch.from_numpy(value[None]) for name, value in workload.prompt(job["kind"], job["size"]).items()}


def first_noise(vae, height, width):
    """The noise that our samplers start the first image of seed 0 with."""
    return torch.from_numpy(rng.normal(0, "validation", 0, shape=(1, vae.config.latent_channels, height, width)))


def encode(job):
    """Images per second through the VAE's encoder, one at a time, from files, after the first `skip`."""
    vae = diffusers.AutoencoderKL.from_pretrained(Path(job["root"]) / "vae").eval()
    paths = sorted(Path(job["images"]).glob("*.png"))[: job["count"]]
    ends = []
    with torch.no_grad():
        for path in paths:
            pixels = np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 127.5 - 1.0
            vae.encode(torch.from_numpy(pixels[None])).latent_dist.parameters.numpy()
            ends.append(time.perf_counter())
    skipped = job["skip"]
    return {"images_per_second": (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])}


def main(path):
    job = json.loads(Path(path).read_text())
    print(json.dumps({"updates": updates, "count": count, "sample": sample, "encode": encode}[job["do"]](job)))


if __name__ == "__main__":
    main(sys.argv[1])
