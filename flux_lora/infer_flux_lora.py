"""Generates images with FLUX.1 and a LoRA from train_dreambooth_lora_flux.py or another tool.

    python infer_flux_lora.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --lora out/pytorch_lora_weights.safetensors --prompt "a photo of sks dog on a beach" --seed 0 \\
        --mixed_precision bf16 --output dog.png

Several images are saved as dog-1.png, dog-2.png ... and in a labelled grid, dog.png. --compare adds a row without the
LoRA for every prompt, from the same noise. docs/flux_lora.md lists the layouts of other tools that are supported.
"""

import argparse

from mindtune import rng
from mindtune.cli import UserError, run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.text_encoders import clip_pooled
from mindtune.models import (
    configs,
    execution,
    loading,
    lora,
    lora_files,
    pipelines,
    precision,
    sampling,
    tokenization,
)
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
    add("--lora", help="The LoRA, a .safetensors file or its directory. Default: none, the base model alone.")
    add("--lora_scale", type=float, default=1.0, help="Strength of the LoRA. Default: 1, as in training.")
    add("--prompt", nargs="+", required=True, help="One or more prompts.")
    add(
        "--num_images_per_prompt",
        type=int,
        default=1,
        help="Number of images per prompt, each from other noise. Default: 1.",
    )
    add("--compare", action="store_true", help="Also generate every image without the LoRA.")
    add("--height", type=int, default=512, help="Height in pixels, a multiple of 16. Default: 512.")
    add("--width", type=int, default=512, help="Width in pixels, a multiple of 16. Default: 512.")
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
    add("--output", default="flux-lora.png", help="PNG file for the image or the grid. Default: flux-lora.png.")
    add("--overwrite", action="store_true", help="Replace existing files.")
    return parser.parse_args(argv)


# ---- checks --------------------------------------------------------------------------------------


def check_flags(args):
    """Raises UserError for a value that is not allowed."""
    inference.require_side("--height", args.height, multiple=16, least=16)
    inference.require_side("--width", args.width, multiple=16, least=16)
    inference.require_positive(
        num_images_per_prompt=args.num_images_per_prompt, num_inference_steps=args.num_inference_steps
    )
    inference.require_t5_length(args.max_sequence_length)
    if args.compare and not args.lora:
        raise UserError("--compare needs --lora: there is nothing to compare with.")


# ---- inference -----------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    count = len(args.prompt) * args.num_images_per_prompt * (2 if args.compare else 1)
    output, singles = grids.output_files(args.output, count, args.overwrite)
    lora_path = lora_files.find_lora(args.lora, "--lora") if args.lora else None
    adapters = lora_files.read_adapters(lora_path, "--lora") if lora_path else {}
    execution.set_up_device(graph_mode=False)
    root = inference.find_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.FLUX_COMPONENTS,
        args.hub,
    )
    if lora_path:
        layers = {name: loading.linear_layers(root, name) for name in ("transformer", "text_encoder")}
        lora_files.check_adapters(lora_path, "--lora", adapters, layers)
    adapts_clip = "text_encoder" in adapters

    # Encode the prompts in a child process. Its memory is freed before the transformer loads.
    dtypes = precision.resolve_precision(args.mixed_precision)
    int8 = args.base_precision == "int8"
    with inference.prompt_cache(args.cache_dir) as folder:
        stage = EncoderStage(root, args.variant, args.mixed_precision, folder, args.max_sequence_length, int8=int8)
        stage.prepare(args.prompt, [])
        texts = {prompt: stage.text(prompt) for prompt in args.prompt}

    # Load the models and add the LoRA.
    models = {"transformer": loading.load_model(root, "transformer", dtypes, args.variant, int8)}
    if adapts_clip:
        models["text_encoder"] = loading.load_model(root, "text_encoder", dtypes, args.variant)
        tokenizer = tokenization.load_tokenizer(root / "tokenizer")
    if lora_path:
        lora.load_lora(lora_path, models, dtypes.compute, scale=args.lora_scale)
    vae = loading.load_model(root, "vae", dtypes, args.variant)
    scheduler = configs.read_config(root, "scheduler")

    # Generate and save the images.
    channels, factor = configs.latent_layout(vae.config)
    shape = (1, channels, args.height // factor, args.width // factor)

    def generate(prompt, number):
        text = texts[prompt]
        pooled = text["pooled_prompt_embeds"]
        if adapts_clip:
            pooled = clip_pooled(models["text_encoder"], tokenizer, prompt)
        latents = sampling.sample_latents(
            models["transformer"],
            scheduler,
            prompt_embeds=text["prompt_embeds"][None],
            pooled_prompt_embeds=pooled[None],
            noise=rng.normal(args.seed, "validation", number, shape=shape),
            steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            compute=dtypes.compute,
        )
        return sampling.decode_latents(vae, latents, dtypes.compute)[0]

    rows = []
    with execution.pynative():
        for prompt in args.prompt:
            for adapted in (False, True) if args.compare else (True,):
                for model in models.values():
                    lora.enable_lora(model, adapted)
                images = [generate(prompt, number) for number in range(args.num_images_per_prompt)]
                label = f"{prompt} ({'adapter' if adapted else 'base'})" if args.compare else prompt
                rows.append(inference.Row(label, images))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
