"""Which published pipelines, VAEs and ControlNets are trained or refused: tested here, listed in docs/models.md."""

from __future__ import annotations

from typing import NamedTuple

LORA, FLUX, SD, SDXL = "flux_lora", "flux_controlnet", "sd", "sdxl"
KONTEXT, CONTROL, FILL = "flux_kontext", "flux_control", "flux_fill"  # the last is the second's script with --fill


class Verdict(NamedTuple):
    """`scripts` train it, and `script` refuses it with a message of all `words`; `why` is for the page."""

    scripts: tuple[str, ...] = ()
    script: str = ""
    words: tuple[str, ...] = ()
    why: str = ""


def trained(*scripts: str, why: str = "") -> Verdict:
    return Verdict(scripts, why=why)


def tool(kind: str, script: str, words: tuple[str, ...], why: str) -> Verdict:
    """A model for one job, which the LoRA script refuses with the advice to use the job's script."""
    return Verdict((script,), LORA, (f"Flux{kind}Pipeline", *words), why)


def refused(script: str, *words: str, why: str) -> Verdict:
    return Verdict((), script, words, why)


def inpainting() -> Verdict:
    return refused(
        SD,
        "unet",
        "in_channels",
        "9",
        why="inpainting: the UNet takes 9 channels, latents with a mask and a masked image",
    )


PIPELINES = {
    "FLUX.1-dev": trained(LORA, FLUX, CONTROL),
    "FLUX.1-schnell": trained(LORA, FLUX),
    "FLUX.1-Krea-dev": trained(LORA),
    "FLUX.1-Kontext-dev": tool("Kontext", KONTEXT, ("examples/flux_kontext/",), "edits an image"),
    "FLUX.1-Fill-dev": tool(
        "Fill",
        FILL,
        ("examples/flux_control/ and --fill",),
        "inpainting: the transformer takes 384 channels, latents with a mask and a masked image",
    ),
    **{
        f"FLUX.1-{what}-dev": tool(
            "Control",
            CONTROL,
            ("examples/flux_control/",),
            "the transformer takes 128 channels, latents with those of a condition",
        )
        for what in ("Canny", "Depth")
    },
    **{name: trained(SD) for name in ("stable-diffusion-v1-4", "stable-diffusion-v1-5")},
    "stable-diffusion-inpainting": inpainting(),
    **{
        name: trained(SD)
        for name in ("openjourney", "Counterfeit-V2.5", "Realistic_Vision_V5.1_noVAE", "realistic-vision-v51")
    },
    "stable-diffusion-2": trained(SD, why="v prediction"),
    "stable-diffusion-2-1": trained(SD, why="v prediction"),
    "stable-diffusion-2-1-resaved": trained(SD, why="v prediction"),
    "stable-diffusion-2-1-base": trained(SD),
    "stable-diffusion-2-inpainting": inpainting(),
    **{name: trained(SDXL) for name in ("stable-diffusion-xl-base-1.0", "sdxl-turbo", "sdxl-finetune-0.27")},
    "playground-v2.5-1024px-aesthetic": refused(
        SDXL,
        "scheduler",
        "EDMDPMSolverMultistepScheduler",
        why="its noise schedule is EDM's (EDMDPMSolverMultistepScheduler)",
    ),
    "SSD-1B": trained(SDXL),
    **{name: trained(SDXL) for name in ("dreamshaper-xl-1-0", "RealVisXL_V4.0", "RealVisXL_V5.0")},
}
# VAEs that --pretrained_vae_model_name_or_path of the SDXL script takes in place of the pipeline's.
VAES = {
    "sd-vae-ft-mse": trained(SD, why="put in the pipeline's vae folder"),
    "sdxl-vae": trained(SDXL),
    "sdxl-vae-fp16-fix": trained(SDXL),
    "playground-v2.5 VAE": trained(SDXL, why="each channel by its own latents_mean and latents_std"),
}
UNION = "a union ControlNet takes several conditions with their number"
CONTROLNETS = {
    "sd-controlnet-canny": trained(SD, why="depth, hed, mlsd, scribble, ...: the same config"),
    "control_v11p_sd15_canny": trained(SD, why="all of v1.1: the same config"),
    "Depth-Anything-controlnet": trained(SD),
    **{name: trained(SDXL) for name in ("controlnet-canny-sdxl-1.0", "controlnet-depth-sdxl-1.0")},
    "controlnet-union-sdxl-1.0": refused(SDXL, "union", "task_embedding", why=UNION + "; only its tensors show it"),
    "controlnet-union-sdxl-1.0 promax": refused(SDXL, "union", "num_control_type", "8", why=UNION),
    "sd21-photo-background-9-channels": refused(
        SD, "in_channels", "9", why="takes 9 channels, latents with a mask and a masked image"
    ),
    "6-channel ControlNet": refused(
        SD, "conditioning_channels", "6", why="takes conditions of 6 channels; the scripts give RGB images"
    ),
    "1-channel ControlNet": refused(
        SD, "conditioning_channels", "1", why="takes conditions of 1 channel; the scripts give RGB images"
    ),
    "FlaxControlNet-hands": refused(SD, "FlaxControlNetModel", why="weights of Flax; convert them with diffusers"),
    **{name: trained(FLUX) for name in ("FLUX.1-dev-Controlnet-Canny", "Flux.1-dev-Controlnet-Upscaler")},
    "FLUX.1-dev-ControlNet-Union-Pro-2.0": trained(FLUX, why="one condition at a time: it has no mode"),
    "FLUX.1-dev-Controlnet-Union": refused(FLUX, "union", "num_mode", "10", why=UNION),
    "xlabs-style-rgb_v1": refused(
        FLUX,
        "conditioning_embedding_channels",
        "16",
        why="takes its condition as pixels (conditioning_embedding_channels)",
    ),
}
# The pipeline that a ControlNet goes on with.
BASES = {
    **dict.fromkeys((LORA, FLUX), "FLUX.1-dev"), SD: "stable-diffusion-v1-5", SDXL: "stable-diffusion-xl-base-1.0",
    "sd21-photo-background-9-channels": "stable-diffusion-2-1-base",
}  # fmt: skip

# Files that are not as today's libraries write them: what they are, what becomes of them, and the test that shows it.
FILES = {
    "fp16 files beside or instead of the plain ones": ("read with `--variant fp16`", "test_sd.py::test_its_fp16_files"),
    "a variant that one part lacks": (
        "the plain file is read, and the run says so",
        "test_sd.py::test_the_variant_where_one_part_has_only_the_plain_file",
    ),
    "only fp16 files, without the flag": (
        "refused: add `--variant fp16`",
        "test_refused.py::test_only_fp16_files_without_the_flag",
    ),
    "shards with their index": ("read", "test_sd.py::test_shards"),
    "VAE attention named query, key, value, proj_attn, [C, C] or [C, C, 1, 1]": (
        "read", "test_sd.py::test_attention_of_the_vae_as_convolutions",
    ),
    "T5's embedding as shared.weight, encoder.embed_tokens.weight or both": (
        "read", "test_flux.py::test_t5s_embedding_by_either_name",
    ),
    "tensors that the model does not have": (
        "named, not used", "test_sd.py::test_tensors_that_the_model_does_not_have_are_named",
    ),
    "fp8 tensors": ("refused", "test_refused.py::test_fp8_tensors"),
    "bitsandbytes, 4 bits": ("refused", "test_refused.py::test_bitsandbytes_in_4_bits"),
    "one file instead of a folder (GGUF, .safetensors, .ckpt)": (
        "refused",
        "test_refused.py::test_one_file_instead_of_a_folder",
    ),
    "pickles (.bin) alone": ("refused: reading one runs what is written in it", "test_refused.py::test_pickles_alone"),
    "weights of Flax alone": ("refused", "test_refused.py::test_weights_of_flax_alone"),
    "FLUX.1 without tokenizer_2/spiece.model": (
        "tokenizer.json is read; without both refused", "test_flux.py::test_without_its_sentencepiece_model",
    ),
}  # fmt: skip
OWNERS = {
    "black-forest-labs": [name for name in PIPELINES if name.startswith("FLUX.1")],
    "CompVis": ["stable-diffusion-v1-4"],
    "stable-diffusion-v1-5": ["stable-diffusion-v1-5", "stable-diffusion-inpainting"],
    "stabilityai": [
        "stable-diffusion-2", "stable-diffusion-2-1", "stable-diffusion-2-1-base", "stable-diffusion-2-inpainting",
        "stable-diffusion-xl-base-1.0", "sdxl-turbo", "sd-vae-ft-mse", "sdxl-vae",
    ],
    "prompthero": ["openjourney"],
    "gsdf": ["Counterfeit-V2.5"],
    "SG161222": ["Realistic_Vision_V5.1_noVAE", "RealVisXL_V4.0", "RealVisXL_V5.0"],
    "stablediffusionapi": ["realistic-vision-v51"],
    "playgroundai": ["playground-v2.5-1024px-aesthetic"],
    "segmind": ["SSD-1B"],
    "Lykon": ["dreamshaper-xl-1-0"],
    "madebyollin": ["sdxl-vae-fp16-fix"],
    "lllyasviel": ["sd-controlnet-canny", "control_v11p_sd15_canny"],
    "LiheYoung": ["Depth-Anything-controlnet"],
    "diffusers": ["controlnet-canny-sdxl-1.0", "controlnet-depth-sdxl-1.0"],
    "xinsir": ["controlnet-union-sdxl-1.0"],
    "InstantX": ["FLUX.1-dev-Controlnet-Canny", "FLUX.1-dev-Controlnet-Union"],
    "jasperai": ["Flux.1-dev-Controlnet-Upscaler"],
    "Shakker-Labs": ["FLUX.1-dev-ControlNet-Union-Pro-2.0"],
}  # fmt: skip
