"""Generates images with FLUX.1 and a LoRA from train_dreambooth_lora_flux.py or another tool.

    python infer_flux_lora.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --lora out/pytorch_lora_weights.safetensors --prompt "a photo of sks dog on a beach" --seed 0 \\
        --mixed_precision bf16 --output dog.png

Several images are saved as dog-1.png, dog-2.png ... and in a labelled grid, dog.png. --compare adds a row without the
LoRA for every prompt, from the same noise. docs/flux_lora.md lists the layouts of other tools that are supported.
"""

import argparse

from mindtune.cli import UserError, run_script
from mindtune.data import grids
from mindtune.encode.encoder_stage import EncoderStage
from mindtune.encode.text_encoders import clip_pooled
from mindtune.flags import inference_flags
from mindtune.models import (
    execution,
    loading,
    lora,
    lora_files,
    pipelines,
    precision,
    tokenization,
)
from mindtune.run import inference

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    inference_flags.model(parser, "FLUX.1")
    inference_flags.lora(parser)
    inference_flags.prompts(parser)
    add = parser.add_argument
    add("--compare", action="store_true", help="Also generate every image without the LoRA.")
    add("--height", type=int, default=512, help="Height in pixels, a multiple of 16. Default: 512.")
    add("--width", type=int, default=512, help="Width in pixels, a multiple of 16. Default: 512.")
    inference_flags.flux_sampling(parser, guidance_scale=3.5)
    inference_flags.output(parser, "flux-lora.png", int8=True)
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
    adapters = lora_files.read_adapters(lora_path, "--lora", biases=True) if lora_path else {}
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
        texts = inference.encode_for_flux(stage, args.prompt)

    # Load the models and add the LoRA.
    models = {"transformer": loading.load_model(root, "transformer", dtypes, args.variant, int8)}
    if adapts_clip:
        models["text_encoder"] = loading.load_model(root, "text_encoder", dtypes, args.variant)
        tokenizer = tokenization.load_tokenizer(root / "tokenizer")
    if lora_path:
        lora.load_lora(lora_path, models, dtypes.compute, scale=args.lora_scale)
    sampler = inference.FluxSampler(
        root,
        models["transformer"],
        dtypes,
        args.variant,
        seed=args.seed,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )

    # Generate and save the images.
    def generate(prompt, number):
        text = texts[prompt]
        if adapts_clip:
            text = {**text, "pooled_prompt_embeds": clip_pooled(models["text_encoder"], tokenizer, prompt)}
        return sampler.sample(text, (args.height, args.width), number)

    rows = []
    with execution.pynative():
        for prompt in args.prompt:
            for label in inference.adapter_labels(prompt, models.values(), args.compare):
                rows.append(inference.Row(label, [generate(prompt, n) for n in range(args.num_images_per_prompt)]))
    inference.save_rows(rows, output, singles)
    return 0


if __name__ == "__main__":
    run_script(main)
