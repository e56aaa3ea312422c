"""What becomes of each published pipeline, VAE and ControlNet: the tests hold the scripts to it, docs/models.md lists it."""

from __future__ import annotations

from typing import NamedTuple

LORA, FLUX, SD, SDXL = "flux_lora", "flux_controlnet", "sd", "sdxl"


class Verdict(NamedTuple):
    """`scripts` train it. If there are none, `script` refuses it: its message has all of `words`; `why` is the page's text."""

    scripts: tuple[str, ...] = ()
    script: str = ""
    words: tuple[str, ...] = ()
    why: str = ""


def trained(*scripts: str, why: str = "") -> Verdict:
    return Verdict(scripts, why=why)


def refused(script: str, *words: str, why: str) -> Verdict:
    return Verdict((), script, words, why)


def inpainting() -> Verdict:
    return refused(SD, "unet", "in_channels", "9", why="inpainting: the UNet takes 9 channels, latents with a mask and a masked image")


def tool(channels: int, what: str) -> Verdict:
    return refused(
        LORA, "transformer", "in_channels", str(channels), why=f"the transformer takes {channels} channels, {what} beside the latents"
    )


PIPELINES = {
    "FLUX.1-dev": trained(LORA, FLUX),
    "FLUX.1-schnell": trained(LORA, FLUX),
    "FLUX.1-Krea-dev": trained(LORA),
    "FLUX.1-Kontext-dev": refused(
        LORA, "FluxKontextPipeline", why="edits images: it is trained on pairs, which the scripts do not give it"
    ),
    "FLUX.1-Fill-dev": tool(384, "a mask and a masked image"),
    "FLUX.1-Canny-dev": tool(128, "those of a condition"),
    "FLUX.1-Depth-dev": tool(128, "those of a condition"),
    **{name: trained(SD) for name in ("stable-diffusion-v1-4", "stable-diffusion-v1-5")},
    "stable-diffusion-inpainting": inpainting(),
    **{name: trained(SD) for name in ("openjourney", "Counterfeit-V2.5", "Realistic_Vision_V5.1_noVAE", "realistic-vision-v51")},
    "stable-diffusion-2": trained(SD, why="v prediction"),
    "stable-diffusion-2-1": trained(SD, why="v prediction"),
    "stable-diffusion-2-1-resaved": trained(SD, why="v prediction"),
    "stable-diffusion-2-1-base": trained(SD),
    "stable-diffusion-2-inpainting": inpainting(),
    **{name: trained(SDXL) for name in ("stable-diffusion-xl-base-1.0", "sdxl-turbo", "sdxl-finetune-0.27")},
    "playground-v2.5-1024px-aesthetic": refused(
        SDXL, "scheduler", "EDMDPMSolverMultistepScheduler", why="its noise schedule is EDM's (EDMDPMSolverMultistepScheduler)"
    ),
    "SSD-1B": trained(SDXL),
    **{name: trained(SDXL) for name in ("dreamshaper-xl-1-0", "RealVisXL_V4.0", "RealVisXL_V5.0")},
}
# VAEs that --pretrained_vae_model_name_or_path of the SDXL script takes in place of the pipeline's.
VAES = {
    "sd-vae-ft-mse": trained(SD, why="put in the pipeline's vae folder"),
    "sdxl-vae": trained(SDXL),
    "sdxl-vae-fp16-fix": trained(SDXL),
    "playground-v2.5 VAE": refused(SDXL, "latents_mean", why="scales each channel by its own latents_mean and latents_std"),
}
UNION = "a union ControlNet takes several conditions with their number"
CONTROLNETS = {
    **{name: trained(SD) for name in ("sd-controlnet-canny", "sd-controlnet-depth")},
    **{name: trained(SD) for name in ("control_v11p_sd15_canny", "control_v11p_sd15_openpose", "Depth-Anything-controlnet")},
    **{name: trained(SDXL) for name in ("controlnet-canny-sdxl-1.0", "controlnet-depth-sdxl-1.0")},
    "controlnet-union-sdxl-1.0": refused(SDXL, "union", "task_embedding", why=UNION + "; its tensors tell, its config.json does not"),
    "controlnet-union-sdxl-1.0 promax": refused(SDXL, "union", "num_control_type", "8", why=UNION),
    "sd21-photo-background-9-channels": refused(SD, "in_channels", "9", why="takes 9 channels, latents with a mask and a masked image"),
    "6-channel ControlNet": refused(SD, "conditioning_channels", "6", why="takes conditions of 6 channels; the scripts give RGB images"),
    "1-channel ControlNet": refused(SD, "conditioning_channels", "1", why="takes conditions of 1 channel; the scripts give RGB images"),
    "FlaxControlNet-hands": refused(SD, "FlaxControlNetModel", why="weights of Flax; convert them with diffusers"),
    **{name: trained(FLUX) for name in ("FLUX.1-dev-Controlnet-Canny", "Flux.1-dev-Controlnet-Upscaler")},
    "FLUX.1-dev-ControlNet-Union-Pro-2.0": trained(FLUX, why="one condition at a time: it has no mode"),
    "FLUX.1-dev-Controlnet-Union": refused(FLUX, "union", "num_mode", "10", why=UNION),
    "xlabs-style-rgb_v1": refused(
        FLUX, "conditioning_embedding_channels", "16", why="takes its condition as pixels (conditioning_embedding_channels)"
    ),
}
# The pipeline that a ControlNet goes on with.
BASES = {
    **dict.fromkeys((LORA, FLUX), "FLUX.1-dev"), SD: "stable-diffusion-v1-5", SDXL: "stable-diffusion-xl-base-1.0",
    "sd21-photo-background-9-channels": "stable-diffusion-2-1-base",
}  # fmt: skip
