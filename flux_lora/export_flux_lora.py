"""A FLUX.1 LoRA for other tools: the same adapter by the names and in the shapes that kohya's sd-scripts, ComfyUI or diffusers read.

    python export_flux_lora.py --lora out/pytorch_lora_weights.safetensors --format kohya --output dog_kohya.safetensors

Reads the layouts of other tools too (docs/flux_lora.md) and leaves one file; the adapter does the same in all of them, to the rounding
of --dtype.
"""

import argparse
from pathlib import Path

from mindtune import files
from mindtune.cli import UserError, run
from mindtune.models import lora_files, lora_layouts, precision


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--lora", required=True, help="The adapter, a .safetensors file or the directory that holds it.")
    add("--format", required=True, choices=lora_layouts.LAYOUTS, help="Layout to write.")
    add("--output", required=True, help="The file to write, .safetensors.")
    add(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Type of its weights. Default: the adapter's own, fp16 for 8-bit ones.",
    )
    add("--overwrite", action="store_true", help="Replace a file that is already there.")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: other tools look for .safetensors; give a name that ends in it.")
    if output.exists() and not args.overwrite:
        raise UserError(f"--output {output}: is already there. Name another file or add --overwrite.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}. Make it first.")
    files.require_writable("--output", output.absolute().parent)
    source = lora_files.find_lora(args.lora, "--lora")
    tensors, alphas = lora_files.read_lora(source, "--lora")
    dtype = precision.DTYPES[args.dtype] if args.dtype else None
    ranks = {}
    try:
        files.write_atomically(
            output, lambda path: ranks.update(lora_files.write_lora(path, tensors, alphas, args.format, dtype))
        )
    except ValueError as error:
        raise UserError(f"--lora {source}: {error}.") from None
    print(f"{output}: {args.format} layout, {lora_files.describe_ranks(ranks)}, {args.dtype or 'type as it was'}")
    return 0


if __name__ == "__main__":
    run(main)
