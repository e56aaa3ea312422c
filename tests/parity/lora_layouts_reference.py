"""Compares the weight changes of our exported LoRA files in diffusers with those of the original adapter.

    python lora_layouts_reference.py WORK

WORK has adapter.safetensors (diffusers' layout), kohya.safetensors, comfyui.safetensors and pipeline/, their tiny FLUX.
Writes WORK/layouts.json. Also converts WORK/native_control.safetensors, a Control-LoRA of Black Forest Labs, to
diffusers' layout: WORK/native_control_in_diffusers.safetensors.

Every number is the largest error of a weight change, relative to its largest entry. diffusers' converters require a
width of 3072, so the rows of B, or of a weight, are repeated to that width, and the result is subsampled.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

# diffusers 0.35.2 refuses these layers of kohya's layout if they have an alpha, as those of sd-scripts have. It reads
# CLIP only under the name lora_te_ and drops lora_te1_.
UNREAD = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


class ZerosElse(dict):
    """A native checkpoint whose missing weights and biases are zero."""

    def pop(self, name):
        return super().pop(name, torch.zeros(7 * 3072))


def changes(tensors, a="lora_A", b="lora_B"):
    """Layer -> alpha / rank * B A, in float64."""
    found = {}
    for name, down in tensors.items():
        if name.endswith(f".{a}.weight"):
            layer = name[: -len(f".{a}.weight")]
            scale = float(tensors.get(f"{layer}.alpha", down.shape[0])) / down.shape[0]
            found[layer] = scale * tensors[f"{layer}.{b}.weight"].double() @ down.double()
    return found


def largest_difference(found, expected):
    """The largest relative error; layers that share a native weight with an expected one must not change."""
    assert set(expected) <= set(found), set(expected) - set(found)
    assert not any(value.any() for name, value in found.items() if name not in expected)
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@torch.no_grad()
def loaded(root, weights):
    """Layer -> weight change in a pipeline after `load_lora_weights`."""
    pipeline = diffusers.FluxPipeline.from_pretrained(root)
    pipeline.load_lora_weights(weights)
    found = {}
    for prefix in ("transformer", "text_encoder"):
        layers = [(name, m) for name, m in getattr(pipeline, prefix).named_modules() if hasattr(m, "get_delta_weight")]
        found.update(
            {f"{prefix}.{name}": module.get_delta_weight(module.active_adapters[0]).double() for name, module in layers}
        )
    return found


def main(work):
    work = Path(work)
    adapter, kohya, comfyui = (load_file(work / f"{name}.safetensors") for name in ("adapter", "kohya", "comfyui"))
    expected = changes(adapter)
    root = work / "pipeline"
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(root / "transformer")
    times = 3072 // transformer.inner_dim

    results = {
        "adapter.safetensors, load_lora_weights": largest_difference(
            loaded(root, work / "adapter.safetensors"), expected
        )
    }

    read = {name: value for name, value in kohya.items() if not name.removeprefix("lora_unet_").startswith(UNREAD)}
    read = {name.replace("lora_te1_", "lora_te_"): value for name, value in read.items()}
    wide = {name: value.repeat_interleave(times, 0) if "lora_up" in name else value for name, value in read.items()}
    state = diffusers.FluxPipeline.lora_state_dict(wide)
    state = {
        name: value[::times] if name.endswith((".lora_B.weight", ".up.weight")) else value
        for name, value in state.items()
    }
    blocks = {name: value for name, value in expected.items() if "_blocks." in name}
    results["kohya.safetensors, lora_state_dict"] = largest_difference(changes(state), blocks)
    if len({value.shape[0] for name, value in adapter.items() if name.endswith(".lora_A.weight")}) == 1:
        # With different ranks, diffusers 0.35.2 uses the alpha of the first layer for all.
        clip = {name: value for name, value in expected.items() if name.startswith("text_encoder.")}
        results["kohya.safetensors, load_lora_weights"] = largest_difference(loaded(root, state), {**blocks, **clip})

    native = changes(comfyui)
    wide = {name.removeprefix("diffusion_model."): value.repeat_interleave(times, 0) for name, value in native.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(
        ZerosElse({f"{name}.weight": value for name, value in wide.items()})
    )
    found = {
        f"transformer.{name[: -len('.weight')]}": value[::times] for name, value in converted.items() if value.ndim == 2
    }
    theirs = {name: value for name, value in expected.items() if name.startswith("transformer.")}
    results["comfyui.safetensors, single-file converter"] = largest_difference(found, theirs)
    control = diffusers.FluxControlPipeline.lora_state_dict(work / "native_control.safetensors")
    control = {name: value.contiguous() for name, value in control.items()}
    save_file(control, work / "native_control_in_diffusers.safetensors")
    (work / "layouts.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
