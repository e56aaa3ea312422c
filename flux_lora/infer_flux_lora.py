"""Pictures from FLUX.1 with a LoRA of train_dreambooth_lora_flux.py, or of another tool (docs/flux_lora.md).

    python infer_flux_lora.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora out/pytorch_lora_weights.safetensors \\
        --prompt "a photo of sks dog on a beach" --seed 0 --mixed_precision bf16 --output dog.png

Several prompts or --num_images_per_prompt also leave dog-1.png, dog-2.png ... and a labelled grid as dog.png; --compare adds a row
without the adapter, from the same noise.
"""

import argparse
import tempfile
from pathlib import Path

from mindtune import files, rng
from mindtune.cli import UserError, run
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.text_encoders import clip_pooled
from mindtune.models import configs, execution, loading, lora, lora_files, pipelines, precision, sampling, tokenization
from mindtune.models.weights import linear_layers


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Directory of a FLUX.1 pipeline, or a hub id.")
    add("--revision", help="Branch, tag or commit on the hub. Default: main.")
    add("--variant", help="Variant of the weight files, such as fp16. Default: none.")
    add("--cache_dir", help="Where hub downloads and encoded prompts are kept. Default: the hub's cache, and nowhere.")
    add(
        "--lora", help="The adapter, a .safetensors file or the directory that holds it. Default: the base model alone."
    )
    add("--lora_scale", type=float, default=1.0, help="Strength of the adapter.")
    add("--prompt", nargs="+", required=True, help="What to draw, one or more prompts.")
    add("--num_images_per_prompt", type=int, default=1, help="Pictures a prompt, each from its own noise.")
    add("--compare", action="store_true", help="Draw every prompt without the adapter too.")
    add("--height", type=int, default=512, help="In pixels; divisible by 16.")
    add("--width", type=int, default=512, help="In pixels; divisible by 16.")
    add("--num_inference_steps", type=int, default=28, help="Steps of sampling.")
    add("--guidance_scale", type=float, default=3.5, help="Guidance given to a guidance-distilled transformer.")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens of a prompt, at most 512.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="Type of weights and of computation.")
    add(
        "--base_precision",
        choices=["same", "int8"],
        default="same",
        help="int8: the transformer and T5 in one byte a weight.",
    )
    add("--seed", type=int, default=0, help="Seed of the noise.")
    add("--output", default="flux-lora.png", help="The picture, or the grid of several.")
    add("--overwrite", action="store_true", help="Replace pictures that are already there.")
    args = parser.parse_args(argv)

    for name in ("height", "width"):
        if getattr(args, name) % 16 or getattr(args, name) < 16:
            raise UserError(f"--{name} {getattr(args, name)}: must be divisible by 16.")
    for name in ("num_images_per_prompt", "num_inference_steps", "max_sequence_length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: T5 was trained on at most 512 tokens here; use 512 or less."
        )
    if args.compare and not args.lora:
        raise UserError("--compare needs --lora: there is nothing to compare with.")
    return args


def main(argv=None):
    # ---- check everything ------------------------------------------------------------------------
    args = parse_args(argv)
    pictures = len(args.prompt) * args.num_images_per_prompt * (2 if args.compare else 1)
    output, singles = grids.output_files(args.output, pictures, args.overwrite)
    files.require_writable("--cache_dir", args.cache_dir)
    adapter = lora_files.find_lora(args.lora, "--lora") if args.lora else None
    parts = lora_files.read_adapters(adapter, "--lora") if adapter else {}
    adapts_clip = "text_encoder" in parts
    execution.set_up_device(graph_mode=False)
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, pipelines.FLUX_COMPONENTS
    )
    loading.check_files(root, pipelines.FLUX_COMPONENTS, args.variant)
    if adapter:
        layers = {name: linear_layers(root, name, args.variant) for name in ("transformer", "text_encoder")}
        lora_files.check_adapters(adapter, "--lora", parts, layers)

    # ---- encode the prompts, in a process that gives its memory back -----------------------------
    kind, int8 = precision.resolve_precision(args.mixed_precision), args.base_precision == "int8"
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(args.cache_dir, "mindtune") if args.cache_dir else Path(nowhere)
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, int8=int8)
        stage.prepare(args.prompt, [])
        texts = [stage.text(prompt) for prompt in args.prompt]

    # ---- load, add the adapter -------------------------------------------------------------------
    cells = {"transformer": loading.load_model(root, "transformer", kind, args.variant, int8)}
    if adapts_clip:
        cells["text_encoder"] = loading.load_model(root, "text_encoder", kind, args.variant)
        tokenizer = tokenization.load_tokenizer(root / "tokenizer")
    if adapter:
        lora.load_lora(adapter, cells, kind.compute, scale=args.lora_scale)
    vae, vae_config = loading.load_model(root, "vae", kind, args.variant), configs.read_config(root, "vae")
    scheduler = configs.read_config(root, "scheduler")

    # ---- draw ------------------------------------------------------------------------------------
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    shape = (1, vae_config["latent_channels"], args.height // factor, args.width // factor)

    def draw(prompt, text, number):
        noise = rng.normal(args.seed, "validation", number, shape=shape)
        pooled = clip_pooled(cells["text_encoder"], tokenizer, prompt) if adapts_clip else text["pooled_prompt_embeds"]
        latents = sampling.sample_latents(
            cells["transformer"], scheduler, text["prompt_embeds"][None], pooled[None], noise,
            args.num_inference_steps, args.guidance_scale, kind.compute,
        )  # fmt: skip
        return sampling.decode_latents(vae, latents, kind.compute)[0]

    rows, labels = [], []
    with execution.pynative():
        for prompt, text in zip(args.prompt, texts):
            for adapted in (False, True) if args.compare else (True,):
                for cell in cells.values():
                    lora.enable_lora(cell, adapted)
                rows.append([draw(prompt, text, number) for number in range(args.num_images_per_prompt)])
                labels.append(f"{prompt} ({'adapter' if adapted else 'base'})" if args.compare else prompt)

    # ---- save ------------------------------------------------------------------------------------
    for path, image in zip(singles, (image for row in rows for image in row)):
        print(grids.save_image(image, path))
    print(grids.save_image(grids.image_grid(rows, labels) if singles else rows[0][0], output))
    return 0


if __name__ == "__main__":
    run(main)
