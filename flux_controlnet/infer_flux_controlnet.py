"""Generates images with FLUX.1 and a ControlNet from train_controlnet_flux.py.

    python infer_flux_controlnet.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --controlnet out \\
        --prompt "a red circle on a blue background" --control_image outline.png --seed 0 --mixed_precision bf16 \\
        --output circle.png

Prompts and condition images are matched as in validation during training: one image for all prompts, one prompt for
all images, or pairs. Several images are saved as circle-1.png, circle-2.png ... and in a labelled grid, circle.png. A
row of the grid starts with its condition image.
"""

import argparse

from mindtune import rng
from mindtune.cli import run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import configs, execution, loading, pipelines, precision, sampling
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Directory or hub id of a FLUX.1 pipeline.")
    inference.add_hub(add)
    add("--variant", help="Variant of the weight files, such as fp16. Default: the files without a variant.")
    add(
        "--cache_dir",
        help="Directory for hub downloads and encoded prompts. Default: the hub's cache, prompts are not kept.",
    )
    add("--controlnet", required=True, help="Directory of a ControlNet (config.json and weights), or a hub id.")
    add(
        "--controlnet_conditioning_scale",
        type=float,
        default=1.0,
        help="Strength of the ControlNet. 0: the base model alone. Default: 1, as in training.",
    )
    add("--prompt", nargs="+", required=True, help="One or more prompts.")
    add(
        "--control_image",
        nargs="+",
        required=True,
        help="Paths of condition images: one per prompt, one for all prompts, or several for one prompt.",
    )
    add(
        "--num_images_per_prompt",
        type=int,
        default=1,
        help="Number of images per prompt and condition, each from other noise. Default: 1.",
    )
    add(
        "--resolution",
        type=int,
        default=512,
        help="Shorter side of the images in pixels, a multiple of 16. Default: 512.",
    )
    add("--num_inference_steps", type=int, default=28, help="Number of denoising steps. Default: 28.")
    add(
        "--guidance_scale",
        type=float,
        default=3.5,
        help="Guidance input of a guidance-distilled transformer. Default: 3.5.",
    )
    add(
        "--max_sequence_length",
        type=int,
        default=512,
        help="Number of T5 tokens per prompt, at most 512. Default: 512.",
    )
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default="no",
        help="Dtype of the weights and of the computation. Default: no, which is fp32.",
    )
    add(
        "--base_precision",
        choices=["same", "int8"],
        default="same",
        help="Weights of the transformer and T5. int8: quantized. Default: same, the dtype of --mixed_precision.",
    )
    add("--seed", type=int, default=0, help="Seed of the noise. Default: 0.")
    add(
        "--output",
        default="flux-controlnet.png",
        help="PNG file for the image or the grid. Default: flux-controlnet.png.",
    )
    add("--overwrite", action="store_true", help="Replace existing files.")
    return parser.parse_args(argv)


# ---- checks --------------------------------------------------------------------------------------


def check_flags(args):
    """Raises UserError for a value that is not allowed."""
    inference.require_side("--resolution", args.resolution, multiple=16, least=16)
    inference.require_positive(
        num_images_per_prompt=args.num_images_per_prompt, num_inference_steps=args.num_inference_steps
    )
    inference.require_t5_length(args.max_sequence_length)


# ---- inference -----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    pairs = inference.pair_conditions(args.prompt, args.control_image, args.resolution, multiple=16)
    output, singles = grids.output_files(args.output, len(pairs) * args.num_images_per_prompt, args.overwrite)
    execution.set_up_device(graph_mode=False)
    root = inference.find_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.FLUX_COMPONENTS,
        args.hub,
    )
    controlnet_folder = inference.find_controlnet(args.controlnet, args.cache_dir, root, "transformer", args.hub)

    # Encode the prompts in a child process. Its memory is freed before the transformer loads.
    dtypes = precision.resolve_precision(args.mixed_precision)
    int8 = args.base_precision == "int8"
    with inference.prompt_cache(args.cache_dir) as folder:
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, int8=int8)
        stage.prepare(args.prompt, [])
        texts = {prompt: stage.text(prompt) for prompt in args.prompt}

    # Load the models.
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, int8)
    controlnet = loading.load_model(controlnet_folder.parent, controlnet_folder.name, dtypes)
    vae = loading.load_model(root, "vae", dtypes, args.variant)
    scheduler = configs.read_config(root, "scheduler")

    # Generate and save the images.
    def generate(prompt, condition_latents, number):
        latents = sampling.sample_latents(
            transformer,
            scheduler,
            prompt_embeds=texts[prompt]["prompt_embeds"][None],
            pooled_prompt_embeds=texts[prompt]["pooled_prompt_embeds"][None],
            noise=rng.normal(args.seed, "validation", number, shape=condition_latents.shape),
            steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            compute=dtypes.compute,
            control=(controlnet, condition_latents, args.controlnet_conditioning_scale),
        )
        return sampling.decode_latents(vae, latents, dtypes.compute)[0]

    rows = []
    with execution.pynative():
        for prompt, condition in pairs:
            condition_latents = sampling.encode_image(vae, condition, dtypes.compute)
            images = [generate(prompt, condition_latents, n) for n in range(args.num_images_per_prompt)]
            rows.append(inference.Row(prompt, images, condition))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
