"""Edits images with FLUX.1-Kontext and a LoRA from train_lora_flux_kontext.py or another tool.

    python infer_flux_kontext.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-Kontext-dev --lora out \\
        --image photo.png --prompt "make it a pencil drawing" --seed 0 --mixed_precision bf16 --output drawing.png

Prompts and images are matched as in validation during training: one image for all prompts, one prompt for all images,
or pairs. An edited image has the size of its source; without --image it is drawn from the prompt alone. Several images
are saved as drawing-1.png, drawing-2.png ... and in a labelled grid, drawing.png, whose rows start with the source.
--compare adds a row without the LoRA for every one, from the same noise.
"""

import argparse

from mindtune.cli import UserError, run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.flags import inference_flags
from mindtune.models import execution, loading, lora, lora_files, pipelines, precision
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    inference_flags.model(parser, "FLUX.1-Kontext")
    inference_flags.lora(parser)
    inference_flags.prompts(parser, "prompt and image")
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        default=[],
        help="Paths of images to edit: one per prompt, one for all, or several for one prompt. Default: none.",
    )
    add("--compare", action="store_true", help="Also generate every image without the LoRA.")
    inference_flags.shorter_side(parser, 512, "a multiple of 16")
    add("--height", type=int, help="Without --image: height in pixels, a multiple of 16. Default: --resolution.")
    add("--width", type=int, help="Without --image: width in pixels, a multiple of 16. Default: --resolution.")
    inference_flags.flux_sampling(parser, guidance_scale=2.5)
    inference_flags.output(parser, "flux-kontext.png", int8=True)
    return parser.parse_args(argv)


# ---- checks --------------------------------------------------------------------------------------


def check_flags(args):
    """Raises UserError for a value that is not allowed."""
    for name in ("resolution", "height", "width"):
        side = getattr(args, name)
        if side is not None:
            inference.require_side(f"--{name}", side, multiple=16, least=16)
        if side is not None and name != "resolution" and args.image:
            raise UserError(f"--{name} {side}: an edited image has the shape of --image. Give --resolution instead.")
    inference.require_positive(
        num_images_per_prompt=args.num_images_per_prompt, num_inference_steps=args.num_inference_steps
    )
    inference.require_t5_length(args.max_sequence_length)
    if args.compare and not args.lora:
        raise UserError("--compare needs --lora: there is nothing to compare with.")


def find_rows(args):
    """Returns (prompt, image to edit or None, size as (height, width)) for every row of the grid. Raises UserError."""
    if not args.image:
        size = args.height or args.resolution, args.width or args.resolution
        return [(prompt, None, size) for prompt in args.prompt]
    pairs = inference.pair_conditions(args.prompt, args.image, args.resolution, multiple=16, flag="--image")
    return [(prompt, image, (image.height, image.width)) for prompt, image in pairs]


# ---- inference -----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    found = find_rows(args)
    count = len(found) * args.num_images_per_prompt * (2 if args.compare else 1)
    output, singles = grids.output_files(args.output, count, args.overwrite)
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
        task="kontext",
    )
    lora_files.check_adapters(
        lora_path, "--lora", adapters, {"transformer": loading.linear_layers(root, "transformer")}
    )

    # Encode the prompts in a child process. Its memory is freed before the transformer loads.
    dtypes = precision.resolve_precision(args.mixed_precision)
    int8 = args.base_precision == "int8"
    with inference.prompt_cache(args.cache_dir) as folder:
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, int8=int8)
        texts = inference.encode_for_flux(stage, args.prompt)

    # Load the models and add the LoRA.
    transformer = loading.load_model(root, "transformer", dtypes, args.variant, int8)
    if lora_path:
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

    # Edit and save the images.
    rows = []
    with execution.pynative():
        for prompt, image, size in found:
            source = sampler.encode(image) if image else None
            for label in inference.adapter_labels(prompt, [transformer], args.compare):
                images = [
                    sampler.sample(texts[prompt], size, number, source=source)
                    for number in range(args.num_images_per_prompt)
                ]
                rows.append(inference.Row(label, images, image))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
