"""Flags of the inference scripts, which are plain argparse: they declare no bounds and are not resumed."""

from __future__ import annotations

import argparse
from typing import Any

from mindtune.models import hubs


def hub(add: Any) -> None:
    """The hub of models. `add` is the `add_argument` of a parser."""
    add(
        "--hub",
        choices=list(hubs.HUBS),
        default=hubs.default(),
        help="Where the models of hub ids are. Default: MINDTUNE_HUB, or huggingface.",
    )
    add("--revision", help="Branch, tag or commit on the hub. Default: main, on ModelScope master.")


def model(parser: argparse.ArgumentParser, pipeline: str) -> None:
    """The base model. `pipeline` names the supported pipeline in the help line, such as FLUX.1."""
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help=f"Directory or hub id of a {pipeline} pipeline.")
    hub(add)
    add("--variant", help="Variant of the weight files, such as fp16. Default: the files without a variant.")
    add(
        "--cache_dir",
        help="Directory for hub downloads and encoded prompts. Default: the hub's cache, prompts are not kept.",
    )


def lora(parser: argparse.ArgumentParser) -> None:
    """The adapter."""
    add = parser.add_argument
    add("--lora", help="The LoRA, a .safetensors file or its directory. Default: none, the base model alone.")
    add("--lora_scale", type=float, default=1.0, help="Strength of the LoRA. Default: 1, as in training.")


def controlnet(parser: argparse.ArgumentParser) -> None:
    """The ControlNet."""
    add = parser.add_argument
    add("--controlnet", required=True, help="Directory of a ControlNet (config.json and weights), or a hub id.")
    add(
        "--controlnet_conditioning_scale",
        type=float,
        default=1.0,
        help="Strength of the ControlNet. 0: the base model alone. Default: 1, as in training.",
    )


def prompts(parser: argparse.ArgumentParser, per: str = "prompt") -> None:
    """Prompts. `per` is what every image of a row is sampled for, for the help line."""
    add = parser.add_argument
    add("--prompt", nargs="+", required=True, help="One or more prompts.")
    add(
        "--num_images_per_prompt",
        type=int,
        default=1,
        help=f"Number of images per {per}, each from other noise. Default: 1.",
    )


def conditions(parser: argparse.ArgumentParser, resolution: int, sizes: str) -> None:
    """Prompts with condition images. `sizes` are those that --resolution may have, for its help line."""
    prompts(parser, "prompt and condition")
    parser.add_argument(
        "--control_image",
        nargs="+",
        required=True,
        help="Paths of condition images: one per prompt, one for all prompts, or several for one prompt.",
    )
    shorter_side(parser, resolution, sizes)


def shorter_side(parser: argparse.ArgumentParser, resolution: int, sizes: str) -> None:
    """The size of images that get the shape of another one."""
    parser.add_argument(
        "--resolution",
        type=int,
        default=resolution,
        help=f"Shorter side of the images in pixels, {sizes}. Default: {resolution}.",
    )


def flux_sampling(parser: argparse.ArgumentParser, guidance_scale: float) -> None:
    """How FLUX.1 samples."""
    add = parser.add_argument
    add("--num_inference_steps", type=int, default=28, help="Number of denoising steps. Default: 28.")
    add(
        "--guidance_scale",
        type=float,
        default=guidance_scale,
        help=f"Guidance input of a guidance-distilled transformer. Default: {guidance_scale}.",
    )
    add(
        "--max_sequence_length",
        type=int,
        default=512,
        help="Number of T5 tokens per prompt, at most 512. Default: 512.",
    )


def unet_sampling(parser: argparse.ArgumentParser, guidance_scale: float) -> None:
    """How a UNet samples, with classifier-free guidance."""
    add = parser.add_argument
    add("--num_inference_steps", type=int, default=20, help="Number of denoising steps. Default: 20.")
    add(
        "--guidance_scale",
        type=float,
        default=guidance_scale,
        help=f"Scale of classifier-free guidance. 1: no guidance. Default: {guidance_scale}.",
    )


def output(parser: argparse.ArgumentParser, file: str, int8: bool = False) -> None:
    """Precision, seed and the file that is written. With `int8` the transformer and T5 can be quantized."""
    add = parser.add_argument
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="Dtype of the weights and of the computation. Default: no, which is fp32.",
    )
    if int8:
        add(
            "--base_precision",
            choices=["same", "int8"],
            default="same",
            help="Weights of the transformer and T5. int8: quantized. Default: same, the dtype of --mixed_precision.",
        )
    add("--seed", type=int, default=0, help="Seed of the noise. Default: 0.")
    add("--output", default=file, help=f"PNG file for the image or the grid. Default: {file}.")
    add("--overwrite", action="store_true", help="Replace existing files.")
