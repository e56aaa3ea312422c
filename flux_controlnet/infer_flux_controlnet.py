"""Pictures from FLUX.1 that follow a condition picture, with a ControlNet that train_controlnet_flux.py made.

    python infer_flux_controlnet.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --controlnet out \\
        --prompt "a red circle on a blue background" --control_image outline.png --seed 0 --mixed_precision bf16 --output circle.png

Several prompts or pictures go together as in training: one picture for all prompts, one prompt for all pictures, or pairs. More than
one picture also leaves circle-1.png, circle-2.png ... and a labelled grid as circle.png, each row begun by its condition.
"""

import argparse
import tempfile
from pathlib import Path

from mindtune import files, rng
from mindtune.cli import UserError, matched, run
from mindtune.data import conditions, grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.models import configs, execution, loading, pipelines, precision, sampling


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Directory of a FLUX.1 pipeline, or a hub id.")
    add("--revision", help="Branch, tag or commit on the hub. Default: main.")
    add("--variant", help="Variant of the weight files, such as fp16. Default: none.")
    add("--cache_dir", help="Where hub downloads and encoded prompts are kept. Default: the hub's cache, and nowhere.")
    add("--controlnet", required=True, help="The directory of a ControlNet (config.json and weights), or a hub id.")
    add(
        "--controlnet_conditioning_scale",
        type=float,
        default=1.0,
        help="Strength of the ControlNet; 0: the base model alone.",
    )
    add("--prompt", nargs="+", required=True, help="What to draw, one or more prompts.")
    add(
        "--control_image",
        nargs="+",
        required=True,
        help="Condition pictures: one for all prompts, one each, or several for one prompt.",
    )
    add("--num_images_per_prompt", type=int, default=1, help="Pictures a pair, each from its own noise.")
    add("--resolution", type=int, default=512, help="Shorter side of the pictures, in pixels; divisible by 16.")
    add("--num_inference_steps", type=int, default=28, help="Steps of sampling.")
    add("--guidance_scale", type=float, default=3.5, help="Guidance given to guidance-distilled models.")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens of a prompt, at most 512.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Type of weights and of computation.")
    add(
        "--base_precision",
        choices=["same", "int8"],
        default="same",
        help="int8: the transformer and T5 in one byte a weight.",
    )
    add("--seed", type=int, default=0, help="Seed of the noise.")
    add("--output", default="flux-controlnet.png", help="The picture, or the grid of several.")
    add("--overwrite", action="store_true", help="Replace pictures that are already there.")
    args = parser.parse_args(argv)

    if args.resolution % 16 or args.resolution < 16:
        raise UserError(f"--resolution {args.resolution}: must be divisible by 16.")
    for name in ("num_images_per_prompt", "num_inference_steps", "max_sequence_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: T5 was trained on at most 512 tokens here; use 512 or less."
        )
    return args


def main(argv=None):
    # ---- check everything ------------------------------------------------------------------------
    args = parse_args(argv)
    pairs = matched(args.prompt, args.control_image, "--prompt", "--control_image")
    conditions = [conditions.condition_image(path, "--control_image", args.resolution) for _, path in pairs]
    output, singles = grids.output_files(args.output, len(pairs) * args.num_images_per_prompt, args.overwrite)
    files.require_writable("--cache_dir", args.cache_dir)
    execution.set_up_device(graph_mode=False)
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, pipelines.FLUX_COMPONENTS
    )
    loading.check_files(root, pipelines.FLUX_COMPONENTS, args.variant)
    folder = pipelines.resolve_controlnet(
        args.controlnet, "--controlnet", args.cache_dir, configs.read_config(root, "transformer")
    )
    loading.check_files(folder.parent, [folder.name])

    # ---- encode the prompts, in a process that gives its memory back -----------------------------
    kind, int8 = precision.resolve_precision(args.mixed_precision), args.base_precision == "int8"
    with tempfile.TemporaryDirectory() as nowhere:
        cache = Path(args.cache_dir or nowhere, "mindtune")
        stage = EncoderStage(root, args.variant, args.mixed_precision, cache, args.max_sequence_length, int8=int8)
        stage.prepare(args.prompt, [])
        texts = {prompt: stage.text(prompt) for prompt in args.prompt}

    # ---- load ------------------------------------------------------------------------------------
    transformer = loading.load_model(root, "transformer", kind, args.variant, int8)
    controlnet = loading.load_model(folder.parent, folder.name, kind)
    vae, scheduler = loading.load_model(root, "vae", kind, args.variant), configs.read_config(root, "scheduler")

    # ---- draw ------------------------------------------------------------------------------------
    def draw(text, latents, number):
        noise = rng.normal(args.seed, "validation", number, shape=latents.shape)
        drawn = sampling.sample_latents(
            transformer, scheduler, text["prompt_embeds"][None], text["pooled_prompt_embeds"][None], noise, args.num_inference_steps,
            args.guidance_scale, kind.compute, control=(controlnet, latents, args.controlnet_conditioning_scale),
        )  # fmt: skip
        return sampling.decode_latents(vae, drawn, kind.compute)[0]

    rows = []
    with execution.pynative():
        for (prompt, _), condition in zip(pairs, conditions):
            latents = sampling.encode_image(vae, condition, kind.compute)
            rows.append([draw(texts[prompt], latents, number) for number in range(args.num_images_per_prompt)])

    # ---- save ------------------------------------------------------------------------------------
    for path, image in zip(singles, (image for row in rows for image in row)):
        print(grids.save_image(image, path))
    grid = [[condition, *row] for condition, row in zip(conditions, rows)]
    print(grids.save_image(grids.image_grid(grid, [p for p, _ in pairs]) if singles else rows[0][0], output))
    return 0


if __name__ == "__main__":
    run(main)
