"""Generates images with FLUX.1 and a ControlNet from train_controlnet_flux.py.

    python infer_flux_controlnet.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --controlnet out \\
        --prompt "a red circle on a blue background" --control_image outline.png --seed 0 --mixed_precision bf16 \\
        --output circle.png

Prompts and condition images are matched as in validation during training: one image for all prompts, one prompt for
all images, or pairs. Several images are saved as circle-1.png, circle-2.png ... and in a labelled grid, circle.png. A
row of the grid starts with its condition image.
"""

import argparse

from mindtune.cli import run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import inference_flags
from mindtune.models import execution, loading, pipelines, precision
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    inference_flags.model(parser, "FLUX.1")
    inference_flags.controlnet(parser)
    inference_flags.conditions(parser, 512, "a multiple of 16")
    inference_flags.flux_sampling(parser, guidance_scale=3.5)
    inference_flags.output(parser, "flux-controlnet.png", int8=True)
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
        texts = inference.encode_for_flux(stage, args.prompt)

    # Load the models.
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, int8)
    controlnet = loading.load_model(controlnet_folder.parent, controlnet_folder.name, dtypes)
    sampler = inference.FluxSampler(
        root,
        transformer,
        dtypes,
        args.variant,
        seed=args.seed,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )

    # Generate and save the images.
    rows = []
    with execution.pynative():
        for prompt, condition in pairs:
            control = controlnet, sampler.encode(condition), args.controlnet_conditioning_scale
            size = condition.height, condition.width
            images = [
                sampler.sample(texts[prompt], size, n, control=control) for n in range(args.num_images_per_prompt)
            ]
            rows.append(inference.Row(prompt, images, condition))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
