"""Pictures from Stable Diffusion (1.5 and 2) that follow a condition picture, with a ControlNet that train_controlnet.py made.

    python infer_controlnet.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --controlnet out \\
        --prompt "red circle with blue background" --control_image outline.png --seed 0 --mixed_precision fp16 --output circle.png

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
    add("--pretrained_model_name_or_path", required=True, help="Directory of a Stable Diffusion pipeline, or a hub id.")
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
    add("--resolution", type=int, default=512, help="Shorter side of the pictures, in pixels; divisible by 8.")
    add("--num_inference_steps", type=int, default=20, help="Steps of sampling.")
    add("--guidance_scale", type=float, default=7.5, help="Strength of the prompt (classifier-free guidance); 1: none.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Type of weights and of computation.")
    add("--seed", type=int, default=0, help="Seed of the noise.")
    add("--output", default="controlnet.png", help="The picture, or the grid of several.")
    add("--overwrite", action="store_true", help="Replace pictures that are already there.")
    args = parser.parse_args(argv)

    if args.resolution % 8 or args.resolution < 64:
        raise UserError(f"--resolution {args.resolution}: must be divisible by 8, and 64 at least.")
    for name in ("num_images_per_prompt", "num_inference_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    return args


def main(argv=None):
    # ---- check everything ------------------------------------------------------------------------
    args = parse_args(argv)
    pairs = matched(args.prompt, args.control_image, "--prompt", "--control_image")
    conditions = [conditions.condition_image(path, "--control_image", args.resolution, 8) for _, path in pairs]
    output, singles = grids.output_files(args.output, len(pairs) * args.num_images_per_prompt, args.overwrite)
    files.require_writable("--cache_dir", args.cache_dir)
    execution.set_up_device(graph_mode=False)
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, pipelines.SD_COMPONENTS
    )
    loading.check_files(root, pipelines.SD_COMPONENTS, args.variant)
    folder = pipelines.resolve_controlnet(
        args.controlnet, "--controlnet", args.cache_dir, configs.read_config(root, "unet")
    )
    loading.check_files(folder.parent, [folder.name])

    # ---- encode the prompts, in a process that gives its memory back -----------------------------
    kind = precision.resolve_precision(args.mixed_precision)
    with tempfile.TemporaryDirectory() as nowhere:
        stage = EncoderStage(
            root, args.variant, args.mixed_precision, Path(args.cache_dir or nowhere, "mindtune"), 77, system="sd"
        )
        stage.prepare([*args.prompt, ""], [])
        texts, empty = {prompt: stage.text(prompt) for prompt in args.prompt}, stage.unconditional()

    # ---- load ------------------------------------------------------------------------------------
    unet = loading.load_model(root, "unet", kind, args.variant)
    controlnet = loading.load_model(folder.parent, folder.name, kind)
    vae, scheduler = stage.load_vae(), configs.read_config(root, "scheduler")
    vae_compute = precision.resolve_precision(stage.vae_precision).compute

    # ---- draw ------------------------------------------------------------------------------------
    def draw(text, pixels, number):
        noise = rng.normal(args.seed, "validation", number, shape=sampling.latent_shape(vae, pixels))
        drawn = sampling.sample_unet_latents(
            unet, scheduler, text, empty, noise, args.num_inference_steps, args.guidance_scale, kind.compute,
            (controlnet, pixels, args.controlnet_conditioning_scale),
        )  # fmt: skip
        return sampling.decode_latents(vae, drawn, vae_compute)[0]

    rows = []
    with execution.pynative():
        for (prompt, _), condition in zip(pairs, conditions):
            pixels = conditions.condition_pixels(condition)
            rows.append([draw(texts[prompt], pixels, number) for number in range(args.num_images_per_prompt)])

    # ---- save ------------------------------------------------------------------------------------
    for path, image in zip(singles, (image for row in rows for image in row)):
        print(grids.save_image(image, path))
    grid = [[condition, *row] for condition, row in zip(conditions, rows)]
    print(grids.save_image(grids.image_grid(grid, [p for p, _ in pairs]) if singles else rows[0][0], output))
    return 0


if __name__ == "__main__":
    run(main)
