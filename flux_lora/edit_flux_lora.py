"""Merges, extracts, resizes and describes LoRAs of FLUX.1.

    python edit_flux_lora.py merge --lora dog.safetensors style.safetensors --weight 1 0.6 --output both.safetensors
    python edit_flux_lora.py merge --lora dog.safetensors --pretrained_model_name_or_path FLUX.1-dev --output FLUX-dog
    python edit_flux_lora.py extract --pretrained_model_name_or_path FLUX.1-dev --finetuned FLUX-tuned --rank 32 \\
        --output tuned.safetensors
    python edit_flux_lora.py resize --lora dog.safetensors --energy 0.95 --output small.safetensors
    python edit_flux_lora.py info --lora dog.safetensors --plot dog.png

Reads the layouts that docs/flux_lora.md lists. Computes in float32 on the CPU. Of a pipeline, one tensor at a
time is in memory: a merge into FLUX.1-dev takes minutes, and 1 GB beside the LoRAs.
"""

import argparse
import math
from pathlib import Path

from mindtune import files
from mindtune.cli import UserError, indented_list, progress_bar, run_script, size_text
from mindtune.flags import inference_flags
from mindtune.models import (
    loading,
    lora_edit,
    lora_extract,
    lora_files,
    lora_layouts,
    lora_names,
    lora_summary,
    merged_pipeline,
    pipelines,
    precision,
    weights,
)
from mindtune.models.safetensors_file import read_safetensors

ADAPTED = ("transformer", "text_encoder")  # the components that a LoRA can adapt

# ---- flags ---------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", help="What to do.")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument

    add = command("merge", "Add LoRAs to each other, or to the weights of a pipeline.")
    add("--lora", nargs="+", required=True, help="One or more LoRAs, .safetensors files or their directories.")
    add("--weight", nargs="+", type=float, help="Factor of each LoRA. Default: 1.")
    add("--rank", type=int, help="Reduce the sum to this rank. Default: the sum of the ranks, which is exact.")
    add_base(add, "Write this pipeline with merged weights; directory or hub id. Default: write a LoRA.", False)
    add_output(add, "The .safetensors file to write, or the directory of the pipeline.")

    add = command("extract", "Write the difference between two models as a LoRA.")
    add_base(add, "Directory or hub id of the pipeline that was fine-tuned.", True)
    add(
        "--finetuned",
        required=True,
        help="Directory of the fine-tuned pipeline, or directory or hub id of its transformer.",
    )
    add("--rank", type=int, required=True, help="Rank of the LoRA.")
    add_output(add, "The .safetensors file to write.")

    add = command("resize", "Reduce the ranks of a LoRA.")
    add("--lora", required=True, help="The LoRA, a .safetensors file or its directory.")
    add("--rank", type=int, help="Highest rank of a layer. Default: given by --energy.")
    add(
        "--energy",
        type=float,
        help="Instead: share of the squared singular values to keep in each layer, such as 0.95.",
    )
    add_output(add, "The .safetensors file to write.")

    add = command("info", "Print layers, ranks, alphas and norms of a LoRA by block.")
    add("--lora", required=True, help="The LoRA, a .safetensors file or its directory.")
    add("--plot", help="Also draw them to this .png file. Default: only print.")
    add("--overwrite", action="store_true", help="Replace an existing file.")
    return parser.parse_args(argv)


def add_base(add, text, required):
    """Adds the flags of the base pipeline."""
    add("--pretrained_model_name_or_path", required=required, help=text)
    inference_flags.hub(add)
    add("--variant", help="Variant of the weight files, such as fp16. Default: the files without a variant.")
    add("--cache_dir", help="Directory for hub downloads. Default: the hub's cache.")


def add_output(add, text):
    """Adds the flags of the file to write."""
    add("--output", required=True, help=text)
    add(
        "--layout",
        "--format",
        choices=lora_layouts.KINDS["lora"][1],
        help="Layout of the LoRA to write. Default: diffusers.",
    )
    add(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Dtype of the weights to write. Default: that of the input, or fp32 if that has several.",
    )
    add("--overwrite", action="store_true", help="Replace an existing file. A directory is never replaced.")


# ---- checks --------------------------------------------------------------------------------------


def check_rank(rank):
    """Raises UserError for a rank below 1."""
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: must be at least 1.")


def check_weights(args):
    """The factor of every LoRA. Raises UserError for another number of factors, and for 0, NaN and infinity."""
    factors = args.weight or [1.0] * len(args.lora)
    if len(factors) != len(args.lora):
        raise UserError(f"--weight has {len(factors)} and --lora {len(args.lora)}: give one factor for each LoRA.")
    for factor in factors:
        if not math.isfinite(factor) or factor == 0:
            raise UserError(
                f"--weight {factor:g}: must be a number other than 0. Leave out a LoRA that is not to count."
            )
    return factors


def check_directory(args):
    """Raises UserError if the directory of a merged pipeline exists, or for flags that only a LoRA file has."""
    output = Path(args.output)
    if output.exists():
        raise UserError(
            f"--output {output}: is already there, and a pipeline is never replaced. Name another directory."
        )
    if args.rank or args.layout:
        flag = "--rank" if args.rank else "--layout"
        raise UserError(f"{flag} is for a LoRA file; a merged pipeline has none. Remove it.")
    files.require_parent("--output", output)


# ---- merge ---------------------------------------------------------------------------------------


def merge(args):
    factors = check_weights(args)
    check_rank(args.rank)
    if args.pretrained_model_name_or_path:
        merge_into_pipeline(args, factors)
        return
    files.require_new_file("--output", Path(args.output), ".safetensors", args.overwrite)
    paths = [lora_files.find_lora(name, "--lora") for name in args.lora]
    pairs = weighted_sum(paths, [lora_files.read_adapters(path, "--lora") for path in paths], factors)
    if args.rank:
        pairs = reduce(pairs, rank=args.rank)
    save(args, pairs, lora_edit.dtype_of(paths))


def weighted_sum(paths, adapters, factors):
    """Layer -> B and A of the sum of several LoRAs. Raises UserError if they are for different models."""
    loras = [lora_edit.to_pairs(path, "--lora", adapter) for path, adapter in zip(paths, adapters)]
    try:
        return lora_edit.weighted_sum(loras, factors)
    except ValueError as error:
        raise UserError(f"--lora {', '.join(map(str, paths))}: {error}. Give LoRAs of one model.") from None


def merge_into_pipeline(args, factors):
    check_directory(args)
    output = Path(args.output)
    paths = [lora_files.find_lora(name, "--lora") for name in args.lora]
    adapters = [lora_files.read_adapters(path, "--lora") for path in paths]
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.cache_dir,
        pipelines.FLUX_COMPONENTS,
        hub=args.hub,
    )
    layers = {name: loading.linear_layers(root, name) for name in ADAPTED}
    for path, adapter in zip(paths, adapters):
        lora_files.check_adapters(path, "--lora", adapter, layers)
    merged = {}
    for layer, pair in weighted_sum(paths, adapters, factors).items():
        component, _, name = layer.partition(".")
        merged.setdefault(component, {})[name] = pair
    dtype = precision.DTYPES[args.dtype] if args.dtype else None
    merged_pipeline.check_disk("--output", root, output, list(merged), args.variant, dtype)

    def write(folder):
        merged_pipeline.copy_others(root, folder, list(merged))
        count = sum(len(weights.stored_tensors(root, name, args.variant)) for name in merged)
        with progress_bar("merge", "tensor", count) as bar:
            for name, pairs in merged.items():
                merged_pipeline.write_merged(root, folder, name, args.variant, pairs, dtype, bar.update)

    files.write_folder_atomically(output, write)
    if missing := merged_pipeline.left_out(root, output):
        print(f"not part of the copy:\n{indented_list(missing)}")
    changed = "; ".join(f"{name}: {len(pairs)} layers" for name, pairs in merged.items())
    print(f"{output}: a pipeline with merged weights ({changed}), {args.dtype or 'dtype unchanged'}")


# ---- extract -------------------------------------------------------------------------------------


def find_finetuned(name, cache_dir, hub):
    """Component -> its directory in the fine-tuned pipeline. A directory or hub id of a transformer is that alone."""
    found = [component for component in ADAPTED if (Path(name) / component).is_dir()]
    if not found:
        return {"transformer": resolve_finetuned(name, cache_dir, "transformer", hub)}
    return {component: resolve_finetuned(str(Path(name) / component), cache_dir, component, hub) for component in found}


def resolve_finetuned(name, cache_dir, component, hub):
    return pipelines.resolve_model(name, "--finetuned", cache_dir, pipelines.FLUX_COMPONENTS[component][0], hub=hub)


def extract(args):
    check_rank(args.rank)
    files.require_new_file("--output", Path(args.output), ".safetensors", args.overwrite)
    tuned = find_finetuned(args.finetuned, args.cache_dir, args.hub)
    components = {name: pipelines.FLUX_COMPONENTS[name] for name in tuned}
    root = pipelines.resolve_pipeline(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, components, hub=args.hub
    )
    before = {name: weights.stored_tensors(root, name, args.variant) for name in tuned}
    after = {name: weights.stored_tensors(folder.parent, folder.name) for name, folder in tuned.items()}
    for name, folder in tuned.items():
        lora_extract.check_same_model("--finetuned", folder, before[name], after[name])

    found, others, equal = {}, [], 0
    with progress_bar("extract", "tensor", sum(map(len, before.values()))) as bar:
        for name in tuned:
            layers = lora_extract.adaptable_layers(root, name)
            for key, difference in lora_extract.differences(before[name], after[name]):
                layer = key[: -len(".weight")]
                if difference is None:
                    equal += 1
                elif key == f"{layer}.weight" and layer in layers:
                    found[f"{name}.{layer}"] = lora_edit.from_matrix(difference, args.rank)
                else:
                    others.append(f"{name}.{key}")
                bar.update()
    if others:
        print("these tensors differ too, and a LoRA cannot hold them:")
        print(indented_list(lora_summary.patterns(others)))
    if not found:
        raise UserError(
            f"--finetuned {args.finetuned}: no linear layer differs from the base model, so there is no LoRA to write. "
            "Give the fine-tuned model."
        )
    print(f"{len(found)} linear layers differ; {equal} tensors do not differ")
    print(lora_summary.energy_table(found))
    pairs = {layer: result.pair for layer, result in found.items()}
    save(args, pairs, lora_edit.common_dtype(lora_extract.dtypes(after)))


# ---- resize --------------------------------------------------------------------------------------


def resize(args):
    check_rank(args.rank)
    if (args.rank is None) == (args.energy is None):
        raise UserError("resize needs --rank or --energy, and not both.")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise UserError(f"--energy {args.energy:g}: must be above 0 and at most 1, such as 0.95.")
    files.require_new_file("--output", Path(args.output), ".safetensors", args.overwrite)
    path = lora_files.find_lora(args.lora, "--lora")
    pairs = lora_edit.to_pairs(path, "--lora", lora_files.read_adapters(path, "--lora"))
    save(args, reduce(pairs, args.rank, args.energy), lora_edit.dtype_of([path]))


def reduce(pairs, rank=None, energy=None):
    """The layers at lower ranks. Prints what that keeps."""
    reduced = {}
    with progress_bar("resize", "layer", len(pairs)) as bar:
        for layer, pair in pairs.items():
            reduced[layer] = lora_edit.reduce_rank(pair, rank, energy)
            bar.update()
    print(lora_summary.energy_table(reduced))
    return {layer: result.pair for layer, result in reduced.items()}


def save(args, pairs, default_dtype):
    """Writes a LoRA to --output and prints what it is."""
    output, layout = Path(args.output), args.layout or "diffusers"
    dtype = precision.DTYPES[args.dtype] if args.dtype else default_dtype
    written = []
    try:
        files.write_atomically(output, lambda path: written.append(lora_edit.write(path, pairs, layout, dtype)))
    except ValueError as error:
        raise UserError(f"--output {output}: {error}. Choose another --dtype or --layout.") from None
    print(f"{output}: {layout} layout, {written[0]}, {str(dtype).lower()}")


# ---- info ----------------------------------------------------------------------------------------


def info(args):
    if args.plot:
        files.require_new_file("--plot", Path(args.plot), ".png", args.overwrite)
    path = lora_files.find_lora(args.lora, "--lora")
    adapters = lora_files.read_adapters(path, "--lora")
    alphas = lora_files.read_lora(path, "--lora")[1]
    entries = read_safetensors(path)[0]
    dtypes = sorted({str(value.dtype) for name, value in entries.items() if not name.endswith("alpha")})
    size = size_text(path.stat().st_size)
    title = f"{path.name}: {lora_names.layout_of(entries)} layout, {' and '.join(dtypes)}, {size}"
    print(title)
    print(lora_files.describe_adapters(adapters))
    if not args.plot and any(lora_layouts.kind(adapter) != "lora" for adapter in adapters.values()):
        return
    halves = {  # without the norms of a Control-LoRA
        name: {key: value for key, value in adapter.items() if not lora_layouts.NORM.search(key)}
        for name, adapter in adapters.items()
    }
    found = lora_summary.blocks(lora_edit.to_pairs(path, "--lora", halves), alphas)
    print(lora_summary.block_table(found))
    if args.plot:
        lora_summary.plot(Path(args.plot), f"{title}\n{lora_files.describe_adapters(adapters)}", found)
        print(f"{args.plot}: norm, rank, alpha and layers by block")


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    {"merge": merge, "extract": extract, "resize": resize, "info": info}[args.command](args)
    return 0


if __name__ == "__main__":
    run_script(main)
