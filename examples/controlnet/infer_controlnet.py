"""Generates images with Stable Diffusion 1.5 or 2 and a ControlNet from train_controlnet.py.

    python infer_controlnet.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --controlnet out --prompt "red circle with blue background" --control_image outline.png --seed 0 \\
        --mixed_precision fp16 --output circle.png

Prompts and condition images are matched as in validation during training: one image for all prompts, one prompt for
all images, or pairs. Several images are saved as circle-1.png, circle-2.png ... and in a labelled grid, circle.png. A
row of the grid starts with its condition image.
"""

import argparse

from mindtune.cli import run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import inference_flags
from mindtune.models import execution, pipelines
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    inference_flags.model(parser, "Stable Diffusion 1 or 2")
    inference_flags.controlnet(parser)
    inference_flags.conditions(parser, 512, "a multiple of 8, at least 64")
    inference_flags.unet_sampling(parser, guidance_scale=7.5)
    inference_flags.output(parser, "controlnet.png")
    return parser.parse_args(argv)


# ---- checks --------------------------------------------------------------------------------------


def check_flags(args):
    """Raises UserError for a value that is not allowed."""
    inference.require_side("--resolution", args.resolution, multiple=8, least=64)
    inference.require_positive(
        num_images_per_prompt=args.num_images_per_prompt, num_inference_steps=args.num_inference_steps
    )


# ---- inference -----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    pairs = inference.pair_conditions(args.prompt, args.control_image, args.resolution, multiple=8)
    output, singles = grids.output_files(args.output, len(pairs) * args.num_images_per_prompt, args.overwrite)
    execution.set_up_device(graph_mode=False)
    root = inference.find_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.SD_COMPONENTS,
        args.hub,
    )
    controlnet_folder = inference.find_controlnet(args.controlnet, args.cache_dir, root, "unet", args.hub)

    settings = inference.Settings(
        seed=args.seed,
        count=args.num_images_per_prompt,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        conditioning_scale=args.controlnet_conditioning_scale,
    )

    # Encode the prompts in a child process. Its memory is freed before the UNet loads.
    with inference.prompt_cache(args.cache_dir) as folder:
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, max_sequence_length=77, system="sd")
        texts, unconditional = inference.encode_for_unet(stage, args.prompt)

    # Load the models, generate and save the images.
    sampler = inference.UNetSampler(stage, controlnet_folder, unconditional, settings)
    rows = [inference.Row(prompt, sampler.sample(texts[prompt], condition), condition) for prompt, condition in pairs]
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
