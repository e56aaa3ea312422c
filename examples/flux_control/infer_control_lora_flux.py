"""Generates images that follow a condition, with FLUX.1 and a Control-LoRA from train_control_lora_flux.py.

    python infer_control_lora_flux.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora out \\
        --prompt "a red circle on a blue background" --control_image outline.png --seed 0 --mixed_precision bf16 \\
        --output circle.png

FLUX.1-Depth-dev and FLUX.1-Canny-dev need no LoRA. With --fill, also for FLUX.1-Fill-dev, the white parts of
--mask_image are filled in --control_image. Prompts and condition images are matched as in validation during training:
one image for all prompts, one prompt for all images, or pairs. Several images are saved as circle-1.png, circle-2.png
... and in a labelled grid, circle.png. A row of the grid starts with its condition image.
"""

import argparse

from mindtune.cli import UserError, run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import inference_flags
from mindtune.models import control_lora, execution, lora, lora_files, pipelines, precision, sampling
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    inference_flags.model(parser, "FLUX.1")
    inference_flags.lora(parser)
    inference_flags.conditions(parser, 512, "a multiple of 16")
    add = parser.add_argument
    add("--fill", action="store_true", help="Fill the masked parts of --control_image.")
    add(
        "--mask_image",
        nargs="+",
        default=[],
        help="With --fill, paths of masks: one per row of prompt and image, or one for all. White is filled.",
    )
    inference_flags.flux_sampling(parser, guidance_scale=3.5)
    inference_flags.output(parser, "flux-control.png", int8=True)
    return parser.parse_args(argv)


# ---- checks --------------------------------------------------------------------------------------


def check_flags(args):
    """Raises UserError for a value that is not allowed."""
    inference.require_side("--resolution", args.resolution, multiple=16, least=16)
    inference.require_positive(
        num_images_per_prompt=args.num_images_per_prompt, num_inference_steps=args.num_inference_steps
    )
    inference.require_t5_length(args.max_sequence_length)
    if args.fill != bool(args.mask_image):
        given, missing = ("--fill", "--mask_image") if args.fill else ("--mask_image", "--fill")
        raise UserError(f"{given}: needs {missing}. Add it, or leave this out.")


def find_rows(args):
    """Returns (prompt, condition image, mask or None) for every row of the grid. Raises UserError."""
    pairs = inference.pair_conditions(args.prompt, args.control_image, args.resolution, multiple=16)
    return inference.pair_masks(pairs, args.mask_image) if args.fill else [(*pair, None) for pair in pairs]


def require_condition_input(args, root, adapters):
    """Raises UserError if nothing would read the condition: a text-to-image model without a Control-LoRA."""
    if not control_lora.is_widened(root, args.fill):
        return
    if args.lora:
        control_lora.require_input_layer("--lora", adapters)
    else:
        raise UserError(
            f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: a text-to-image model, which reads "
            "no condition. Add --lora with a Control-LoRA."
        )


# ---- inference -----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    found = find_rows(args)
    output, singles = grids.output_files(args.output, len(found) * args.num_images_per_prompt, args.overwrite)
    lora_path = lora_files.find_lora(args.lora, "--lora") if args.lora else None
    adapters = lora_files.read_adapters(lora_path, "--lora", biases=True) if lora_path else {}
    execution.set_up_device(graph_mode=False)
    root = inference.find_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.FLUX_COMPONENTS,
        args.hub,
        task="fill" if args.fill else "control",
    )
    layers = {"transformer": control_lora.linear_layers(root, args.fill)}
    lora_files.check_adapters(lora_path, "--lora", adapters, layers)
    require_condition_input(args, root, adapters)

    # Encode the prompts in a child process. Its memory is freed before the transformer loads.
    dtypes = precision.resolve_precision(args.mixed_precision)
    int8 = args.base_precision == "int8"
    with inference.prompt_cache(args.cache_dir) as folder:
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, int8=int8)
        texts = inference.encode_for_flux(stage, args.prompt)

    # Load the models, widen the input layer and add the LoRA.
    transformer = control_lora.load_transformer(root, args.fill, dtypes, args.variant, int8)
    if lora_path:  # its norms move by --lora_scale, too
        lora.load_lora(lora_path, {"transformer": transformer}, dtypes.compute, scale=args.lora_scale)
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
        for prompt, image, mask in found:
            inputs = sampling.encode_condition(sampler.vae, image, mask, dtypes.compute)
            size = image.height, image.width
            images = [
                sampler.sample(texts[prompt], size, n, condition=inputs) for n in range(args.num_images_per_prompt)
            ]
            rows.append(inference.Row(prompt, images, image))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
