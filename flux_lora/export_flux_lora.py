"""Converts a FLUX.1 LoRA to the layout of diffusers, kohya's sd-scripts or ComfyUI.

    python export_flux_lora.py --lora out/pytorch_lora_weights.safetensors --format kohya --output dog_kohya.safetensors

Reads these layouts and those that docs/flux_lora.md lists, and writes one file. The LoRA computes the same in every
layout, up to the rounding of --dtype.
"""

import argparse
from pathlib import Path

from mindtune import files
from mindtune.cli import UserError, run_script
from mindtune.models import lora_files, lora_layouts, precision

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--lora", required=True, help="The LoRA, a .safetensors file or its directory.")
    add("--format", required=True, choices=lora_layouts.LAYOUTS, help="Layout to write.")
    add("--output", required=True, help="The .safetensors file to write.")
    add(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Dtype of the weights to write. Default: that of the LoRA, or fp16 for 8-bit weights.",
    )
    add("--overwrite", action="store_true", help="Replace an existing file.")
    return parser.parse_args(argv)


# ---- export --------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output)
    files.require_new_file("--output", output, ".safetensors", args.overwrite)
    source = lora_files.find_lora(args.lora, "--lora")
    tensors, alphas = lora_files.read_lora(source, "--lora")
    dtype = precision.DTYPES[args.dtype] if args.dtype else None
    written = []

    def write(path):
        written.append(lora_files.write_lora(path, tensors, alphas, args.format, dtype))

    try:
        files.write_atomically(output, write)
    except ValueError as error:
        raise UserError(f"--lora {source}: {error}.") from None
    print(f"{output}: {args.format} layout, {written[0]}, {args.dtype or 'dtype unchanged'}")
    return 0


if __name__ == "__main__":
    run_script(main)
